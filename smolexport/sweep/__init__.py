"""Many checkpoints x formats x schemes, each exported and held against its checkpoint, on one machine or on many.

A task is one output: a checkpoint in one format and scheme.  It is idempotent: its output appears whole, and its
record (what it was made from, what came out, how far it is from the checkpoint) is written after it.  A task whose
record still holds is not done again, so a sweep that was killed, or to which a checkpoint was added, does what is left.

    plan.py         which tasks there are
    fingerprint.py  whether a checkpoint is still the same
    record.py       what is known of a task from earlier
    task.py         doing one; worker.py is the process in which that happens
    engine.py       where tasks run: local.py in processes, cluster.py on Ray
    driver.py       all of them, with retries
    table.py        the result

In the folder of a sweep, NAME/ holds the outputs of the checkpoint NAME, sweep.json the result, and .sweep/ what is
needed to go on: records/, work/ for what is being written, hashes.json.
"""

from __future__ import annotations

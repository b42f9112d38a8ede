"""Checkpoints x formats x schemes, each exported and compared with its checkpoint, on one machine or on many.

A task is one output: a checkpoint in one format and scheme.  It is idempotent: its output appears whole, and its
record (inputs, files, figures) is written after it.  A task whose record still holds is skipped, so a sweep that was
killed, or given one more checkpoint, does only what is left.

    plan.py    which tasks there are
    record.py  what is known from earlier: a record per task, hashes of the checkpoints' files
    task.py    one task
    driver.py  all tasks, with retries; local.py runs them in processes, cluster.py on Ray
    table.py   the result and the progress

In the folder of a sweep, NAME/ holds the outputs of the checkpoint NAME, sweep.json the result, and .sweep/ what the
next run needs: records/, work/ for outputs in progress, hashes.json.
"""

from __future__ import annotations

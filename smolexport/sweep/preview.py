"""What a sweep would do, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from smolexport.conversion.prepare import prepare
from smolexport.errors import SmolexportError
from smolexport.files import check_parent
from smolexport.sweep import record as records
from smolexport.sweep.driver import HASHES, fingerprinted, state_of
from smolexport.sweep.plan import STATE, SweepSource, Task
from smolexport.sweep.table import TaskRow
from smolexport.sweep.task_hash import Hashes


def preview(sources: Sequence[SweepSource], tasks: Sequence[Task], out: Path) -> list[TaskRow]:
    """A row for each task: what is kept with its figures, what is to do with its size, what is refused and why.

    Args:
        sources: the checkpoints, the weights of hub ids may be missing.
        tasks: what `tasks_of` made of them.
        out: the folder of the outputs, which need not be there.

    Raises:
        OutputError: it cannot be made.
    """
    check_parent(out)
    known = {source.name for source in sources if (out / STATE / "records" / source.name).is_dir()}
    asked = [source for source in sources if source.name in known or source.folder is None]
    marks, errors = fingerprinted(asked, Hashes(out / STATE / HASHES), lambda _: None)
    given = (replace(task, fingerprint=marks.get(task.name, ("", ""))[0]) for task in tasks)
    return [_row(task, errors.get(task.name, "")) for task in given]


def _row(task: Task, error: str) -> TaskRow:
    if error:
        return TaskRow(task, "failed", records.empty(task), error)
    found, whole = state_of(task) if task.fingerprint else (records.empty(task), False)
    if whole and not task.config.force:
        return TaskRow(task, "kept", found)
    if records.done(task, found)[0] and not task.config.force:
        return TaskRow(task, "to do", replace(found, compared=None))
    try:
        plan = prepare(
            task.format, Path(task.folder), task.config.out, quant=task.scheme, name=task.name,
            ignore_config=task.config.ignore_config, weights=False,
        ).plan  # fmt: skip
    except SmolexportError as refused:
        return TaskRow(task, "failed", records.holding(task, found), str(refused))
    sizes = {"bytes": plan.size, "bits_per_weight": round(plan.bits_per_weight, 4), "notes": plan.fallback_lines()}
    return TaskRow(task, "to do", replace(found, exported=sizes, compared=None, error=""))

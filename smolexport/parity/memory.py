"""Peak memory of a model: `footprint` run in a process of its own."""

from __future__ import annotations

import json
import subprocess

from smolexport.parity.inputs import Candidate
from smolexport.processes import environment, fresh_python

__all__ = ["measure"]

_MODULE = "smolexport.parity.footprint"
_PATIENCE_S = 1800


def measure(model: Candidate, *, threads: int | None = None, context: int | None = None) -> tuple[int | None, str]:
    """Return the peak resident bytes of a fresh process that plays `model`, or None and the reason why not."""
    module = getattr(model.runtime, "__name__", None)
    if not isinstance(module, str):
        return None, "peak memory is unknown: its runtime is not an importable module"
    command = fresh_python(_MODULE, module, str(model.path))
    command += [] if threads is None else ["--threads", str(threads)]
    command += [] if context is None else ["--context", str(context)]
    command += ["--options", json.dumps(dict(model.options))]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module, no shell
            command, capture_output=True, text=True, env=environment(), timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"peak memory is unknown: {error}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return None, f"peak memory is unknown: {lines[-1]}"
    try:
        # a library may have printed before
        return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_rss_bytes"]), ""
    except (ValueError, LookupError, TypeError):
        return None, "peak memory is unknown: the measuring process printed no figure"

"""A process that answers with prompts and token ids, question by question."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from smolexport.processes import environment, fresh_python
from smolexport.text import printable

PATIENCE_S = 20.0  # for one answer
STARTING_S = 300.0  # libraries are loaded
_LONGEST = 160  # characters of a reason
_TAIL = 4096  # bytes of what the process said on stderr


@dataclass(frozen=True)
class Answer:
    """A prompt or text with its ids, or why there is none.

    `absent` where nothing failed but nothing can be asked, `lost` where the process ended before it answered.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    error: str = ""
    absent: bool = False
    lost: bool = False


class Renderer:
    """The tokenizer and the chat template of one file or folder, in a process of their own.

    Questions are asked one at a time, so that thousands of them need no more memory than one.
    """

    def __init__(self, runtime: str, path: Path) -> None:
        """Start the process.

        Args:
            runtime: name of a module with `open_chat`.
            path: what it opens.
        """
        self._patience = PATIENCE_S
        command = fresh_python(
            "smolexport.run.rendering.child", runtime, str(path), f"{STARTING_S}", f"{self._patience}"
        )
        with ExitStack() as stack:
            stack.enter_context(suppress(BrokenPipeError))  # closing the stdin of a process that is gone
            self._errors: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # a file: nobody has to empty it
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="ascii",
                env=environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"),
            )  # fmt: skip
            self._process = stack.enter_context(process)
            stack.callback(self._process.kill)  # whatever it is doing
            found = self._exchange("", STARTING_S)
            self._lost = found if isinstance(found, str) else _line(found.get("failed", ""))  # why it answers no more
            self._stack = stack.pop_all()

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, question: Mapping[str, Any], *, ids: bool = True) -> Answer:
        """The answer to `question`.  Once one is lost, so are all that follow.

        Args:
            question: `{"text": …}`, or `{"messages": …, "tools": …, "add_generation_prompt": …, "switches": …}`.
            ids: whether the text is encoded, too.
        """
        try:
            line = json.dumps({**question, "ids": ids}) + "\n"
        except RecursionError:
            return Answer(error="nested too deeply")
        found = self._lost or self._exchange(line, self._patience)
        if isinstance(found, str):
            self._lost = found
            return Answer(error=found, lost=True)
        error = _line(found.get("error", ""))
        return Answer(found.get("text", ""), tuple(found.get("ids", ())), error, "absent" in found)

    def _exchange(self, line: str, patience: float) -> dict[str, Any] | str:
        """Send a line and wait for the next one that comes back, or for the end of the process: then the reason."""
        process, start, told = self._process, time.monotonic(), ""
        if process.stdin is not None and process.stdout is not None:  # as they are, being pipes
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                told = process.stdout.readline()
        if told.endswith("\n"):
            return dict(json.loads(told))
        code = process.wait()
        if time.monotonic() - start >= patience:
            return f"no answer within {patience:g} seconds: a loop without an end, perhaps"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TAIL))
        last = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        return _line(last[0]) if last else f"its process ended with code {code}"


def _line(text: str) -> str:
    """A stranger's words on one short line."""
    return printable(" ".join(text.split()), _LONGEST)

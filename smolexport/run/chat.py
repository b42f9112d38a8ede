"""A model's tokenizer and chat template by its library's own means, and the process in which they run.

A chat template is a stranger's program in Jinja.  The libraries' sandboxes stop neither endless loops nor enormous
texts, so templates run in a process of their own with a time and a memory limit, `smolexport.run.chat_process`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from smolexport.errors import TokenizerError
from smolexport.processes import environment, fresh_python
from smolexport.text import first_line, printable

PATIENCE_S = 20.0  # for one answer
STARTING_S = 300.0  # the libraries are loaded
_LONGEST = 160  # characters of a reason
_TAIL = 4096  # bytes of the process's stderr

Messages = Sequence[Mapping[str, Any]]


class Chat(Protocol):
    """A file's tokenizer and chat template by the library's own means, without the weights."""

    def encode(self, text: str, *, framed: bool = False) -> list[int]:
        """Ids of `text`, special tokens in it recognised; `framed` adds those that the library adds to prompts."""
        ...

    def render(self, messages: Messages, tools: Messages | None, add_generation_prompt: bool, **switches: Any) -> str:
        """The prompt for a conversation; `switches` are further variables of the template, e.g. enable_thinking.

        Raises UnsupportedError for what the library cannot express, anything for what fails.
        """
        ...


class TokenizerChat:
    """A tokenizer of transformers, or one with its interface."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, framed: bool = False) -> list[int]:
        """As `Chat.encode`."""
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=framed)]

    def render(self, messages: Messages, tools: Messages | None, add_generation_prompt: bool, **switches: Any) -> str:
        """As `Chat.render`."""
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **switches
            )
        )


@contextmanager
def reading_tokenizer(path: Path, library: str) -> Iterator[None]:
    """Turn whatever `library` raises while it reads the tokenizer in `path` into TokenizerError."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise TokenizerError(f"{path}: {library} cannot read this tokenizer: {why}") from error


@dataclass(frozen=True)
class Answer:
    """A prompt or text with its ids, or why there is none.

    `absent`: the library has no way to ask; `lost`: the process ended before it answered.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    error: str = ""
    absent: bool = False
    lost: bool = False


class Renderer:
    """The tokenizer and the chat template of one file or folder, in a process of their own.

    Questions are sent one at a time, so that thousands of them need no more memory than one.
    """

    def __init__(self, runtime: str, path: Path) -> None:
        """Start the process.

        Args:
            runtime: name of a module with `open_chat`.
            path: what it opens.
        """
        self._patience = PATIENCE_S
        command = fresh_python("smolexport.run.chat_process", runtime, str(path), f"{STARTING_S}", f"{PATIENCE_S}")
        with ExitStack() as stack:
            stack.enter_context(suppress(BrokenPipeError))  # closing the stdin of a process that has ended
            self._errors: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # unlike a pipe, it never fills up
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="ascii",
                env=environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"),
            )  # fmt: skip
            self._process = stack.enter_context(process)
            stack.callback(self._process.kill)  # whatever it is doing
            found = self._exchange("", STARTING_S)
            self._lost = found if isinstance(found, str) else _line(found.get("failed", ""))  # why no answer comes
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
        """Send a line and wait for the next one that comes back; if the process ends instead, the reason."""
        process, start, answer = self._process, time.monotonic(), ""
        if process.stdin is not None and process.stdout is not None:  # for the type checker: both are pipes
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
        if answer.endswith("\n"):
            return dict(json.loads(answer))
        code = process.wait()
        if time.monotonic() - start >= patience:
            return f"no answer within {patience:g} seconds: perhaps an endless loop"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TAIL))
        last = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        return _line(last[0]) if last else f"its process ended with code {code}"


def _line(text: str) -> str:
    """A stranger's words on one short line."""
    return printable(" ".join(text.split()), _LONGEST)

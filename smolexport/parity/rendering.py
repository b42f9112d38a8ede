"""The fresh process in which a runtime's own tokenizer and chat template are asked.

    python -m smolexport.parity.rendering RUNTIME PATH PATIENCE

RUNTIME is a module with `open_chat`, PATIENCE are seconds for one answer.  Questions come as JSON on stdin:
`{"name": {"text": …}}` to encode a text, `{"name": {"messages": …, "tools": …, "add_generation_prompt": …,
"switches": …}}` to render and encode a conversation.  Each answer is a line of JSON on stdout: `{"name", "text",
"ids"}`, or `{"name", "error"}`, with `"absent": true` where the library has no way to ask.

A chat template is a stranger's program in Jinja.  The libraries run it in a sandbox; against the endless and the
enormous this process has a clock and a limit of memory, and it can be ended from outside.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolexport.errors import SmolexportError, UnsupportedError
from smolexport.runtime import Chat
from smolexport.text import reason

__all__ = ["TOO_LATE", "main"]

_MEMORY = 2 << 30  # bytes beyond what the libraries take
_LONGEST = 1 << 20  # characters of a prompt: the questions have hundreds
TOO_LATE = 3  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer what stands on stdin; returns the exit code."""
    runtime, path, patience = sys.argv[1:] if arguments is None else arguments
    questions: dict[str, dict[str, Any]] = json.loads(sys.stdin.read())
    # what a library prints shall not stand among the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        chat: Chat = importlib.import_module(runtime).open_chat(Path(path))
    except SmolexportError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    _limit_memory()
    for name, question in questions.items():
        clock = threading.Timer(float(patience), os._exit, (TOO_LATE,))
        clock.daemon = True
        clock.start()
        answers.write(json.dumps({"name": name, **_answer(chat, question)}) + "\n")
        answers.flush()
        clock.cancel()
    answers.close()
    return 0


def _answer(chat: Chat, question: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = question["text"] if "text" in question else chat.render(question["messages"], **_rest(question))
        if len(text) > _LONGEST:
            return {"error": f"a prompt of {len(text):,} characters"}
        return {"text": text, "ids": chat.encode(text)}
    except UnsupportedError as error:
        return {"error": str(error), "absent": True}
    except Exception as error:  # a library's or a template's own
        return {"error": f"{type(error).__name__}: {reason(error)}"}


def _rest(question: Mapping[str, Any]) -> dict[str, Any]:
    return {key: question[key] for key in ("tools", "add_generation_prompt", "switches")}


def _limit_memory() -> None:
    """Let allocations fail that no template needs; where the system has no such limit, the clock remains."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())

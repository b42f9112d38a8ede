"""The process in which a runtime's own tokenizer and chat template run.

    python -m smolexport.run.chat_process RUNTIME PATH STARTING PATIENCE

RUNTIME is a module with `open_chat`; STARTING and PATIENCE are the seconds to open PATH and for one answer.  On stdout
comes a line of JSON when it is ready, `{}`, or `{"failed": why}`; then an answer for each line on stdin.
`{"text": …}` encodes a text, with `"framed": true` as a prompt; `{"messages": …, "tools": …,
"add_generation_prompt": …, "switches": …}` renders and encodes a conversation; `"ids": false` leaves out the ids.
An answer is `{"text", "ids"}`, or `{"error"}`, with `"absent": true` where the library has no way to ask.

A timer ends the process, even inside a library and after the parent has died; memory is limited.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolexport.errors import SmolexportError, UnsupportedError
from smolexport.model.source_files import refuse_links
from smolexport.run.chat import Chat

_MEMORY = 2 << 30  # bytes beyond what the libraries take
_LONGEST = 1 << 20  # characters of a prompt, and _EACH more for each character of the question
_EACH = 16


def main() -> int:
    """Answer the questions on stdin; returns the exit code."""
    runtime, path, starting, patience = sys.argv[1:]
    # what a library prints must not mix with the answers
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def send(answer: Mapping[str, Any]) -> None:
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    faulthandler.dump_traceback_later(float(starting), exit=True)
    try:
        if Path(path).is_dir():
            refuse_links(Path(path))  # the libraries follow every link, and a prompt can show what they read
        chat: Chat = importlib.import_module(runtime).open_chat(Path(path))
    except SmolexportError as error:
        send({"failed": str(error)})
        return 2
    _limit_memory()
    send({})
    for line in sys.stdin:
        faulthandler.dump_traceback_later(float(patience), exit=True)
        send(_answer(chat, line))
    return 0


def _answer(chat: Chat, line: str) -> dict[str, Any]:
    try:
        question = json.loads(line)
        text = question["text"] if "text" in question else _render(chat, **question)
        if len(text) > _LONGEST + _EACH * len(line):
            return {"error": f"a prompt of {len(text):,} characters"}
        return {"text": text, "ids": chat.encode(text, framed=question.get("framed", False)) if question["ids"] else []}
    except UnsupportedError as error:
        return {"error": str(error), "absent": True}
    except MemoryError:
        return {"error": f"MemoryError: it takes more than {_MEMORY >> 30} GiB"}
    except Exception as error:  # a library's or a template's own
        return {"error": f"{type(error).__name__}: {error}"[:_LONGEST]}


def _render(chat: Chat, messages: Any, tools: Any, add_generation_prompt: bool, switches: Any, **_: Any) -> str:
    return chat.render(messages, tools, add_generation_prompt, **switches)


def _limit_memory() -> None:
    """Cap the process's memory (RLIMIT_AS).  Where the system has no such limit, only the timer protects."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())

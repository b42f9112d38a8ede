"""The fresh process in which a runtime's own tokenizer and chat template are asked.

    python -m smolexport.run.rendering.child RUNTIME PATH STARTING PATIENCE

RUNTIME is a module with `open_chat`, STARTING are seconds to open PATH, PATIENCE those for one answer.  On stdout comes
a line of JSON when it is ready, `{}`, or `{"failed": why}`; then an answer for each line on stdin.  `{"text": …}` asks
to encode a text, with `"framed": true` as the library's tools do with a prompt, `{"messages": …, "tools": …,
"add_generation_prompt": …, "switches": …}` to render and encode a conversation, with `"ids": false` to render it alone.
An answer is `{"text", "ids"}`, or `{"error"}`, with `"absent": true` where the library has no way to ask.

Against the endless this process has a clock that ends it, even inside a library, and where nobody waits any more;
against the enormous a limit of memory.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolexport.errors import SmolexportError, UnsupportedError
from smolexport.model.source_files import refuse_links
from smolexport.run.session import Chat

_MEMORY = 2 << 30  # bytes beyond what the libraries take
_LONGEST = 1 << 20  # characters of a prompt, beyond some for each that was sent
_EACH = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer what stands on stdin; returns the exit code."""
    runtime, path, starting, patience = sys.argv[1:] if arguments is None else arguments
    # what a library prints shall not stand among the answers
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def say(told: Mapping[str, Any]) -> None:
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    faulthandler.dump_traceback_later(float(starting), exit=True)
    try:
        if Path(path).is_dir():
            refuse_links(Path(path))  # the libraries follow every link, and what they read can be seen in a prompt
        chat: Chat = importlib.import_module(runtime).open_chat(Path(path))
    except SmolexportError as error:
        say({"failed": str(error)})
        return 2
    _limit_memory()
    say({})
    for line in sys.stdin:
        faulthandler.dump_traceback_later(float(patience), exit=True)
        say(_answer(chat, line))
    return 0


def _answer(chat: Chat, line: str) -> dict[str, Any]:
    try:
        question = json.loads(line)
        text = question["text"] if "text" in question else chat.render(question["messages"], **_rest(question))
        if len(text) > _LONGEST + _EACH * len(line):
            return {"error": f"a prompt of {len(text):,} characters"}
        encode = chat.prompt if question.get("framed") else chat.encode
        return {"text": text, "ids": encode(text) if question["ids"] else []}
    except UnsupportedError as error:
        return {"error": str(error), "absent": True}
    except MemoryError:
        return {"error": f"MemoryError: it takes more than {_MEMORY >> 30} GiB"}
    except Exception as error:  # a library's or a template's own
        return {"error": f"{type(error).__name__}: {error}"[:_LONGEST]}


def _rest(question: Mapping[str, Any]) -> dict[str, Any]:
    return {key: question[key] for key in ("tools", "add_generation_prompt", "switches")}


def _limit_memory() -> None:
    """Cap the process's memory (RLIMIT_AS).  Where the system has no such limit, the clock alone protects."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())

"""Whether every runtime reads a text and writes a prompt as the checkpoint does.

The checkpoint's side is its tokenizer.json as the library `tokenizers` reads it, and its template in transformers'
`apply_chat_template`.  A file's side is its runtime's own means, as far as there are any:

| runtime | tokenizer | chat template |
|---|---|---|
| llama.cpp | llama.cpp's | the file's, in the Jinja of llama-cpp-python (the C library has none) |
| mlx | mlx-lm's wrapper of transformers' | the same, with the wrapper's defaults |
| onnxruntime-genai | the library's | the library's, which knows no switches such as enable_thinking |
| onnxruntime | none: the session's codec, from the folder's files | none: the folder's files in transformers |

Templates run in processes of their own, see `rendering`.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport import plugins
from smolexport.checkpoint import read_json
from smolexport.errors import SmolexportError, TokenizerError
from smolexport.parity.conversations import TEXTS, conversations
from smolexport.parity.rendering import TOO_LATE
from smolexport.runtime import Runtime, Session, TextCodec
from smolexport.text import reason

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate

__all__ = ["Answer", "ChatCheck", "Expected", "ask", "check", "expect", "note"]

_REFERENCE = "torch"  # the runtime that reads checkpoints, and any folder with a tokenizer's files
_PATIENCE_S = 20.0  # for one answer
_PATIENCE_ALL_S = 300.0
_WIDTH, _LINES = 160, 12  # of a difference


@dataclass(frozen=True)
class ChatCheck:
    """One text or conversation on one runtime.

    Attributes:
        name: `text …` or `chat …`.
        equal: whether text and ids are the checkpoint's; None where the runtime has no way to be asked.
        difference: a short unified diff, or the first ids that differ, or why nothing was compared; empty if equal.
        means: what answered, where it is not the runtime's own.
    """

    name: str
    equal: bool | None
    difference: str = ""
    means: str = ""


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


@dataclass(frozen=True)
class Expected:
    """What was asked of the checkpoint, and what it answered.

    `checks` holds transformers' own tokenizer against tokenizer.json: for some tokenizer classes it builds another
    one than stands there, and what builds on transformers follows it.
    """

    questions: Mapping[str, Mapping[str, Any]]
    answers: Mapping[str, Answer]
    checks: tuple[ChatCheck, ...] = ()


def expect(folder: Path) -> Expected:
    """Ask what the checkpoint in `folder` makes of hard texts and, with its template, of conversations.

    Raises:
        TokenizerError: the tokenizer cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    from smolexport.tokenizer import open_tokenizer, read_tokenizer

    size = read_json(folder / "config.json", "the folder is no checkpoint").get("vocab_size")
    spec = read_tokenizer(folder, size if isinstance(size, int) else 0)
    templates = [spec.chat_template or "", *spec.chat_templates.values()]
    questions: dict[str, Mapping[str, Any]] = {f"text {name}": {"text": text} for name, text in TEXTS.items()}
    if any(templates):
        questions |= {f"chat {name}": asked for name, asked in conversations("".join(templates)).items()}
    codec = open_tokenizer(folder, spec)
    own = _ask(plugins.runtime(_REFERENCE), folder, questions)
    answers = {}
    for name, asked in questions.items():
        if "text" in asked and own[name].error:
            raise TokenizerError(f"{folder}: transformers' tokenizer gives no answer: {own[name].error}")
        answers[name] = own[name] if own[name].error else _encoded(codec, own[name].text)
    checks = (_compare(name, answers[name], own[name], "") for name in questions if not own[name].error)
    return Expected(questions, answers, tuple(checks))


def check(reference: Path | Expected, candidate: Candidate, session: Session) -> tuple[ChatCheck, ...]:
    """Hold a file's tokenizer and chat template against the checkpoint's.

    Args:
        reference: the checkpoint's folder, or what `expect` made of it, which spares a second candidate the time.
        candidate: the file with its runtime.
        session: the file's open session, for the codec of a runtime that brings no tokenizer.

    Raises:
        TokenizerError: the checkpoint's tokenizer cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    expected = reference if isinstance(reference, Expected) else expect(reference)
    answers, means = _candidate_answers(candidate, session.codec, expected.questions)
    return tuple(
        _compare(name, expected.answers[name], answers[name], means if name.startswith("chat ") else "")
        for name in expected.questions
    )


def ask(folder: Path) -> tuple[Expected | None, str]:
    """`expect`, and a note on the checkpoint itself, empty where there is nothing to say.

    What keeps the checkpoint from being asked is such a note too, and no error.
    """
    try:
        expected = expect(folder)
    except SmolexportError as error:
        return None, f"tokenizers and chat templates were not compared: {error}"
    odd = [one.name for one in expected.checks if not one.equal]
    told = f"transformers itself reads tokenizer.json otherwise in {len(odd)} of {len(expected.checks)} checks: "
    return expected, told + ", ".join(odd) if odd else ""


def note(checks: Sequence[ChatCheck]) -> str:
    """One line on the checks that differ and on what could not be asked; empty where all is equal."""
    apart, unasked = ([one for one in checks if one.equal is state] for state in (False, None))
    parts = []
    if apart:
        first = apart[0].difference.splitlines()
        reason = first[0] if len(first) == 1 else "another prompt"
        names = ", ".join(one.name for one in apart)
        parts.append(f"{len(apart)} of {len(checks)} texts and chats differ from the checkpoint's: {names} ({reason})")
    if unasked:
        parts.append(f"not asked: {', '.join(one.name for one in unasked)} ({unasked[0].difference})")
    return "; ".join(parts)


def _candidate_answers(
    candidate: Candidate, codec: TextCodec, questions: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Answer], str]:
    """Answers of the runtime, or of its session's codec and transformers; what stood in for it in words."""
    if hasattr(candidate.runtime, "open_chat"):
        return _ask(candidate.runtime, candidate.path, questions), ""
    texts = {name: _encoded(codec, asked["text"]) for name, asked in questions.items() if "text" in asked}
    chats = {name: asked for name, asked in questions.items() if name not in texts}
    if not chats:
        return texts, ""
    if not (candidate.path / "tokenizer_config.json").is_file() or plugins.missing(_REFERENCE):
        nothing = Answer(error=f"{candidate.runtime.NAME} renders no chat templates", absent=True)
        return texts | dict.fromkeys(chats, nothing), ""
    rendered = _ask(plugins.runtime(_REFERENCE), candidate.path, chats)
    # the ids are those that the session would be fed
    own = {name: answer if answer.error else _encoded(codec, answer.text) for name, answer in rendered.items()}
    return texts | own, "transformers on the folder's files"


def _encoded(codec: TextCodec, text: str) -> Answer:
    """`text` and its ids without the ones that the codec puts before every text."""
    try:
        return Answer(text, tuple(codec.encode(text)[len(codec.encode("")) :]))
    except Exception as error:  # whatever a library's tokenizer raises
        return Answer(error=f"{type(error).__name__}: {reason(error)}")


def _ask(runtime: Runtime, path: Path, questions: Mapping[str, Mapping[str, Any]]) -> dict[str, Answer]:
    """Have `rendering` answer; a question that it did not come to gets the reason for an answer."""
    module = getattr(runtime, "__name__", None)
    if not isinstance(module, str):
        return dict.fromkeys(questions, Answer(error="its runtime is not an importable module", absent=True))
    command = [sys.executable, "-W", "ignore", "-m", "smolexport.parity.rendering", module, str(path), str(_PATIENCE_S)]
    # what this process can import, the other one shall import; and nothing is fetched
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    pipe = subprocess.PIPE
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, encoding="utf-8", errors="replace"
    )
    reason = ""
    try:
        out, err = process.communicate(json.dumps(questions), timeout=_PATIENCE_ALL_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        reason = f"no answer within {_PATIENCE_ALL_S:g} seconds"
    except BaseException:
        process.kill()
        process.wait()
        raise
    answers = dict(_parsed(out))
    if process.returncode == TOO_LATE:
        reason = f"no answer within {_PATIENCE_S:g} seconds: a loop without an end, perhaps"
    reason = reason or next(iter(reversed(err.strip().splitlines())), f"exit code {process.returncode}")
    missed = [name for name in questions if name not in answers]
    for name in missed:
        after = "" if name == missed[0] else f"not asked after '{missed[0]}' got "
        answers[name] = Answer(error=f"{after}{reason}", lost=True)
    return answers


def _parsed(out: str) -> Sequence[tuple[str, Answer]]:
    found = []
    for line in out.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue  # cut off in the middle
        answer = Answer(told.get("text", ""), tuple(told.get("ids", ())), told.get("error", ""), "absent" in told)
        found.append((told["name"], answer))
    return found


def _compare(name: str, expected: Answer, found: Answer, means: str) -> ChatCheck:
    if found.absent:
        return ChatCheck(name, None, found.error, means)
    if expected.lost:
        return ChatCheck(name, None, f"the checkpoint's own: {expected.error}", means)
    if expected.error:
        # a template that refuses a conversation should refuse it everywhere
        refused = bool(found.error) and not found.lost
        here = found.error if found.lost else repr(found.text[:_WIDTH])
        told = "" if refused else f"the checkpoint's own: {expected.error}; here: {here}"
        return ChatCheck(name, refused, told, means)
    if found.error:
        return ChatCheck(name, False, found.error, means)
    if found.text != expected.text:
        return ChatCheck(name, False, _text_difference(expected.text, found.text), means)
    return ChatCheck(name, found.ids == expected.ids, _id_difference(expected.ids, found.ids), means)


def _text_difference(ours: str, theirs: str) -> str:
    """A few lines of a unified diff around the first difference, in which every character can be seen."""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    start = ours.rfind("\n", 0, place) + 1
    one, two = ([repr(line)[1:-1] for line in side.splitlines(keepends=True)] for side in (ours, theirs))
    diff = list(difflib.unified_diff(one, two, "checkpoint", "file", lineterm="", n=1))
    if max(map(len, diff), default=0) > _WIDTH:  # long lines: what stands around the place in them
        begin = max(start, place - 40)
        diff = [*diff[:2], *(f"{sign}…{side[begin : place + 80]!r}" for sign, side in (("-", ours), ("+", theirs)))]
    more = [f"… {len(diff) - _LINES} more lines"] if len(diff) > _LINES else []
    return "\n".join([*diff[:_LINES], *more])


def _id_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    if ours == theirs:
        return ""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [", ".join(map(str, side[place : place + 4])) or "the end" for side in (theirs, ours)]
    return f"same text, other ids from token {place} on: {shown[0]} instead of {shown[1]} ({len(theirs)}, {len(ours)})"

"""Checks that each runtime tokenizes texts and renders prompts as the checkpoint does.

The checkpoint's side is its tokenizer.json, read by the library `tokenizers`, and its template, rendered by
transformers' `apply_chat_template`.  A file's side is what its runtime offers:

| runtime | tokenizer | chat template |
|---|---|---|
| llama.cpp | llama.cpp's | the file's, in the Jinja of llama-cpp-python (the C library has none) |
| mlx | mlx-lm's wrapper of transformers' | the same, with the wrapper's defaults |
| onnxruntime-genai | the library's | the library's, which has no switches such as enable_thinking |
| onnxruntime | none: the session's codec, from the folder's files | none: the folder's files in transformers |

Templates run in separate processes, see `smolexport.run.chat`.
"""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport import plugins
from smolexport.errors import MissingDependencyError, SmolexportError, TokenizerError
from smolexport.model.checkpoint import read_json
from smolexport.parity.results import ChatCheck
from smolexport.run.chat import Answer, Renderer
from smolexport.run.session import Runtime, Session, TextCodec
from smolexport.text import failure

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate

_TIMEOUT_ALL_S = 300.0
_PROMPT = "prompt"
_MOST_ADDED = 64  # added tokens in the text of added tokens
_WIDTH, _LINES = 160, 12  # limits of a difference


_QUESTIONS = json.loads(Path(__file__).with_name("chat_questions.json").read_text(encoding="utf-8"))
TEXTS: Mapping[str, str] = _QUESTIONS["texts"]
"""Difficult texts by name."""


@dataclass(frozen=True)
class Expected:
    """Texts and conversations by name, the checkpoint's answers, and the texts of its special tokens by id.

    `checks` compare transformers' own tokenizer with tokenizer.json: for some tokenizer classes transformers builds a
    different tokenizer, and libraries based on transformers follow it.
    """

    questions: Mapping[str, Mapping[str, Any]]
    answers: Mapping[str, Answer]
    checks: tuple[ChatCheck, ...]
    special: Mapping[int, str]


def expect(folder: Path) -> Expected:
    """The checkpoint's answers on difficult texts and, if it has a chat template, on conversations.

    Raises:
        TokenizerError: the tokenizer cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    from smolexport.tokenizer import open_tokenizer, read_tokenizer

    size = read_json(folder / "config.json", "the folder is not a checkpoint").get("vocab_size")
    spec = read_tokenizer(folder, size if isinstance(size, int) else 0)
    templates = [spec.chat_template or "", *spec.chat_templates.values()]
    questions: dict[str, Mapping[str, Any]] = {f"text {name}": {"text": text} for name, text in TEXTS.items()}
    if added := [token.text for token in spec.added[:_MOST_ADDED]]:
        questions["text added tokens"] = {"text": "a" + "".join(f" {text} b{text}" for text in added)}
    questions[_PROMPT] = {"text": "Once upon a time", "framed": True}
    if any(templates):
        questions |= {f"chat {name}": question for name, question in conversations("".join(templates)).items()}
    codec = open_tokenizer(folder, spec)
    own = _ask(plugins.checkpoint_runtime("open_chat"), folder, questions)
    answers = {}
    for name, question in questions.items():
        if "text" in question and own[name].error:
            raise TokenizerError(f"{folder}: transformers' tokenizer fails: {own[name].error}")
        answers[name] = own[name] if own[name].error else _encoded(codec, own[name].text, question)
    special = {token.id: token.text for token in spec.added}
    checks = (_compare(name, answers[name], own[name], "", special) for name in questions if not own[name].error)
    return Expected(questions, answers, tuple(checks), special)


def check(expected: Expected, candidate: Candidate, session: Session) -> tuple[ChatCheck, ...]:
    """Compare a file's tokenizer and chat template with the checkpoint's.

    `session` is the file's open session, for the codec of a runtime without a tokenizer.
    """
    answers, means = _candidate_answers(candidate, session.codec, expected.questions)
    return tuple(
        _compare(name, one, answers[name], means if name.startswith("chat ") else "", expected.special)
        for name, one in expected.answers.items()
    )


def ask(folder: Path) -> tuple[Expected | None, str]:
    """What `expect` returns and a note on the checkpoint itself, empty if all is well; None and why `expect` failed."""
    try:
        expected = expect(folder)
    except SmolexportError as error:
        return None, f"tokenizers and chat templates were not compared: {error}"
    around, checks = _around(expected.checks)
    odd = [one.name for one in checks if not one.equal]
    found = f"transformers itself tokenizes differently from tokenizer.json in {len(odd)} of {len(checks)} checks: "
    parts = [found + ", ".join(odd)] * bool(odd) + [f"transformers {one.difference}" for one in around]
    return expected, "; ".join(parts)


def note(checks: Sequence[ChatCheck]) -> str:
    """One line on the checks that differ or could not be made; empty if all are equal."""
    around, checks = _around(checks)
    differing, unchecked = ([one for one in checks if one.equal is state] for state in (False, None))
    parts = [f"the runtime {one.difference}" for one in around]
    if differing:
        first = differing[0].difference.splitlines()
        reason = first[0] if len(first) == 1 else "different prompt"
        names, ratio = ", ".join(one.name for one in differing), f"{len(differing)} of {len(checks)}"
        parts.append(f"{ratio} texts and chats differ from the checkpoint's: {names} ({reason})")
    if unchecked:
        parts.append(f"not checked: {', '.join(one.name for one in unchecked)} ({unchecked[0].difference})")
    return "; ".join(parts)


def _around(checks: Sequence[ChatCheck]) -> tuple[list[ChatCheck], list[ChatCheck]]:
    """Checks whose only difference is in the tokens around a prompt, and the other checks."""
    around = [one for one in checks if one.name == _PROMPT and one.difference.startswith(("begins ", "ends "))]
    return around, [one for one in checks if one.name != _PROMPT or (one not in around and not one.equal)]


def _candidate_answers(
    candidate: Candidate, codec: TextCodec, questions: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Answer], str]:
    """Answers of the runtime, or of its session's codec and transformers, and the name of any substitute."""
    if hasattr(candidate.runtime, "open_chat"):
        return _ask(candidate.runtime, candidate.path, questions), ""
    texts = {name: _encoded(codec, one["text"], one) for name, one in questions.items() if "text" in one}
    chats = {name: one for name, one in questions.items() if name not in texts}
    if not chats:
        return texts, ""
    try:  # transformers reads the tokenizer of any folder
        transformers = plugins.checkpoint_runtime("open_chat")
    except MissingDependencyError:
        transformers = None
    if transformers is None or not (candidate.path / "tokenizer_config.json").is_file():
        nothing = Answer(error=f"{candidate.runtime.NAME} does not render chat templates", absent=True)
        return texts | dict.fromkeys(chats, nothing), ""
    rendered = _ask(transformers, candidate.path, chats)
    # the ids that the session would be fed
    own = {name: answer if answer.error else _encoded(codec, answer.text, {}) for name, answer in rendered.items()}
    return texts | own, "transformers on the folder's files"


def _encoded(codec: TextCodec, text: str, question: Mapping[str, Any]) -> Answer:
    """`text` and its ids, without those that the codec puts before every text unless the question asks for them."""
    try:
        return Answer(text, tuple(codec.encode(text)[0 if question.get("framed") else len(codec.encode("")) :]))
    except Exception as error:  # a library's tokenizer may raise anything
        return Answer(error=failure(error))


def _ask(runtime: Runtime, path: Path, questions: Mapping[str, Mapping[str, Any]]) -> dict[str, Answer]:
    """Answers from a separate process; questions that it did not reach get the reason as their error."""
    module = getattr(runtime, "__name__", None)
    if not isinstance(module, str):
        return dict.fromkeys(questions, Answer(error="the runtime is not an importable module", absent=True))
    answers: dict[str, Answer] = {}
    missed, end = "", time.monotonic() + _TIMEOUT_ALL_S
    with Renderer(module, path) as renderer:
        for name, question in questions.items():
            if time.monotonic() > end:
                missed = missed or f"no answer within {_TIMEOUT_ALL_S:g} seconds"
            answers[name] = Answer(error=missed, lost=True) if missed else renderer.ask(question)
            if answers[name].lost:
                missed = missed or f"not asked because '{name}' failed: {answers[name].error}"
    return answers


def _compare(name: str, expected: Answer, found: Answer, means: str, special: Mapping[int, str]) -> ChatCheck:
    if found.absent:
        return ChatCheck(name, None, found.error, means)
    if expected.lost:
        return ChatCheck(name, None, f"the checkpoint's: {expected.error}", means)
    if expected.error:
        # a template that rejects a conversation must reject it in every runtime
        refused = bool(found.error) and not found.lost
        here = found.error if found.lost else repr(found.text[:_WIDTH])
        difference = "" if refused else f"the checkpoint's template: {expected.error}; the file's: {here}"
        return ChatCheck(name, refused, difference, means)
    if found.error:
        return ChatCheck(name, False, found.error, means)
    if found.text != expected.text:
        return ChatCheck(name, False, _text_difference(expected.text, found.text), means)
    equal = found.ids == expected.ids
    return ChatCheck(name, equal, "" if equal else _id_difference(name, expected.ids, found.ids, special), means)


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Index of the first difference, or the length of the shorter one if it is the beginning of the other."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _text_difference(ours: str, theirs: str) -> str:
    """A few lines of a unified diff around the first difference, with all characters visible."""
    place = first_difference(ours, theirs)
    start = ours.rfind("\n", 0, place) + 1
    one, two = ([repr(line)[1:-1] for line in side.splitlines(keepends=True)] for side in (ours, theirs))
    diff = list(difflib.unified_diff(one, two, "checkpoint", "file", lineterm="", n=1))
    if max(map(len, diff), default=0) > _WIDTH:  # long lines: only the part around the difference
        begin = max(start, place - 40)
        diff = [*diff[:2], *(f"{sign}…{side[begin : place + 80]!r}" for sign, side in (("-", ours), ("+", theirs)))]
    more = [f"… {len(diff) - _LINES} more lines"] if len(diff) > _LINES else []
    return "\n".join([*diff[:_LINES], *more])


def _frame_difference(ours: Sequence[int], theirs: Sequence[int], special: Mapping[int, str]) -> str:
    """The tokens around the same text; empty if the text differs or nothing is around it."""
    inner = [one for one in ours if one not in special]
    places = (at for at in range(len(theirs) - len(inner) + 1) if list(theirs[at : at + len(inner)]) == inner)
    start = next(places, None)
    if start is None or not inner:
        return ""

    def words(ids: Sequence[int]) -> str:
        return " ".join(repr(special.get(one, one)) for one in ids) or "nothing"

    own, before, behind = ours[: -len(inner)], theirs[:start], theirs[start + len(inner) :]
    parts = [f"begins a prompt with {words(before)} instead of {words(own)}"] * (before != own)
    parts += [f"ends a prompt with {words(behind)}"] * bool(behind)
    return " and ".join(parts)


def _id_difference(name: str, ours: Sequence[int], theirs: Sequence[int], special: Mapping[int, str]) -> str:
    if name == _PROMPT and (around := _frame_difference(ours, theirs, special)):
        return around
    place = first_difference(ours, theirs)
    shown = [", ".join(map(str, side[place : place + 4])) or "the end" for side in (theirs, ours)]
    return (
        f"same text, different ids from token {place} on: {shown[0]} instead of {shown[1]} ({len(theirs)}, {len(ours)})"
    )


def conversations(template: str) -> dict[str, dict[str, Any]]:
    """Conversations by name: those that `template` distinguishes, judged by the words in it; it is not run."""
    found = {
        "user": _conversation("user"),
        "system": _conversation("system user answer again"),
        "without generation prompt": _conversation("system user answer", prompt=False),
        "unanswered, without generation prompt": _conversation("user answer again", prompt=False),
    }
    words = set(re.findall(r"\w+", template))
    if "tools" in words:
        found["tools"] = _conversation("system user", tools=1)
        found["tool call"] = _conversation("user call result", tools=1)
        found["tool call, answered"] = _conversation("system user call result answer again", tools=2)
    for name in sorted(words & {"xml_tools", "python_tools"}):
        switch: dict[str, Any] = {name: [_QUESTIONS["tool"]]}
        found[name] = _conversation("system user", **switch)
    if "reasoning_content" in words:
        found["reasoning"] = _conversation("user thought again")
    if "enable_thinking" in words:
        for state, value in (("on", True), ("off", False)):
            found[f"thinking {state}"] = _conversation("user answer again", enable_thinking=value)
            found[f"thinking {state}, system"] = _conversation("system user", enable_thinking=value)
            if "tools" in words:
                found[f"thinking {state}, tools"] = _conversation("user", tools=1, enable_thinking=value)
    return found


def _conversation(messages: str, *, tools: int = 0, prompt: bool = True, **switches: Any) -> dict[str, Any]:
    return {
        "messages": [_QUESTIONS["messages"][name] for name in messages.split()],
        "tools": [_QUESTIONS["tool"]] * tools or None,
        "add_generation_prompt": prompt,
        "switches": switches,
    }

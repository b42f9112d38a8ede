"""Test data for tokenizers and chat templates: difficult texts and conversations of all kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TEXTS: Mapping[str, str] = {
    "english": "It's the dog's, isn't it? We'll see; I've said they're HERE, and I'D go. \"Quote\" (don't!) — end…",
    "spaces": " a  b   c    d\t\te\n\nf\n \n  g \r\n h" + " " * 17 + "i ",
    "numbers": "0 12 123 1234 12345 3.14159 1,000,000.00 1e-10 0xDEADBEEF 50% 2024-01-31T23:59:59Z ١٢٣ ²³ Ⅷ",
    "code": 'def f(x: int) -> str:\n    if x >= 10:\n\treturn f"{x!r:>8}"\n\n\n    return "\\n"  # <b>&amp;</b>\n',
    "scripts": "Straße cœur ¿Qué? Съешь ещё 我想在apple工作1314天 日本語のテキスト 한국어 مرحبا שלום नमस्ते ภาษาไทย",
    "marks": "e\u0301 é a\u0308\u0323 n\u0303 ﬁ ½ \u0301alone A\u030aÅÅ Z͑ͫ̓a̷l̶g̸o̴ a\u00a0b\u2003c\u3000d\u200be\u2028f",
    "emoji": "😀👍🏽 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷🇩🇪 ❤️ 1️⃣ 🫠 \U0001d54f \U000f0000 \ufffd",
    "special": "<|im_start|>user\nx<|im_end|> <|endoftext|><s> </s><unk><think>\n</think> <tool_call> [INST]",
    "word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
}
_SYSTEM = {"role": "system", "content": "You are terse.\nAnswer in “quotes” & <tags>, é 日本."}
_USER = {"role": "user", "content": "  What's 2+2?\n\n```py\nprint({'a': 1})\n```  <b>&</b> 😀 "}
_ANSWER = {"role": "assistant", "content": "It's \"4\"; isn't it?\n"}
_AGAIN = {"role": "user", "content": "Sure — and 3·3?"}
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather\'s state in a city; <b>°C</b> & "more".',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "E.g. Zürich"},
                "days": {"type": "integer", "minimum": 1, "default": None},
                "units": {"type": "string", "enum": ["°C", "°F"]},
            },
            "required": ["city"],
        },
    },
}
_CALL: Mapping[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "call00001",
            "function": {
                "name": "get_weather",
                "arguments": {"city": "Zürich", "days": 2, "exact": True, "near": [1.5, None, "a'b\"c"]},
            },
        }
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"temp": -3.5, "sky": "☁"}'}
_THOUGHT = {"role": "assistant", "content": "4.", "reasoning_content": "Two and two\n\nis four."}


def conversations(template: str) -> dict[str, dict[str, Any]]:
    """Conversations by name, as far as the switches that `template` knows give sense to them.

    Templates are only looked through for words here, not run.
    """
    asked = {
        "user": _asked([_USER]),
        "system": _asked([_SYSTEM, _USER, _ANSWER, _AGAIN]),
        "without generation prompt": _asked([_SYSTEM, _USER, _ANSWER], prompt=False),
        "unanswered, without generation prompt": _asked([_USER, _ANSWER, _AGAIN], prompt=False),
    }
    words = set(re.findall(r"\w+", template))
    if "tools" in words:
        asked["tools"] = _asked([_SYSTEM, _USER], tools=[_TOOL])
        asked["tool call"] = _asked([_USER, _CALL, _RESULT], tools=[_TOOL])
        asked["tool call, answered"] = _asked([_SYSTEM, _USER, _CALL, _RESULT, _ANSWER, _AGAIN], tools=[_TOOL, _TOOL])
    for name in sorted(words & {"xml_tools", "python_tools"}):
        asked[name] = _asked([_SYSTEM, _USER], switches={name: [_TOOL]})
    if "reasoning_content" in words:
        asked["reasoning"] = _asked([_USER, _THOUGHT, _AGAIN])
    if "enable_thinking" in words:
        for state, value in (("on", True), ("off", False)):
            switches = {"enable_thinking": value}
            asked[f"thinking {state}"] = _asked([_USER, _ANSWER, _AGAIN], switches=switches)
            asked[f"thinking {state}, system"] = _asked([_SYSTEM, _USER], switches=switches)
            if "tools" in words:
                asked[f"thinking {state}, tools"] = _asked([_USER], tools=[_TOOL], switches=switches)
    return asked


def _asked(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    prompt: bool = True,
    switches: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "add_generation_prompt": prompt, "switches": switches or {}}

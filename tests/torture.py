# ruff: noqa: E501 - a text is one line
"""Texts on which tokenizers like to differ.  Data only; every test of tokens uses the same ones."""

from __future__ import annotations

import unicodedata

__all__ = ["TORTURE", "composed", "with_special"]

TORTURE: dict[str, str] = {
    "english": "It's the dog's, isn't it? We'll see; I've said they're here, and I'd go. \"Quote\" (don't!) — end…",
    "contractions": "I'M YOU'RE WE'VE THEY'LL HE'D IT'S DON'T i'm 'Tis 'twas o'clock rock'n'roll ''s '' 's ' s 'LL'l 'Ve",
    "french": "L'été dernier, où étiez-vous ? « Ça alors ! » dit-elle ; j'aime le cœur naïf de Noël, à 20 °C.",
    "spanish": "¿Qué pasó? ¡Mañana será otro día! El pingüino añora la Ñ: 1.234,56 € según él.",
    "german": "Die Straßenbahnhaltestelle ist groß; Äpfel, Öl und Übermut. „Jawohl“, sagte er – 3,5 % mehr. ẞ",
    "italian": "Perché no? È così: l'università dell'Aquila, po' di caffè; città, più, già, lunedì.",
    "portuguese": "Não há pão? Avó e avô põem maçãs no chão; às vezes, ação e coração. Vocês estão aí?",
    "cjk": "我想在apple工作1314151天～ 你好，世界！『日本語』のテキスト、カタカナとひらがな。한국어 문장입니다. ㄱㄴㄷ 𠮷野家",
    "arabic_hebrew": "مرحبا بالعالم، كيف حالك؟ ١٢٣٤٥ السَّلَامُ عَلَيْكُمْ \u200fשלום עולם, שָׁלוֹם ۱۲۳",
    "cyrillic_greek": "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак. Ξεσκεπάζω τὴν ψυχοφθόρα.",
    "indic_thai": "नमस्ते दुनिया! मैं ठीक हूँ। १२३ বাংলা ভাষা தமிழ் ภาษาไทยไม่มีช่องว่าง ๑๒๓ ខ្មែរ ไป มา",
    "emoji": "😀😃 👍🏽👍🏿 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇩🇪 ❤️ ☺ 1️⃣ 😶‍🌫️ 🦙🦙🧑🏻‍💻 🫠🫨 ✅x✅",
    "marks": "e\u0301 é a\u0308\u0323 n\u0303ino ñ c\u0327a ç Z͑ͫ̓a̷l̶g̸o̴ \u0301alone A\u030aÅÅ ﬁ ﬀ ½ ² ³ Ⅷ ⅷ ① ㊿ ﹏",
    "numbers": "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000.00 1e-10 0xDEADBEEF 50% 2024-01-31T23:59:59Z 1١2٢½3²",
    "digits_spaces": "a  4 a 4 a   44  444 4444   4 4 4\n4\t4 x4x 4x4 $4.00 №4 v1.2.3",
    "code_python": 'def f(x: int) -> str:\n    """Doc."""\n    if x >= 10:\n\treturn f"{x!r:>8}"\n\n\n    return "\\n".join([])\n',
    "code_c": '#include <stdio.h>\r\nint main(void) {\r\n  for (int i=0;i<10;++i) printf("%d\\n", i); /* c */ // x\r\n}\r\n',
    "code_html": '<div class="a">&nbsp;<br/></div>\n{"k": [1, null, true], "é": "\\u00e9"} SELECT * FROM t WHERE a<>b;',
    "markup": "# Title\n\n* item\n  - sub\n\n| a | b |\n|---|---|\n\n```sh\n$ ls -la ~/x && rm -rf ./*\n```\n---\n====\n",
    "punctuation": "!!!???...,,,;;:::'''\"\"\"```((([[[{{{}}}]]])))<<>>@@##$$%%^^&&**__++==~~||\\\\// -- — ‐‑‒–―… ·•† §¶©®™",
    "spaces": " a  b   c    d     e      f       g        h" + " " * 17 + "i" + " " * 70 + "j ",
    "only_spaces": "     ",
    "one_space": " ",
    "tabs_newlines": "\ta\t\tb\t\t\tc\n\nd\n\n\ne\n \nf\n  \n g \n\th\t \t i\t\n\t\nj\n\n\n\n",
    "line_ends": "a\r\nb\rc\n\rd\r\n\r\ne\r\r\nf \r\n g\r\n  h\n\n\r\n",
    "wide_spaces": "a\u00a0b\u00a0\u00a0c \u00a0d\u2003e\u2009f\u3000g\u202fh\u1680i\u205fj\u2028k\u2029l\u0085m\u200bn\ufeffo\u2060p",
    "controls": "".join(chr(code) for code in range(1, 32))
    + "a\x01b\x7fc\x1b[31mred\x1b[0m \x0b \x0c \x1c\x1d\x1e\x1f|\x80\x9f",
    "odd_planes": "\U0001d54f\U0001d7d8 \U00010348 \ue000 \U000f0000 \ufffd \uffff \U0010ffff \u0378 \U000e0001 \U0001f9ff",
    "mixed_case": "iPhone XMLHttpRequest camelCase SCREAMING_CASE kebab-case ǅ ǈ İstanbul ıI ſs Kelvin K Ångström",
    "looks_special": "<|im_start <|im_end|>x<|im_end|><| |> <s> </s> <unk> <0x0A> ▁▁ Ġ Ċ [PAD7] <|endoftext|><think>x</think>",
    "urls": "https://example.org/a/b?c=d&e=%20f#g mailto:a.b+c@d-e.co.uk C:\\Users\\x\\y.txt /usr/lib64/libm.so.6",
    "repeats": "aaaaaaaaaaaaaaaaaaaaaaaa hahahahahaha ======================== ........................ 0000000000000000",
    "long_word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
    "newline_only": "\n",
    "empty": "",
}


def composed(texts: dict[str, str]) -> dict[str, str]:
    """The same texts in Unicode's composed form (NFC)."""
    return {name: unicodedata.normalize("NFC", text) for name, text in texts.items()}


def with_special(tokens: list[str]) -> dict[str, str]:
    """Texts full of a tokenizer's own special tokens: alone, doubled, between words, spaces and line ends."""
    texts = {"all": "".join(tokens), "spaced": " ".join(tokens), "lines": "\n".join(tokens)}
    for number, token in enumerate(tokens[:8]):
        texts[f"around_{number}"] = f"a{token}b {token} c\n{token}\n{token}{token}  d{token[:-1]}{token[1:]}"
    return texts

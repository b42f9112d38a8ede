"""Holding exported files against their checkpoint: what they predict, how fast, and how much memory they take.

windows      the text's ids cut into windows, and a session's logits over one of them, block by block
statistics   divergence, agreement and perplexity from pairs of blocks, streamed
greedy       how long a file's own continuation stays with the reference's
speed        time to first token, prefill and decode rates
memory       peak memory of a fresh process that plays one file (`footprint` is that process)
chat         every runtime's own tokenizer and chat template against the checkpoint's (`conversations`, `rendering`)
results      what a comparison is made of, as plain frozen data
gate         what each file must reach, from flags or a TOML file
compare      the order in which all that happens
report       the same results as JSON, as tables, as Markdown and as an HTML page
junit        the same verdicts as JUnit XML
"""

from __future__ import annotations

"""Holding exported files against their checkpoint: what they predict, how fast, and how much memory they take.

inputs       the models and how much is measured; `candidates` makes them from paths
windows      the text's ids cut into windows, and a session's logits over one of them, block by block
statistics   divergence, agreement and perplexity from pairs of blocks, streamed
store        the reference's logits on disk; `base` plays the reference, or finds what it gave there
group        files of the same weights scored together, in parts: the weights', the exporter's; `tensors` their errors
greedy       how long a file's own continuation stays with the reference's
speed        time to first token, prefill and decode rates
rates        speed and memory of several models; `machine` what they ran on; `bench` these alone
memory       peak memory of a fresh process that plays one file (`footprint` is that process)
chat         every runtime's own tokenizer and chat template against the checkpoint's (`conversations`)
results      what a comparison is made of, as plain frozen data
gate         what each file must reach, from flags or a TOML file
compare      the order in which all that happens
report       the same results as JSON, as tables, as Markdown and as an HTML page
junit        the same verdicts as JUnit XML
"""

from __future__ import annotations

"""Comparison of exported files with their checkpoint: accuracy, speed and memory.

inputs         the models and the settings; `candidates` makes the models from paths
windows        windows of the text, a session's logits over them block by block, and greedy continuations
metrics        divergence, agreement and perplexity from pairs of blocks, streamed
reference      runs the reference, or reads its output from the `logit_cache`
scoring        scores files with the same weights together, splits their error in two, and compares tensors
speed          time to first token, prefill and decode rates; `bench` without a reference; the hardware
peak_memory    peak memory of a fresh process
chat           each runtime's tokenizer and chat template against the checkpoint's
contamination  detects scored text that a file was calibrated on
results        the figures, as plain frozen data
thresholds     what each file must meet, from flags or a TOML file
compare        the order of all stages
report         results as JSON, tables, Markdown, an HTML page and JUnit XML
"""

from __future__ import annotations

"""Comparison of exported files with their checkpoint: accuracy, speed and memory.

inputs              the models and the settings; `candidates` makes the models from paths
windows             windows of the text, and a session's logits over one of them, block by block
metrics             divergence, agreement and perplexity from pairs of blocks, streamed
reference           runs the reference, or reads its output from the `logit_cache`
scoring             scores files with the same weights together, and splits their error in two
weight_errors       error of each tensor
greedy              agreement of greedy continuations
speed               time to first token, prefill and decode rates; `interleave` the sessions, `machine` the hardware
bench               speed without a reference
peak_memory         peak memory of a fresh process
chat                each runtime's tokenizer and chat template against the checkpoint's (`conversations`)
contamination       detects scored text that a file was calibrated on
calibration_record  how a file was calibrated, from the file and from the report beside it
results             the figures, as plain frozen data
method_table        calibration methods side by side
thresholds          what each file must meet, from flags or a TOML file
compare             the order of all stages
report              results as JSON, tables, Markdown, an HTML page and JUnit XML
"""

from __future__ import annotations

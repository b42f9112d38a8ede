"""What the thresholds of parity.toml do not say, in this project's own words."""


def test_same_weights_same_predictions(smolexport_comparison):
    gguf, onnx = smolexport_comparison.candidates
    assert abs(gguf.accuracy.kld.mean.value - onnx.accuracy.kld.mean.value) < 0.005


def test_no_position_falls_apart(smolexport_parity):
    assert smolexport_parity("out/model-int4.gguf").accuracy.kld.p99 < 1


def test_every_runtime_reads_the_text_alike(smolexport_comparison):
    assert all(candidate.tokenizer_equal for candidate in smolexport_comparison.candidates)

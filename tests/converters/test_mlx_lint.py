"""The linter of MLX folders: silent on sound ones, one clear line for each thing a reader would stumble over."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolexport.errors import FileFormatError
from smolexport.quant.formats import SIZES as BYTES
from smolexport_to_mlx.folder import compose, quantization_object
from smolexport_to_mlx.lint import MODES, lint
from tests.converters.mlx_models import FAMILIES, tiny_model
from tests.damage import join, split
from tests.mlx_for_tests import mlx_lm, needs_mlx

Q4 = {"group_size": 32, "bits": 4, "mode": "affine"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj"
Headers = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def packed(path: str, shape: tuple[int, ...], form: dict[str, Any]) -> Headers:
    rows, columns = shape
    group, bits, affine = form["group_size"], form["bits"], form["mode"] == "affine"
    parts: Headers = {f"{path}.weight": ("U32", (rows, columns * bits // 32))}
    for part in ("scales", "biases")[: 1 + affine]:
        parts[f"{path}.{part}"] = ("F16" if affine else "U8", (rows, columns // group))
    return parts


def headers_of(model: Any, default: dict[str, Any] | None, departures: dict[str, Any]) -> Headers:
    """Every tensor of a folder in which all matrices have the default format but those named."""
    found: Headers = {}
    for tensor in model.spec.tensors():
        path = tensor.stored_name.removesuffix(".weight")
        form = departures.get(path, default)
        found |= packed(path, tensor.shape, form) if form and len(tensor.shape) == 2 else {
            tensor.stored_name: ("F16", tensor.shape)
        }  # fmt: skip
    return found


def save(path: Path, tensors: Headers, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"} if metadata is None else metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * BYTES.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    join(path, header, bytes(end))


def save_index(folder: Path, tensors: Headers) -> None:
    total = sum(prod(shape) * BYTES[dtype] for dtype, shape in tensors.values())
    places = dict.fromkeys(sorted(tensors), SINGLE)
    text = json.dumps({"metadata": {"total_size": total, "total_parameters": 1}, "weight_map": places})
    (folder / INDEX).write_text(text)


def sound(
    folder: Path,
    model_type: str = "llama",
    default: dict[str, Any] | None = Q4,
    departures: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A folder in order: weights of zero, everything else as it should be."""
    model = tiny_model(folder.parent / "source", model_type, **overrides)
    folder.mkdir()
    departures = departures or {}
    tensors = headers_of(model, default, departures)
    save(folder / SINGLE, tensors)
    save_index(folder, tensors)
    quantization = quantization_object(default, departures) if default else None
    (folder / "config.json").write_text(json.dumps(compose(model, quantization, "F16")))
    return folder


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MIXED: dict[str, Any] = {DOWN: {"group_size": 32, "bits": 6, "mode": "affine"}, "model.embed_tokens": False}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_sound_folders_pass(tmp_path: Path, model_type: str, scaling: Any, tied: bool) -> None:
    assert lint(sound(tmp_path / "q", model_type, Q4, MIXED, rope_scaling=scaling, tie_word_embeddings=tied)) == []
    assert lint(sound(tmp_path / "f", model_type, None, rope_scaling=scaling, tie_word_embeddings=tied)) == []


@pytest.mark.parametrize(
    ("mode", "group", "bits"), [(m, g, b) for m, (gs, bs) in MODES.items() for g in gs for b in bs]
)
def test_every_format_passes(tmp_path: Path, mode: str, group: int, bits: int) -> None:
    form = {"group_size": group, "bits": bits, "mode": mode}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
    folder = sound(tmp_path / "q", "llama", form, head_dim=32, **sizes)
    assert lint(folder) == []


@needs_mlx
@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlx_loads_what_passes(tmp_path: Path, model_type: str) -> None:
    """Strictly, with the bits of each module as its entry says."""
    model, config = mlx_lm("utils").load_model(sound(tmp_path / "q", model_type, Q4, MIXED), lazy=True, strict=True)
    assert config["quantization"]["bits"] == 4
    layer = model.layers[0]
    assert (layer.mlp.down_proj.bits, layer.mlp.up_proj.bits) == (6, 4)
    assert not hasattr(model.model.embed_tokens, "bits")


@needs_mlx
def test_what_mlx_lm_writes_itself_is_not_good_enough_for_swift(tmp_path: Path) -> None:
    """A folder of its own with a silently skipped module: mlx-lm runs it, the linter names what phones miss."""
    from tests.converters.test_mlx_config import mlx_model

    utils = mlx_lm("utils")
    source = dict(tiny_model(tmp_path / "source", "llama", old_style=False).config)
    model, config = utils.quantize_model(mlx_model(source), source, 64, 4)
    folder = tmp_path / "theirs"
    utils.save_model(folder, model)
    utils.save_config(config, folder / "config.json")
    found = "\n".join(lint(folder))
    assert "rope_theta is None at top level and 10000.0 in rope_parameters" in found
    assert f"{DOWN} is float in a quantized folder without being named" in found
    assert "head_dim is None" in found
    assert "q_proj" not in found


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "config.json", change)


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, INDEX, change)


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def both(content: dict[str, Any]) -> None:
        change(content["quantization"])
        content["quantization_config"] = content["quantization"]

    return config(both)


def tensors(change: Callable[[Headers], object]) -> Callable[[Path], None]:
    """Another set of tensors, with an index that fits them."""

    def rewrite(folder: Path) -> None:
        header, _ = split(folder / SINGLE)
        found: Headers = {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"}
        change(found)
        save(folder / SINGLE, found)
        save_index(folder, found)

    return rewrite


Q = "model.layers.1.self_attn.q_proj"
UP = {"group_size": 32, "bits": 8, "mode": "affine"}
FLAWS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no top theta": (config(lambda c: c.pop("rope_theta")), "rope_theta is None at top level and 10000.0"),
    "two thetas": (config(lambda c: c.update(rope_theta=5.0)), "rope_theta is 5.0 at top level and 10000.0"),
    "no parameters": (config(lambda c: c.pop("rope_parameters")), "and None in rope_parameters"),
    "theta is text": (config(lambda c: c.update(rope_theta="1e4")), "rope_theta is '1e4'"),
    "scaling of default": (config(lambda c: c.update(rope_scaling={"rope_type": "default"})), "although"),
    "null scaling": (config(lambda c: c.update(rope_scaling=None)), "rope_scaling is None although"),
    "one scaling": (
        config(lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0)),
        "it should be rope_parameters without rope_theta",
    ),
    "no tie flag": (config(lambda c: c.pop("tie_word_embeddings")), "tie_word_embeddings is None"),
    "tie is 1": (config(lambda c: c.update(tie_word_embeddings=1)), "tie_word_embeddings is 1"),
    "no head_dim": (config(lambda c: c.pop("head_dim")), "head_dim is None"),
    "no eos": (config(lambda c: c.pop("eos_token_id")), "eos_token_id is 'absent'"),
    "remote code": (config(lambda c: c.update(auto_map={"a": "b"})), "auto_map should not be"),
    "one quantization": (config(lambda c: c.pop("quantization_config")), "quantization_config differ"),
    "only the hub's": (config(lambda c: c.pop("quantization")), "quantization is None; it should be an object"),
    "quantization is text": (
        config(lambda c: c.update(quantization="4bit", quantization_config="4bit")),
        "quantization is '4bit'",
    ),
    "null group": (quantization(lambda q: q.update(group_size=None)), "the default: group_size is None"),
    "bits as float": (quantization(lambda q: q.update(bits=4.0)), "bits is 4.0; it should be an integer"),
    "bits true": (quantization(lambda q: q.update(bits=True)), "bits is True"),
    "tool name": (quantization(lambda q: q.update(tool="smolexport")), "'tool', which is not a module"),
    "unknown module": (quantization(lambda q: q.update({"model.layers.9.x": UP})), "which is not a module"),
    "null in a layer": (quantization(lambda q: q[DOWN].update(bits=None)), f"{DOWN}: bits is None"),
    "foreign in a layer": (quantization(lambda q: q[DOWN].update(sym=True)), f"{DOWN}: the key 'sym' is unknown"),
    "true for a layer": (quantization(lambda q: q.update({Q: True})), f"quantization of {Q} is True"),
    "unknown mode": (quantization(lambda q: q.update(mode="int")), "mode is 'int'; known: affine"),
    "mode is a list": (quantization(lambda q: q.update(mode=[1])), "mode is [1]"),
    "one bit": (quantization(lambda q: q.update(bits=1)), "mode affine has no 1 bits with groups of 32"),
    "group of 48": (quantization(lambda q: q.update(group_size=48)), "not a multiple of 48"),
    "wrong bits": (quantization(lambda q: q.update({Q: UP})), f"{Q}: 8 bits need a weight of U32 [64, 16]"),
    "wrong group": (
        quantization(lambda q: q.update({Q: {**Q4, "group_size": 64}})),
        f"{Q}: groups of 64 need scales of BF16/F16/F32 [64, 1], there are F16 [64, 2]",
    ),
    "wrong mode": (quantization(lambda q: q.update({Q: {**Q4, "mode": "mxfp4"}})), f"{Q}: mode mxfp4 has no biases"),
    "unnamed departure": (quantization(lambda q: q.pop(DOWN)), f"{DOWN}: 4 bits need a weight of U32 [64, 20]"),
    "unnamed float": (quantization(lambda q: q.pop("model.embed_tokens")), "embed_tokens is float"),
    "float by its entry": (quantization(lambda q: q.update({Q: False})), f"{Q}: has scales although"),
    "silently skipped": (
        tensors(lambda t: (t.pop(f"{Q}.scales"), t.pop(f"{Q}.biases"), t.update({f"{Q}.weight": ("F16", (64, 64))}))),
        f"{Q} is float",
    ),
    "no biases": (tensors(lambda t: t.pop(f"{Q}.biases")), f"{Q}: mode affine needs biases, there are none"),
    "no scales": (tensors(lambda t: t.pop(f"{Q}.scales")), f"tensor {Q}.weight is U32 [64, 8] with scales or biases"),
    "bytes as weight": (tensors(lambda t: t.update({f"{Q}.weight": ("U8", (64, 32))})), "there is U8 [64, 32]"),
    "two float dtypes": (tensors(lambda t: t.update({"model.norm.weight": ("F32", (64,))})), "are of 2 dtypes"),
    "claimed dtype": (config(lambda c: c.update(dtype="bfloat16")), "dtype is 'bfloat16', the float tensors are F16"),
    "norm too long": (tensors(lambda t: t.update({"model.norm.weight": ("F16", (65,))})), "it should be float [64]"),
    "norm missing": (tensors(lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight [64] is missing"),
    "head of a tied model": (
        tensors(lambda t: t.update({"lm_head.weight": ("F16", (320, 64))})),
        "'lm_head.weight' of a tied model is not part of the model",
    ),
    "stray tensor": (tensors(lambda t: t.update({"x": ("F16", (1,))})), "tensor 'x' is not part of the model"),
    "fp8": (tensors(lambda t: t.update({"model.norm.weight": ("U8", (64,))})), "is U8 [64], it should be float"),
    "untied without head": (config(lambda c: c.update(tie_word_embeddings=False)), "tensor lm_head.weight"),
    "other sizes": (config(lambda c: c.update(intermediate_size=96)), f"{DOWN}: "),
    "unknown model": (config(lambda c: c.update(model_type="mamba")), "model_type 'mamba' is not supported"),
    "no index": (lambda folder: (folder / INDEX).unlink(), f"{INDEX} is missing"),
    "index without map": (index(lambda i: i.pop("weight_map")), "should hold the objects weight_map and metadata"),
    "index lacks one": (index(lambda i: i["weight_map"].pop(f"{Q}.scales")), f"'{Q}.scales': None in the index"),
    "index has one more": (index(lambda i: i["weight_map"].update(x=SINGLE)), "actually nowhere"),
    "index lies": (index(lambda i: i["weight_map"].update({f"{Q}.scales": [1]})), "[1] in the index"),
    "total size": (index(lambda i: i["metadata"].update(total_size=1)), "total_size is 1, the tensors have"),
    "stray file": (lambda f: save(f / "model-old.safetensors", {"x": ("F16", (1,))}), "tensors are not where"),
    "twice": (lambda f: save(f / "model2.safetensors", {"model.norm.weight": ("F16", (64,))}), "is in model.safe"),
    "not for mlx": (lambda f: save(f / "model-b.safetensors", {}, {"format": "pt"}), "has 'pt'"),
}  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_is_named(tmp_path: Path, flaw: str) -> None:
    folder = sound(tmp_path / "q", "llama", Q4, MIXED)
    damage, words = FLAWS[flaw]
    damage(folder)
    found = lint(folder)
    assert any(words in line for line in found), found
    assert all("\n" not in line and len(line) < 400 for line in found)


@needs_mlx
@pytest.mark.parametrize("flaw", ["wrong bits", "norm missing", "stray tensor", "wrong mode", "untied without head"])
def test_mlx_stumbles_over_the_grave_ones(tmp_path: Path, flaw: str) -> None:
    folder = sound(tmp_path / "q", "llama", Q4, MIXED)
    FLAWS[flaw][0](folder)
    with pytest.raises(ValueError, match=r"[Mm]issing|parameters|[Ee]xpected|shape"):
        mlx_lm("utils").load_model(folder, lazy=True, strict=True)


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


HOSTILE: dict[str, tuple[str, bytes]] = {
    "config cut": ("config.json", b'{"model_type": "lla'),
    "config is a list": ("config.json", b"[]"),
    "config is binary": ("config.json", bytes(range(256))),
    "config is deep": ("config.json", nested(200_000).encode()),
    "config with a long number": ("config.json", b'{"vocab_size": ' + b"9" * 10_000 + b"}"),
    "index cut": (INDEX, b'{"weight_map": {'),
    "index is deep": (INDEX, nested(200_000).encode()),
    "empty weights": (SINGLE, b""),
    "text as weights": (SINGLE, b"hello, this is no safetensors file at all"),
    "header of 2^63 bytes": (SINGLE, b"\xff" * 7 + b"\x7f" + b"{}"),
    "header is a list": (SINGLE, (2).to_bytes(8, "little") + b"[]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    folder = sound(tmp_path / "q")
    name, content = HOSTILE[case]
    (folder / name).write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        lint(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"config.json: not found; the folder is not an MLX folder"):
        lint(tmp_path)
    with pytest.raises(FileFormatError, match=r"config.json"):
        lint(tmp_path / "absent")
    folder = sound(tmp_path / "q")
    (folder / "model-x.safetensors").mkdir()
    with pytest.raises(FileFormatError, match=r"model-x.safetensors: is damaged or not a safetensors file"):
        lint(folder)
    (folder / "model-x.safetensors").rmdir()
    (folder / SINGLE).unlink()
    with pytest.raises(FileFormatError, match=r"no model\*.safetensors"):
        lint(folder)


@pytest.mark.parametrize("depth", [200, 500, 900, 980])
def test_nesting_below_the_parsers_limit_is_survived(tmp_path: Path, depth: int) -> None:
    folder = sound(tmp_path / "q")
    edit(folder, "config.json", lambda c: c.update(quantization=json.loads(nested(10)), rope_scaling=[]))
    text = (folder / "config.json").read_text().replace('"rope_scaling": []', f'"rope_scaling": {nested(depth)}')
    (folder / "config.json").write_text(text)
    try:
        assert lint(folder)
    except FileFormatError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_values_of_any_kind_anywhere(tmp_path: Path) -> None:
    """Each key of config.json and of the index replaced by each kind of JSON: findings or one line, never a crash."""
    folder = sound(tmp_path / "q", num_hidden_layers=1)
    kinds: list[Any] = [None, True, -1, 0, 1e308, 2**70, "x", [], [1], {}, {"a": {}}, {"": []}]
    for name in ("config.json", INDEX):
        text = (folder / name).read_text()
        for key in json.loads(text):
            for kind in kinds:
                (folder / name).write_text(json.dumps({**json.loads(text), key: kind}))
                try:
                    lines = lint(folder)
                except FileFormatError as error:
                    lines = [str(error)]
                assert all("\n" not in line for line in lines)
        (folder / name).write_text(text)
    assert lint(folder) == []


def test_cut_anywhere(tmp_path: Path) -> None:
    folder = sound(tmp_path / "q", num_hidden_layers=1)
    whole = (folder / SINGLE).read_bytes()
    for length in np.linspace(0, len(whole) - 1, 60).astype(int):
        (folder / SINGLE).write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="damaged"):
            lint(folder)

"""Whether a finished folder is what each of its readers expects, from its headers alone.

Plain ONNX Runtime forgives everything but the graph; Transformers.js and ONNX Runtime GenAI find the graph, its
weights and its caches by what two small files say.  Where these disagree, each reader fails in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from smolexport.conversion.folder_files import TEMPLATE, TOKENIZER, as_format_errors
from smolexport.errors import ConfigError, FileFormatError
from smolexport.model.arch import load_spec
from smolexport.model.checkpoint import read_json
from smolexport.model.spec import ModelSpec, Tensor
from smolexport.text import first_line, show
from smolexport_to_onnx.container import DTYPES, KEEP, PAGE
from smolexport_to_onnx.reading import GENAI, Model, graph_paths, primary_graph, read_model, weights
from smolexport_to_onnx.schemes import STEMS

CONFIG, JS = "config.json", "transformers.js_config"


def lint(folder: Path) -> list[str]:
    """Everything about `folder` that some reader would refuse or misread; raises FileFormatError.

    Checked: the graphs themselves, both configurations against them, every tensor against the shapes in config.json,
    the sizes of inputs and outputs, arrays that overlap or cannot be mapped, the tokenizer's files.
    """
    if folder.is_file():  # a bare graph
        return []
    with as_format_errors(folder):
        return list(_findings(folder))


def _findings(folder: Path) -> Iterator[str]:
    primary_graph(folder)
    config, generation = read_json(folder / CONFIG, "the folder is not an ONNX folder"), read_json(folder / GENAI)
    models = [read_model(path) for path in graph_paths(folder)]
    yield from _tokenizer(folder)
    yield from _transformers_js(folder, config, models)
    try:
        spec = load_spec(config, strict=False)
    except ConfigError as error:
        yield str(error)
        return
    yield from _genai(folder, generation, spec, models)
    for model in models:
        named = (*_operators(model), *_ports(spec, model), *_tensors(spec, model), *_arrays(model))
        yield from (f"{model.path.name}: {finding}" for finding in named)


def _tokenizer(folder: Path) -> Iterator[str]:
    for name in ("tokenizer.json", TOKENIZER):
        if not (folder / name).is_file():
            yield f"{name} is missing; no reader goes without"
    both = (folder / TEMPLATE).is_file() and (folder / TOKENIZER).is_file()
    if both and not read_json(folder / TOKENIZER).get("chat_template"):
        yield f"{TOKENIZER}: has no chat_template, and Transformers.js does not read {TEMPLATE}"


def _transformers_js(folder: Path, config: Mapping[str, Any], models: list[Model]) -> Iterator[str]:
    own = config.get(JS)
    if not isinstance(own, dict):
        yield f"{CONFIG}: {JS} is {show(own)}; Transformers.js finds no external data without it"
        return
    if STEMS.get(str(own.get("dtype"))) not in [model.path.stem for model in models]:
        yield f"{CONFIG}: {JS}: dtype is {show(own.get('dtype'))}, and there is no graph of that name"
    external, caches = own.get("use_external_data_format"), own.get("kv_cache_dtype")
    for model in models:
        name = model.path.name
        if model.path.parent != folder / "onnx":
            yield f"{name}: is outside the folder onnx, where Transformers.js looks"
        if not isinstance(external, dict) or external.get(name) != 1:
            yield f"{CONFIG}: {JS}: use_external_data_format should hold {name}: 1"
        places = {array.path.name for array in model.arrays.values()}
        if places - {f"{name}_data"}:
            yield f"{name}: has weights in {', '.join(map(show, sorted(places)))}; Transformers.js takes {name}_data"
        kinds = {dtype for port, (dtype, _) in _interface(model).items() if port.startswith("past_key_values.")}
        dtype = next((js for js, stem in STEMS.items() if stem == model.path.stem), None)
        stated = caches.get(dtype, "float32") if isinstance(caches, dict) else caches or "float32"
        if kinds and stated != ("float16" if kinds == {DTYPES["F16"]} else "float32"):
            yield f"{CONFIG}: {JS}: kv_cache_dtype of {dtype} is {show(stated)}, the caches of {name} are not"


def _genai(folder: Path, generation: Mapping[str, Any], spec: ModelSpec, models: list[Model]) -> Iterator[str]:
    model = generation.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        yield f"{GENAI}: should hold an object model with an object decoder"
        return
    found = next((m for m in models if m.path.relative_to(folder).as_posix() == decoder.get("filename")), None)
    if found is None:
        yield f"{GENAI}: filename is {show(decoder.get('filename'))}, and there is no such graph"
        return
    heads = spec.attention
    due = {
        "head_size": heads.head_dim, "hidden_size": spec.hidden_size, "num_hidden_layers": len(spec.layers),
        "num_attention_heads": heads.num_attention_heads, "num_key_value_heads": heads.num_key_value_heads,
    }  # fmt: skip
    for key, value in (*due.items(), ("vocab_size", spec.vocab_size)):
        stated = model.get(key) if key == "vocab_size" else decoder.get(key)
        if stated != value:
            yield f"{GENAI}: {key} is {show(stated)}, {CONFIG} says {value}"
    positions = min((table.shape[0] for table in found.tables), default=None)
    length = model.get("context_length")
    if not isinstance(length, int) or (positions is not None and length > positions):
        yield f"{GENAI}: context_length is {show(length)}, the rotary tables end at {positions}"


def _operators(model: Model) -> Iterator[str]:
    """What the onnx library's checker finds; it does not know ONNX Runtime's own operators."""
    from onnx import checker, helper

    whole = type(model.proto)()
    whole.CopyFrom(model.proto)
    graph = whole.graph
    inside = [tensor for tensor in graph.initializer if tensor.name not in model.arrays]
    outside = [tensor for tensor in graph.initializer if tensor.name in model.arrays]
    # To the checker, arrays beside the graph are inputs: it would look for their file in the working directory.
    graph.input.extend(helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in outside)
    del graph.initializer[:]
    graph.initializer.extend(inside)
    for node in graph.node:
        if node.op_type == "SimplifiedLayerNormalization":  # which ONNX Runtime has in ONNX's own domain
            node.domain = "com.microsoft"
    try:
        checker.check_model(whole)
    except Exception as error:  # whatever the library's binding raises
        yield f"is not a valid graph ({first_line(error)})"


def _interface(model: Model) -> dict[str, tuple[int, list[int | str]]]:
    ports = {}
    for port in (*model.proto.graph.input, *model.proto.graph.output):
        tensor = port.type.tensor_type
        shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in tensor.shape.dim]
        ports[str(port.name)] = tensor.elem_type, shape
    return ports


def _ports(spec: ModelSpec, model: Model) -> Iterator[str]:
    ports = _interface(model)
    due, heads = {"input_ids", "attention_mask", "logits"}, spec.attention
    for layer in range(len(spec.layers)):
        caches = {f"{side}.{layer}.{part}" for side in ("past_key_values", "present") for part in ("key", "value")}
        due |= caches
        for name in sorted(caches & ports.keys()):
            _, shape = ports[name]
            if len(shape) != 4 or (shape[1], shape[3]) != (heads.num_key_value_heads, heads.head_dim):
                yield f"{name} is {show(shape)}, should have {heads.num_key_value_heads} heads of {heads.head_dim}"
    for name in sorted(due - ports.keys()):
        yield f"has no input or output {name}"
    for name in sorted(ports.keys() - due - {KEEP}):
        yield f"has the input or output {show(name)}, which no reader feeds"


def _tensors(spec: ModelSpec, model: Model) -> Iterator[str]:
    try:
        found: dict[Tensor, Any] = dict(weights(model.path))
    except FileFormatError as error:
        yield str(error).removeprefix(f"{model.path}: ")
        return
    shapes = {tensor.name: tensor.shape for tensor in found}
    for tensor in spec.tensors():
        shape = shapes.pop(tensor.name, None)
        if shape != tensor.shape:
            there = "is missing" if shape is None else f"is {list(shape)}"
            yield f"tensor {tensor.name} {there}, {CONFIG} asks for {list(tensor.shape)}"
    if shapes:
        yield f"tensor {show(min(shapes))} is not part of the model ({len(shapes)} such)"


def _arrays(model: Model) -> Iterator[str]:
    places: dict[tuple[int, int], str] = {}
    for array in model.arrays.values():
        places[array.offset, array.offset + array.nbytes] = array.name
        if array.nbytes >= PAGE and array.offset % PAGE:
            yield f"{array.name} begins at {array.offset}, which is not a multiple of {PAGE}; it cannot be mapped"
    for (a, b), (c, d) in pairwise(sorted(places)):
        if c < b:
            yield f"{places[a, b]} and {places[c, d]} share bytes"

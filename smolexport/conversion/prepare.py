"""Before anything is written: find, read, check and plan.

Everything that can be refused is refused before the first weight is read; of a hub id, what the small files show
before the first weight is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolexport.conversion.converter import Converter
from smolexport.conversion.plan import Plan
from smolexport.conversion.portable import AUTO_BITS, decided
from smolexport.conversion.source_model import SourceModel, claimed_dtype
from smolexport.errors import CheckpointError, ConfigError, OutputError, UnsupportedError, UsageError
from smolexport.files import check_parent, check_target, refuse_own_source
from smolexport.model.checkpoint import (
    Checkpoint,
    claimed_quantization,
    find_checkpoint,
    open_checkpoint,
    read_config,
)
from smolexport.model.spec import ModelSpec
from smolexport.plugins import checked_options, converter, converters
from smolexport.recipe import Quantizer, Recipe
from smolexport.tokenizer import read_tokenizer

# Without weights nothing vouches for vocab_size, and a list of that length is built.  Known models stay below 2^19.
MAX_VOCABULARY = 1 << 22


@dataclass(frozen=True)
class Job:
    """An export that is ready to be written: nothing has been, and nothing is known to stand against it.

    `checkpoint` is None where `prepare` was told to leave the weights on the hub: a plan to look at, not to write.
    `quantizer` is that of all jobs that were prepared together; None for plain rounding.
    """

    converter: Converter
    checkpoint: Checkpoint | None
    plan: Plan
    path: Path
    quantizer: Quantizer | None = None


@dataclass(frozen=True)
class ExportRequest:
    """What `prepare` and `prepare_all` are asked for alike; see there."""

    source: str | Path
    quant: str | None
    name: str | None
    options: Mapping[str, Any]
    strict: bool
    ignore_config: Collection[str]
    revision: str | None
    token: str | None
    force: bool | None
    weights: bool
    calibration: Recipe | None


def prepare(
    target: str,
    source: str | Path,
    out: str | Path | None = None,
    *,
    quant: str | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    force: bool | None = None,
    weights: bool = True,
    calibration: Recipe | None = None,
) -> Job:
    """Read headers, check and plan; no weight is read and nothing is written.

    Args:
        target: format name, e.g. `gguf`.
        source: checkpoint folder, hub id, or `demo`.
        out: target path; a folder gets the default name inside it; None = default name in the current folder.
        quant: scheme name; None = the format's default.
        name: what the file calls the model; None = the checkpoint's own name.
        options: further options of the format; its converter's `OPTIONS` names them.
        strict: refuse when a tensor cannot get the format that the scheme asks for.
        ignore_config: keys of config.json that the caller vouches for as inert.
        revision: hub revision.
        token: hub token.
        force: an existing target may be replaced; None = leave it to `write` to look at the target.
        weights: False = the weights of a hub id stay there, unchecked, and the job cannot be written.
        calibration: how weights are quantized, e.g. a `smolexport.calibration.Calibration`; None = plain rounding.

    Raises:
        SmolexportError: anything that stands against this export.
    """
    request = ExportRequest(
        source, quant, name, options or {}, strict, ignore_config, revision, token, force, weights,
        calibration,
    )  # fmt: skip
    [job] = _prepare([target], request, lambda default, module: _path(out, default, module))
    return job


def prepare_all(
    source: str | Path,
    out: str | Path | None = None,
    *,
    targets: Collection[str] | None = None,
    quant: str | None = None,
    name: str | None = None,
    strict: bool = False,
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    force: bool | None = None,
    weights: bool = True,
    calibration: Recipe | None = None,
) -> list[Job]:
    """Prepare an export to several formats, which `write_all` does in one pass over the checkpoint.

    Args:
        source: as for `prepare`, like the arguments that are not named here.
        out: the folder that gets all outputs under their default names.
        targets: format names; None = every installed converter.
        quant: a scheme that all of them have; None = int4, or auto-bits under a budget.

    Raises:
        SmolexportError: anything that stands against one of the exports.
    """
    folder = Path(out) if out else Path()
    if weights:
        check_parent(folder)
    request = ExportRequest(
        source, quant or (None if calibration and calibration.chooses_bits else "int4"), name, {}, strict,
        ignore_config, revision, token, force, weights, calibration,
    )  # fmt: skip
    return _prepare(list(converters() if targets is None else targets), request, lambda default, _: folder / default)


def _prepare(targets: Sequence[str], request: ExportRequest, place: Callable[[str, Converter], Path]) -> list[Job]:
    if not targets or len(set(targets)) < len(targets):
        raise UsageError(f"formats {', '.join(targets) or 'none'}: name each format once, and at least one")
    modules = [converter(target) for target in targets]
    schemes = _schemes(modules, request)
    for module in modules:
        checked_options(module.plan, request.options, module.FORMAT, module.OPTIONS)
    source = request.source
    folder = find_checkpoint(source, revision=request.revision, token=request.token, weights=False)
    remote = source != "demo" and folder != Path(source)
    checkpoint = None if remote else open_checkpoint(folder, ignore_config=request.ignore_config)
    model = _model(request, folder, checkpoint)
    jobs = _jobs(zip(modules, schemes, strict=True), model, checkpoint, request, place)
    if not (remote and request.weights):
        return jobs
    whole = find_checkpoint(source, revision=request.revision, token=request.token)
    if whole != folder:
        raise CheckpointError(f"{source}: changed on the hub during the download; start the export again")
    checkpoint = open_checkpoint(whole, ignore_config=request.ignore_config)
    # now the weights can tell
    model = replace(
        model, spec=checkpoint.spec, notes=checkpoint.notes, dtype=claimed_dtype(model.config) or checkpoint.dtype
    )
    return _jobs(((job.converter, job.plan.scheme) for job in jobs), model, checkpoint, request, place)


def _schemes(modules: Sequence[Converter], request: ExportRequest) -> list[str]:
    """The scheme of each of `modules`; raises UsageError."""
    budget = request.calibration is not None and request.calibration.chooses_bits
    schemes = [
        module.find_scheme(request.quant or (AUTO_BITS if budget else module.DEFAULT)).name for module in modules
    ]
    if budget and schemes != [AUTO_BITS] * len(modules):
        raise UsageError(
            f"--quant {request.quant}: under a budget the bits are chosen; leave it out, or take {AUTO_BITS}"
        )
    if not budget:
        for name in schemes:
            if AUTO_BITS in name.split("+"):
                decided(None)
    return schemes


def _jobs(
    wanted: Iterable[tuple[Converter, str]],
    model: SourceModel,
    checkpoint: Checkpoint | None,
    request: ExportRequest,
    place: Callable[[str, Converter], Path],
) -> list[Job]:
    """A job for each converter and scheme."""
    wanted, recipe, quantizer, ending = list(wanted), request.calibration, None, ""
    if recipe:
        if recipe.chooses_bits and checkpoint is None and not request.weights:
            raise UsageError(f"{request.source}: a budget needs the weights here; download them and give their folder")
        quantizer, model = recipe.open(
            model, checkpoint, [module for module, _ in wanted], lambda module, m: _plan(module, m, AUTO_BITS, request)
        )
        ending = f"-{recipe.suffix}" if recipe.suffix else ""
    jobs = []
    for module, scheme in wanted:
        plan = _plan(module, model, scheme, request)
        path = place(f"{_file_name(model.name)}-{scheme}{ending}{module.SUFFIX}", module)
        if request.force is not None:
            check_output(module, path, plan, model.folder, request.force)
        jobs.append(Job(module, checkpoint, quantizer.apply(plan) if quantizer else plan, path, quantizer))
    return jobs


def check_output(module: Converter, path: Path, plan: Plan, source: Path, force: bool) -> None:
    """Refuse a target before the work; raises OutputError."""
    try:
        refuse_own_source(path, source, folder=module.FOLDER, ours=module.recognises)
    except OSError as error:  # a name that no file can have
        raise OutputError(f"{path}: {error.strerror or error}; give another name with -o") from error
    check_target(path, output_size(plan), force=force, replaceable=module.replaceable if module.FOLDER else None)


def output_size(plan: Plan) -> int:
    """Bytes of what `plan` writes, without its container's own."""
    return plan.nbytes + sum(companion.nbytes for companion in plan.companions)


def _model(request: ExportRequest, folder: Path, checkpoint: Checkpoint | None) -> SourceModel:
    """The small files, read; raises CheckpointError."""
    if checkpoint:
        config, spec = checkpoint.config, checkpoint.spec
    else:
        config, spec = _spec_alone(folder, request.ignore_config)
    return SourceModel(
        spec=spec,
        tokenizer=read_tokenizer(folder, spec.vocab_size),
        name=(request.name or _title(request.source, folder))
        .encode("utf-8", "replace")
        .decode(),  # bytes of a strange path
        folder=folder,
        config=config,
        dtype=claimed_dtype(config) or (checkpoint.dtype if checkpoint else "BF16"),
        origin=None if checkpoint else str(request.source),
        notes=checkpoint.notes if checkpoint else (),
    )


def _spec_alone(folder: Path, ignore_config: Collection[str]) -> tuple[Mapping[str, Any], ModelSpec]:
    """config.json and the spec where no headers bear it out yet."""
    config, spec = read_config(folder, ignore_config=ignore_config)
    if claim := claimed_quantization(config):
        raise ConfigError(
            f"{folder}: config.json: the weights are quantized already ({claim}); take the original, or, if they are "
            f"plain all the same, pass --ignore-config {claim.partition(':')[0]}"
        )
    if spec.vocab_size > MAX_VOCABULARY:
        raise ConfigError(
            f"{folder}: config.json: vocab_size {spec.vocab_size} is more than the {MAX_VOCABULARY} that are planned "
            "without weights; if it is right, download the checkpoint and give its folder"
        )
    return config, spec


def _plan(module: Converter, model: SourceModel, scheme: str, request: ExportRequest) -> Plan:
    """Check and plan; raises UnsupportedError and whatever the converter refuses."""
    reasons = module.check(model.spec)
    if reasons:
        raise UnsupportedError(f"{model.folder}: cannot be exported to {module.FORMAT}: {'; '.join(reasons)}")
    plan = module.plan(model, scheme, **request.options)
    plan = replace(plan, notes=(*model.notes, *plan.notes))
    if request.strict and plan.fallbacks:
        raise UnsupportedError(
            f"{model.folder}: --strict: {scheme} does not fit {len(plan.fallbacks)} tensors: "
            + "; ".join(plan.fallback_lines())
        )
    return plan


def _path(out: str | Path | None, default: str, module: Converter) -> Path:
    """The target: `out`, or `default` in the folder `out`, unless that is an earlier output of the converter."""
    if out is not None and not str(out):
        raise OutputError("-o: is empty; give a name")
    path = Path(out) if out is not None else Path()
    try:
        inside = path.is_dir() and not (module.FOLDER and out is not None and module.replaceable(path))
        return path / default if inside else path
    except OSError as error:  # a name that no file can have
        raise OutputError(f"{path}: {error.strerror or error}; give another name with -o") from error


def _title(source: str | Path, folder: Path) -> str:
    """The hub name, or the folder's own, without path."""
    title = folder.resolve().name if folder == Path(source) else str(source).rsplit("/", maxsplit=1)[-1]
    return title or "model"


def _file_name(title: str) -> str:
    """`title` as part of a file name: it may name no other folder."""
    return "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "-" for c in title)

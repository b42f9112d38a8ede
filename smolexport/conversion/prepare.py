"""Before anything is written: find, read, check and plan.

Everything that can be refused is refused before the first weight is read; of a hub id, what the small files show
before the first weight is downloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from smolexport.conversion.converter import Converter
from smolexport.conversion.plan import Plan
from smolexport.conversion.portable import AUTO_BITS, decided
from smolexport.conversion.source_model import SourceModel, claimed_dtype
from smolexport.errors import CheckpointError, ConfigError, OutputError, UnsupportedError, UsageError
from smolexport.files import check_parent, check_target, refuse_own_source
from smolexport.model import checkpoint as checkpoints
from smolexport.model.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from smolexport.model.spec import ModelSpec
from smolexport.plugins import checked_options, converter, converters
from smolexport.recipe import Quantizer, Recipe
from smolexport.tokenizer import read_tokenizer

# Without weights nothing confirms vocab_size, and a list of that length is built.  Known models stay below 2^19.
MAX_VOCABULARY = 1 << 22


@dataclass(frozen=True)
class Job:
    """A planned export: every check has passed and nothing has been written.

    Attributes:
        converter: of the format.
        checkpoint: the weights; None if `prepare` left them on the hub: a plan to look at, not to write.
        plan: what will be written.
        path: the target.
        quantizer: that of all jobs prepared together; None for plain rounding.
        force: what the target was checked with; None = not checked yet.
    """

    converter: Converter
    checkpoint: Checkpoint | None
    plan: Plan
    path: Path
    quantizer: Quantizer | None = None
    force: bool | None = None

    @property
    def replaceable(self) -> Callable[[Path], bool] | None:
        """For a folder: whether an existing one is an earlier output; None for a file."""
        return self.converter.replaceable if self.converter.FOLDER else None


class ExportKeywords(TypedDict, total=False):
    """The keywords that `prepare`, `prepare_all`, `export` and `export_all` share; see `ExportRequest`."""

    quant: str | None
    name: str | None
    options: Mapping[str, Any] | None
    strict: bool
    ignore_config: Collection[str]
    revision: str | None
    token: str | None
    force: bool | None
    weights: bool
    calibration: Recipe | None


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export, and how.

    Attributes:
        source: checkpoint folder, hub id, or `demo`.
        quant: scheme name; None = the format's default.  For several formats: a scheme that all of them have; None =
            int4, or auto-bits under a budget.
        name: what the file calls the model; None = the checkpoint's own name.
        options: further options of the format, by the names in its converter's `OPTIONS`.
        strict: refuse if a tensor cannot get the format that the scheme asks for.
        ignore_config: keys of config.json that the caller declares inert.
        revision: hub revision.
        token: hub token.
        force: replace an existing target; None = do not check the target yet, `write` does.
        weights: False = leave the weights of a hub id there, unchecked; the job cannot be written.
        calibration: how weights are quantized, e.g. a `smolexport.calibration.Calibration`; None = plain rounding.
    """

    source: str | Path
    quant: str | None = None
    name: str | None = None
    options: Mapping[str, Any] | None = None
    strict: bool = False
    ignore_config: Collection[str] = ()
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    force: bool | None = None
    weights: bool = True
    calibration: Recipe | None = None

    @property
    def chooses_bits(self) -> bool:
        """Whether the bits of each matrix are chosen under a budget."""
        return self.calibration is not None and self.calibration.chooses_bits


def prepare(target: str, source: str | Path, out: str | Path | None = None, **keywords: Unpack[ExportKeywords]) -> Job:
    """Read headers, check and plan; no weight is read and nothing is written.

    Args:
        target: format name, e.g. `gguf`.
        source: checkpoint folder, hub id, or `demo`.
        out: target path; a folder gets the default name inside it; None = default name in the current folder.
        **keywords: `quant`, `name`, `options`, `strict`, `ignore_config`, `revision`, `token`, `force`, `weights` and
            `calibration`, as in `ExportRequest`.

    Raises:
        SmolexportError: the export is not possible.
    """
    request = ExportRequest(source=source, **keywords)
    [job] = _prepare([target], request, lambda default, module: _path(out, default, module))
    return job


def prepare_all(
    source: str | Path,
    out: str | Path | None = None,
    *,
    targets: Collection[str] | None = None,
    **keywords: Unpack[ExportKeywords],
) -> list[Job]:
    """Prepare an export of `source` to several formats, which `write_all` does in one pass over the checkpoint.

    Args:
        source: as for `prepare`, like `keywords`.
        out: the folder that gets all outputs under their default names.
        targets: format names; None = every installed converter.
        **keywords: see `ExportRequest`.

    Raises:
        SmolexportError: one of the exports is not possible.
    """
    folder = Path(out) if out else Path()
    request = ExportRequest(source=source, **keywords)
    if request.weights:
        check_parent(folder)
    if not folder.is_dir():
        request = replace(request, force=None)  # nothing there that could be replaced
    if not (request.quant or request.chooses_bits):
        request = replace(request, quant="int4")
    return _prepare(list(converters() if targets is None else targets), request, lambda default, _: folder / default)


def _prepare(targets: Sequence[str], request: ExportRequest, place: Callable[[str, Converter], Path]) -> list[Job]:
    if not targets or len(set(targets)) < len(targets):
        raise UsageError(f"formats {', '.join(targets) or 'none'}: name each format once, and at least one")
    modules = [converter(target) for target in targets]
    schemes = _schemes(modules, request)
    for module in modules:
        checked_options(module.plan, request.options or {}, module.FORMAT, module.OPTIONS)
    source = request.source
    folder = find_checkpoint(source, revision=request.revision, token=request.token, weights=False)
    remote = source != "demo" and folder != Path(source)
    checkpoint = None if remote else open_checkpoint(folder, ignore_config=request.ignore_config)
    model = _model(request, folder, checkpoint)
    jobs = _jobs(modules, schemes, model, checkpoint, request, place)
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
    return _jobs(modules, schemes, model, checkpoint, request, place)


def _schemes(modules: Sequence[Converter], request: ExportRequest) -> list[str]:
    budget = request.chooses_bits
    schemes = [
        module.find_scheme(request.quant or (AUTO_BITS if budget else module.DEFAULT)).name for module in modules
    ]
    if budget and schemes != [AUTO_BITS] * len(modules):
        raise UsageError(f"--quant {request.quant}: a budget chooses the bits; omit it, or use {AUTO_BITS}")
    if not budget and any(AUTO_BITS in name.split("+") for name in schemes):
        decided(None)
    return schemes


def _jobs(
    modules: Sequence[Converter],
    schemes: Sequence[str],
    model: SourceModel,
    checkpoint: Checkpoint | None,
    request: ExportRequest,
    place: Callable[[str, Converter], Path],
) -> list[Job]:
    recipe, quantizer, ending = request.calibration, None, ""
    if recipe:
        if recipe.chooses_bits and checkpoint is None and not request.weights:
            raise UsageError(f"{request.source}: a budget needs the weights; download them and give their folder")
        quantizer, model = recipe.open(
            model, checkpoint, modules, lambda module, chosen: _plan(module, chosen, AUTO_BITS, request)
        )
        ending = f"-{recipe.suffix}" if recipe.suffix else ""
    jobs = []
    for module, scheme in zip(modules, schemes, strict=True):
        plan = _plan(module, model, scheme, request)
        path = place(f"{_file_name(model.name)}-{scheme}{ending}{module.SUFFIX}", module)
        plan = quantizer.apply(plan) if quantizer else plan
        jobs.append(Job(module, checkpoint, plan, path, quantizer, request.force))
    if request.force is not None:
        check_targets(jobs, model.folder, force=request.force)
    return jobs


def check_targets(jobs: Sequence[Job], source: Path, *, force: bool) -> None:
    """Refuse targets that exist without `force`, belong to the checkpoint in `source`, or do not fit on the disk."""
    sizes: Counter[Path] = Counter()
    for job in jobs:
        sizes[job.path.parent] += job.plan.size
    for job in jobs:
        module, path = job.converter, job.path
        try:
            refuse_own_source(path, source, folder=module.FOLDER, ours=module.recognises)
        except OSError as error:  # a name that no file can have
            raise OutputError(f"{path}: {error.strerror or error}; give another name with -o") from error
        check_target(path, sizes.pop(path.parent, 0), force=force, replaceable=job.replaceable)


def _model(request: ExportRequest, folder: Path, checkpoint: Checkpoint | None) -> SourceModel:
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
    """config.json and the spec, while no headers confirm it."""
    config, spec = checkpoints.read_config(folder, ignore_config=ignore_config)
    if claim := checkpoints.claimed_quantization(config):
        raise ConfigError(
            f"{folder}: config.json: the weights are quantized already ({claim}); use the original, or, if they are "
            f"plain after all, pass --ignore-config {claim.partition(':')[0]}"
        )
    if spec.vocab_size > MAX_VOCABULARY:
        raise ConfigError(
            f"{folder}: config.json: vocab_size {spec.vocab_size} is more than the limit of {MAX_VOCABULARY} "
            "without weights; if it is correct, download the checkpoint and give its folder"
        )
    return config, spec


def _plan(module: Converter, model: SourceModel, scheme: str, request: ExportRequest) -> Plan:
    """Check and plan; raises UnsupportedError and whatever the converter refuses."""
    reasons = module.check(model.spec)
    if reasons:
        raise UnsupportedError(f"{model.folder}: cannot be exported to {module.FORMAT}: {'; '.join(reasons)}")
    plan = module.plan(model, scheme, **request.options or {})
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
    title = folder.resolve().name if folder == Path(source) else str(source).rsplit("/", maxsplit=1)[-1]
    return title or "model"


def _file_name(title: str) -> str:
    """`title` as part of a file name: it may name no other folder."""
    return "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "-" for c in title)

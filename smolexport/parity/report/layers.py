"""The error of the weights, layer by layer, and of what lies outside of the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smolexport.parity.report.looks import WIDE, Look, Sheet, drawable, shorter
from smolexport.parity.report.svg import INKS, Chart, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layers"]


def layers(sheet: Sheet, looks: Sequence[Look]) -> Chart | None:
    """One line for all files of one fingerprint: their weights are the same."""
    shown = _groups(sheet, looks)
    if not shown:
        return None
    every = [error for _, errors, _ in shown for error in errors]
    # norms and biases stay floats: a tensor that no file changed tells nothing
    changed = (e["source"] for e in every if e["layer"] is None and drawable(e["relative"]))
    outside = list(dict.fromkeys(changed))

    def paint(figure: Figure) -> None:
        wide = [3.4, max(0.55 * len(outside), 0.7)] if outside else [1]
        plots = figure.subplots(1, len(wide), sharey=True, width_ratios=wide, squeeze=False)[0]
        for names, errors, look in shown:
            means = _by_layer(errors)
            # a line of several formats has no format's colour
            colour = look.colour if len(names) == 1 else INKS["floor"]
            label, style = "\n".join(names), {"color": colour, "marker": look.mark}
            plots[0].plot(
                list(means), [100 * mean for mean in means.values()],
                **style, linestyle=look.dashes, markersize=3.2, markeredgewidth=0, label=label,
            )  # fmt: skip
            for error in errors if outside else ():
                if error["source"] in outside and error["relative"] is not None:
                    spot = outside.index(error["source"])
                    plots[1].plot(spot, 100 * error["relative"], **style, markersize=6, markeredgewidth=0)
        plots[0].set(xlabel="layer", ylabel="relative error of the weights, %", ylim=(0, None))
        plots[0].xaxis.get_major_locator().set_params(integer=True)
        if outside:
            plots[1].set_xticks(range(len(outside)), [shorter(_stem(name), 16) for name in outside], rotation=20)
            plots[1].set_xlim(-0.6, len(outside) - 0.4)
        for axes in plots:
            axes.grid(True, axis="y")
        figure.legend(
            *plots[0].get_legend_handles_labels(), loc="outside right upper", handlelength=2.6, labelspacing=0.9
        )

    return draw(
        "layers", "Quantization error by layer",
        "Root of the summed squared differences between decoded and original weights, over the weights' own; "
        "files that hold the same weights share a line.",
        "Relative error of the weights by layer: " + "; ".join(
            f"{', '.join(names)} {100 * min(m):.2g} to {100 * max(m):.2g} %"
            for names, errors, _ in shown if (m := list(_by_layer(errors).values()))
        ) + ".",
        (WIDE, 3.3), paint,
    )  # fmt: skip


def _groups(sheet: Sheet, looks: Sequence[Look]) -> list[tuple[list[str], Sequence[Sheet], Look]]:
    """Names that share a fingerprint, with the errors of their weights and the first one's look."""
    shown: dict[str, tuple[list[str], Sequence[Sheet], Look]] = {}
    for place, (file, look) in enumerate(zip(sheet["candidates"], looks, strict=True)):
        if any(drawable(error["relative"]) for error in file["tensor_errors"]):
            mark = file["fingerprint"] or f"file {place}"
            shown.setdefault(mark, ([], file["tensor_errors"], look))[0].append(look.name)
    return list(shown.values())


def _by_layer(errors: Sequence[Sheet]) -> dict[int, float]:
    """Root mean square of the tensors' relative errors in each layer, each counted by its weights."""
    sums: dict[int, tuple[float, int]] = {}
    for error in errors:
        if error["layer"] is not None and error["relative"] is not None:
            total, weights = sums.get(error["layer"], (0.0, 0))
            sums[error["layer"]] = total + error["weights"] * error["relative"] ** 2, weights + error["weights"]
    return {layer: math.sqrt(total / weights) for layer, (total, weights) in sorted(sums.items()) if weights}


def _stem(source: str) -> str:
    """`embed_tokens` of `model.embed_tokens.weight`."""
    return source.removesuffix(".weight").rpartition(".")[2]

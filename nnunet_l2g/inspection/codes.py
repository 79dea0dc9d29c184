"""L2GNet's codebook on one image: which code each token takes, and how evenly the codes are used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnunet_l2g.inspection.case import Case
from nnunet_l2g.inspection.drawing import COLOURS, OTHER, Panel, coloured, draw_panels, save_figure
from nnunet_l2g.inspection.geometry import write_map
from nnunet_l2g.inspection.output import Output
from nnunet_l2g.inspection.view import View


def inspect_codes(case: Case, view: View, codes: np.ndarray, num_codes: int, prefix: str, output: Output) -> dict:
    """codes.nii.gz, codes.png and codes_usage.png.

    Parameters
    ----------
    codes : (*grid) int, the code of each voxel
    num_codes : K
    prefix : of file names, with several levels

    Returns
    -------
    codes (K), used, perplexity (exp of the entropy of the shares), shares (of voxels, by code)
    """
    shares = np.bincount(codes.ravel(), minlength=num_codes) / codes.size  # (K,)
    found = {
        "codes": num_codes,
        "used": int((shares > 0).sum()),
        "perplexity": round(perplexity(shares), 4),
        "shares": [round(float(share), 6) for share in shares],
    }
    order = np.argsort(-shares, kind="stable")
    colours = {int(code): colour for code, colour in zip(order, COLOURS, strict=False) if shares[code] > 0}
    on_image = view.original(codes.astype(np.int16) + np.int16(1))  # 0: cropped away
    write_map(on_image, case.properties, output.add(f"{prefix}codes.nii.gz", "code + 1 of each place; 0: cropped away"))
    _draw_map(case, view, on_image - 1, colours, found, output.add(f"{prefix}codes.png", "which code each place takes"))
    path = output.add(f"{prefix}codes_usage.png", "how often each code is taken, perplexity")
    _draw_usage(shares, order[: found["used"]], colours, found, path)
    return found


def perplexity(shares: np.ndarray) -> float:
    """exp of the entropy: the number of codes that, equally used, would be as diverse."""
    used = shares[shares > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def _draw_map(case: Case, view: View, codes: np.ndarray, colours: Mapping[int, str], found: dict, path) -> None:
    rare = {code: OTHER for code in range(found["codes"]) if code not in colours}
    rows = []
    for index in view.indices(3):
        image, name = view.image(index), view.slice_name(index)
        panels = [Panel(f"image, {name}" if name else "image", image)]
        shown = ("prediction", view.prediction) if case.reference is None else ("reference", case.reference)
        panels.append(Panel(shown[0], image, view.labels(shown[1], index)))
        panels.append(Panel("codes", image, coloured(view.plane(codes, index), {**colours, **rare}, 0.6)))
        rows.append(panels)
    legend = {f"{code} ({found['shares'][code]:.0%})": colour for code, colour in colours.items()}
    others = found["used"] - len(colours)
    if others > 0:
        legend[f"{others} other{'s' if others > 1 else ''}"] = OTHER
    caption = (
        f"The code nearest to each token of case {case.name}, drawn where the token lies: the {len(colours)} most used of "
        f"{found['used']} codes in colours, with their share of the image; numbers name codes and have no order."
    )
    draw_panels(rows, path, caption, {"labels": view.legend, "codes": legend}, view.aspect)


def _draw_usage(shares: np.ndarray, order: np.ndarray, colours: Mapping[int, str], found: dict, path) -> None:
    def draw(figure):
        axes = figure.add_subplot()
        axes.bar(range(len(order)), shares[order], color=[colours.get(int(code), OTHER) for code in order], edgecolor="0.3",
                 linewidth=0.4)  # fmt: skip
        axes.axhline(1 / len(shares), color="black", linestyle="--", linewidth=1, label=f"all {len(shares)} alike")
        step = max(1, -(-len(order) // 32))
        axes.set_xticks(range(0, len(order), step), [str(code) for code in order[::step]], rotation=90, fontsize=7)
        axes.set(xlabel="code, most used first", ylabel="share of the image's voxels", xlim=(-0.7, len(order) - 0.3))
        axes.legend(frameon=False)

    caption = (
        f"How often each of the {found['codes']} codes is taken in this image: {found['used']} are used, perplexity "
        f"{found['perplexity']:.1f}; bars have the colours of the map of codes."
    )
    save_figure(draw, (7.5, 3.2), path, caption)

"""Tables as text: for the terminal and as Markdown."""

from __future__ import annotations

import math

import pandas as pd

from nnunet_l2g.comparison.comparison import Comparison
from nnunet_l2g.comparison.tables import MEAN
from nnunet_l2g.evaluation.shifts import STRENGTHS, TITLES

TERMINAL = ("dice", "hd95", "nsd", "lesion_f1")  # the other scores are in the files
PAIRED = ("difference [95 % CI]", "p (Holm)", "w/t/l", "n")
COST = {
    "epochs": ("epochs", 0),
    "parameters": ("parameters [million]", 2),
    "seconds_per_epoch": ("s per epoch", 1),
    "gflops": ("GFLOPs per patch", 1),
    "memory_gib": ("training memory [GiB]", 2),
    "seconds_per_case": ("inference s per case", 2),
}


def score_rows(comparison: Comparison, name: str) -> list[list[str]]:
    """Head and rows for one score: mean ± sd of each method, and for each but the first its paired difference.

    Two methods stand side by side, one row a structure; of more, each has its own row.
    """
    score, methods = comparison.shown[name], comparison.methods
    summary = comparison.summary[comparison.summary["score"] == name].set_index(["method", "structure"])
    paired = comparison.paired[comparison.paired["score"] == name].set_index(["method", "structure"])

    def mean(method: str, structure: str) -> str:
        values = summary.loc[(method, structure)]
        spread = "" if structure == MEAN else f" ± {number(values['sd'], score.digits)}"
        return number(values["mean"], score.digits) + spread

    if len(methods) == 2:
        rows = [[score.label, *methods, *PAIRED]]
        for structure in comparison.rows:
            cells = _paired_cells(paired.loc[(methods[1], structure)], score.digits)
            rows.append([title(structure), *(mean(method, structure) for method in methods), *cells])
        return rows
    rows = [[score.label, "method", "mean", *PAIRED]]
    for structure in comparison.rows:
        for method in methods:
            first = method == methods[0]
            cells = [""] * len(PAIRED) if first else _paired_cells(paired.loc[(method, structure)], score.digits)
            rows.append([title(structure) if first else "", method, mean(method, structure), *cells])
    return rows


def cost_rows(comparison: Comparison) -> list[list[str]]:
    """Head and one row for each method; columns nobody knows are left out. No row at all if nothing is known."""
    known = [name for name in COST if name in comparison.cost and comparison.cost[name].notna().any()]
    if not known:
        return []
    rows = [["cost", *(COST[name][0] for name in known)]]
    for _, values in comparison.cost.iterrows():
        cells = [
            number(values[name] / 1e6 if name == "parameters" and known else values[name], COST[name][1]) for name in known
        ]
        rows.append([values["method"], *cells])
    return rows


def empty_rows(comparison: Comparison) -> list[list[str]]:
    """Structures that are absent from a reference, or missed altogether. No row if there is none."""
    rows = [["structure", "method", "absent in reference", "of these predicted", "missed altogether"]]
    for _, values in comparison.empty.iterrows():
        rows.append(
            [title(values["structure"]), values["method"], *(str(values[name]) for name in ("absent", "invented", "missed"))]
        )
    return rows if len(rows) > 1 else []


def lesion_rows(comparison: Comparison) -> list[list[str]]:
    """Lesion recall by size. No row if lesions were not scored."""
    table = comparison.lesion_sizes
    if table.empty:
        return []
    rows = [["lesion recall by size", "voxels", "lesions", *comparison.methods]]
    for (structure, low, high), group in table.groupby(["structure", "smallest", "largest"], sort=False):
        recall = group.set_index("method")["recall"]
        rows.append(
            [
                title(structure),
                f"{low} to {high}",
                str(group["lesions"].iloc[0]),
                *(number(recall[m], 3) for m in comparison.methods),
            ]
        )
    return rows


def shift_rows(comparison: Comparison) -> list[list[str]]:
    """Mean Dice on perturbed images, the unperturbed first. No row if there are none."""
    if comparison.shift is None:
        return []
    row = comparison.rows[-1]  # MEAN, or the only structure
    summary = comparison.summary[(comparison.summary["score"] == "dice") & (comparison.summary["structure"] == row)]
    plain = summary.set_index("method")["mean"]
    rows = [["perturbed images: Dice", "strength", *comparison.methods]]
    rows.append(["none", "", *(number(plain[method], 3) for method in comparison.methods)])
    for (kind, strength), group in comparison.shift.groupby(["kind", "strength"], sort=False):
        dice = group.set_index("method")["dice"]
        rows.append([kind, f"{strength:g}", *(number(dice[method], 3) for method in comparison.methods)])
    return rows


def without_rows(comparison: Comparison) -> list[list[str]]:
    """What each trained network loses without its method. No row if that was not asked for."""
    if comparison.without is None:
        return []
    rows = [["Dice without the method", "run", "structure", "with", "without", "lost [95 %, over cases]", "cases"]]
    for values in comparison.without.itertuples():
        lost = f"{values.lost:+.3f} [{values.low:+.3f}, {values.high:+.3f}]"
        dice = [number(values.dice, 3), number(values.without, 3)]
        rows.append([values.method, str(values.run), title(values.structure), *dice, lost, str(values.cases)])
    others = [method for method in comparison.methods if method not in set(comparison.without["method"])]
    return [*rows, *([method, "", "nothing to leave out", "", "", "", ""] for method in others)]


def extra_rows(comparison: Comparison) -> dict[str, list[list[str]]]:
    """All tables but the scores', by heading; only those that have rows."""
    tables = {
        "Empty structures": empty_rows(comparison),
        "Lesion recall by size": lesion_rows(comparison),
        "Perturbed images": shift_rows(comparison),
        "Without the method": without_rows(comparison),
        "Cost": cost_rows(comparison),
    }
    return {head: rows for head, rows in tables.items() if rows}


def terminal(comparison: Comparison) -> str:
    """The main scores, the cost and the warnings."""
    parts = [_aligned(score_rows(comparison, name)) for name in TERMINAL if name in comparison.shown]
    parts += [_aligned(rows) for rows in extra_rows(comparison).values()]
    parts += [f"WARNING: {text}" for text in comparison.warnings]
    return "\n\n".join(parts)


def markdown(comparison: Comparison) -> str:
    """The whole report for a paper's appendix; a test reads its tables."""
    parts = [f"# {heading(comparison)}", "", sentence(comparison), ""]
    if comparison.warnings:
        parts += ["## Warnings", "", *(f"- {text}" for text in comparison.warnings), ""]
    for name in comparison.shown:
        parts += [f"## {comparison.shown[name].label}", "", markdown_table(score_rows(comparison, name)), ""]
    for head, rows in extra_rows(comparison).items():
        parts += [f"## {head}", "", markdown_table(rows), ""]
    parts += ["## How", "", *(f"- {line}" for line in method_lines(comparison)), ""]
    return "\n".join(parts)


def heading(comparison: Comparison) -> str:
    """The methods against the baseline."""
    return f"{' and '.join(comparison.methods[1:])} against {comparison.methods[0]}"


def sentence(comparison: Comparison) -> str:
    """What is compared, in one sentence."""
    folds = comparison.inputs.folds
    where = f"validation cases of fold{'s' if len(folds) > 1 else ''} {', '.join(folds)}" if folds else "cases"
    others, count = " and ".join(comparison.methods[1:]), len(comparison.inputs.cases)
    return f"{others} compared with {comparison.methods[0]}, the baseline, on {count} {where}, paired by case."


def method_lines(comparison: Comparison) -> list[str]:
    """How the numbers were computed."""
    unit = "px" if comparison.inputs.labels.pixels else "mm"
    lines = [
        'Cells are mean ± standard deviation over cases; the row "mean foreground" is the mean of the structures\' means.',
        f"Difference: method minus baseline, mean over the n cases where both are defined; percentile bootstrap over cases, "
        f'{comparison.resamples} resamples, seed {comparison.seed}. The row "mean foreground" averages, in each case, the '
        "structures defined for both.",
        "p: two-sided Wilcoxon signed-rank test, Holm's correction over the structures of one score; the row "
        '"mean foreground" is one test and is not corrected. No correction over scores or methods.',
        "w/t/l: cases won, tied, lost; n: cases.",
        "Structure absent from reference and prediction: undefined, left out. Absent from one of them only: overlap and "
        "surface Dice 0, distances the image's diagonal.",
        "HD95: the larger of the two directed 95th percentiles; ASSD: mean over both surfaces; NSD: normalised surface Dice "
        f"at a tolerance of {comparison.options.tolerance:g} {unit}.",
    ]
    if comparison.options.lesions:
        overlap = comparison.options.lesion_overlap
        lines.append(
            "Lesions: connected components, corners connect; a lesion is detected if one predicted component shares "
            f"{f'at least {overlap:g} of it' if overlap else 'a voxel'} with it; a predicted component is right if it shares a "
            f"voxel with a lesion; components below {comparison.options.lesion_min_size} voxels are left out."
        )
    if comparison.inputs.labels.ignore is not None:
        lines.append(f"Voxels with the ignore label ({comparison.inputs.labels.ignore}) are left out everywhere.")
    if "parameters" in comparison.cost and comparison.cost["parameters"].notna().any():
        lines.append(
            "Parameters: all floating-point numbers in the network's state, buffers included. Seconds per epoch: median over "
            "epochs, on whatever machine each training ran; compare them only if it was the same one."
        )
    if "gflops" in comparison.cost:
        lines.append(
            "Measured: FLOPs of one forward of a patch (a multiply-add counts two); inference: sliding window over one case "
            "with the checkpoint's mirroring, without reading and resampling; memory: the allocator's peak in a training step."
        )
    if comparison.shift is not None:
        lines.append(
            "Perturbed images: each validation image changed, predicted again and scored; mean foreground Dice as above. "
            + "; ".join(f"{TITLES[kind]} {', '.join(f'{value:g}' for value in STRENGTHS[kind])}" for kind in STRENGTHS)
            + "."
        )
    if comparison.without is not None:
        lines.append(
            "Without the method: each trained network predicts the validation cases again with its encoder and decoder alone. "
            "Difference with Student's t interval over cases, of this trained network; another training may differ."
        )
    versions = ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
    return [*lines, f"Command: `{comparison.command}`", f"Versions: {versions}"]


def markdown_table(rows: list[list[str]]) -> str:
    head, *body = [["\\|".join(cell.split("|")) for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(structure: str) -> str:
    return "mean foreground" if structure == MEAN else structure.replace("_", " ")


def number(value: object, digits: int) -> str:
    """A number with so many digits, "-" for None and NaN."""
    if value is None or pd.isna(value):
        return "-"
    return f"{value:.{digits}f}"


def p_text(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _paired_cells(values: pd.Series, digits: int) -> list[str]:
    interval = "" if math.isnan(values["low"]) else f" [{values['low']:+.{digits}f}, {values['high']:+.{digits}f}]"
    difference = "-" if math.isnan(values["difference"]) else f"{values['difference']:+.{digits}f}{interval}"
    record = f"{values['wins']}/{values['ties']}/{values['losses']}"
    return [difference, p_text(values["p_holm"]), record, str(values["n"])]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    )

"""The report's tables as text: one model of them for page, Markdown and terminal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from nnunet_l2g.compare.comparison import Comparison
from nnunet_l2g.compare.ensemble import area_under_risk_coverage
from nnunet_l2g.compare.statistics import MOST_RUNS
from nnunet_l2g.compare.tables import MEAN

WORST = 3  # cases of the ranking that are shown; failures.csv has all
MAIN = ("dice", "hd95", "nsd", "lesion_f1")  # the page folds the other scores away, the terminal leaves them out
COST = {
    "epochs": ("epochs", 0),
    "parameters": ("parameters [million]", 2),
    "seconds_per_epoch": ("s per epoch", 1),
    "gflops": ("GFLOPs per patch", 1),
    "memory_gib": ("training memory [GiB]", 2),
    "seconds_per_case": ("inference s per case", 2),
}


@dataclass(frozen=True)
class Table:
    """head : above it; rows : of cells, the first row names the columns; main : whether it is shown at once"""

    head: str
    rows: list[list[str]]
    main: bool = True


def tables(comparison: Comparison) -> list[Table]:
    """Every table that has rows, in the report's order."""
    several = any(len(method.runs) > 1 for method in comparison.inputs.methods)
    found = []
    for name, score in comparison.shown.items():
        found.append(Table(score.label, score_rows(comparison, name), name in MAIN))
        if several:
            found.append(Table(f"{score.label}, run by run", run_rows(comparison, name), name == "dice"))
    extra = {
        "Empty structures": empty_rows(comparison),
        "Lesion recall by size": lesion_rows(comparison),
        "Perturbed images": shift_rows(comparison),
        "Without the method": without_rows(comparison),
        "Where runs disagree": failure_rows(comparison),
        "Cost": cost_rows(comparison),
    }
    return [*found, *(Table(head, rows) for head, rows in extra.items() if rows)]


def score_rows(comparison: Comparison, name: str) -> list[list[str]]:
    """Head and rows for one score: mean ± sd of each method, and for each but the first its paired difference.

    Two methods stand side by side, one row a structure; of more, each has its own row.
    """
    score, methods = comparison.shown[name], comparison.methods
    summary = comparison.summary[comparison.summary["score"] == name].set_index(["method", "structure"])
    paired = comparison.paired[comparison.paired["score"] == name].set_index(["method", "structure"])
    known = bool(comparison.paired["p"].notna().any())
    columns = list(_paired_cells(paired.iloc[0], score.digits, known))

    def mean(method: str, structure: str) -> str:
        values = summary.loc[(method, structure)]
        spread = "" if structure == MEAN else f" ± {number(values['sd'], score.digits)}"
        return number(values["mean"], score.digits) + spread

    def cells(method: str, structure: str) -> list[str]:
        if method == methods[0]:
            return [""] * len(columns)
        return list(_paired_cells(paired.loc[(method, structure)], score.digits, known).values())

    if len(methods) == 2:
        rows = [[score.label, *methods, *columns]]
        for structure in comparison.rows:
            rows.append([title(structure), *(mean(method, structure) for method in methods), *cells(methods[1], structure)])
        return rows
    rows = [[score.label, "method", "mean", *columns]]
    for structure in comparison.rows:
        for method in methods:
            first = title(structure) if method == methods[0] else ""
            rows.append([first, method, mean(method, structure), *cells(method, structure)])
    return rows


def run_rows(comparison: Comparison, name: str) -> list[list[str]]:
    """Head and rows for one score: the mean of every run, and the standard deviation between runs."""
    score, methods = comparison.shown[name], comparison.trained
    runs = comparison.runs[comparison.runs["score"] == name]
    paired = comparison.paired[comparison.paired["score"] == name].set_index(["method", "structure"])
    most = int(runs["run"].max())
    rows = [[score.label, "method", *(f"run {run}" for run in range(1, most + 1)), "SD between runs"]]
    for structure in comparison.rows:
        for method in methods:
            against = methods[1] if method == methods[0] else method  # the baseline's runs, on the cases of the first pair
            means = runs[(runs["structure"] == structure) & (runs["method"] == against) & (runs["of"] == method)]["mean"]
            spread = paired.loc[(against, structure)]["baseline_" * (method == methods[0]) + "sd_between_runs"]
            cells = [number(value, score.digits) for value in means] + [""] * (most - len(means))
            cells.append("0" if spread == 0 else number(spread, score.digits + 1))
            rows.append([title(structure) if method == methods[0] else "", method, *cells])
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
            [title(values["structure"]), values["method"], *(f"{values[name]:g}" for name in ("absent", "invented", "missed"))]
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
    methods = list(comparison.shift["method"].unique())
    rows = [["perturbed images: Dice", "strength", *methods]]
    rows.append(["none", "", *(number(plain[method], 3) for method in methods)])
    for (kind, strength), group in comparison.shift.groupby(["kind", "strength"], sort=False):
        dice = group.set_index("method")["dice"]
        rows.append([kind, f"{strength:g}", *(number(dice[method], 3) for method in methods)])
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
    others = [method for method in comparison.trained if method not in set(comparison.without["method"])]
    return [*rows, *([method, "", "nothing to leave out", "", "", "", ""] for method in others)]


def failure_rows(comparison: Comparison) -> list[list[str]]:
    """How well the disagreement of runs ranks cases, and the first of the ranking. No row without ensembles."""
    if comparison.failures is None:
        return []
    rows = [["method", "AURC", "best possible", "random order", "most disagreement: case (disagreement, Dice)"]]
    for method, table in comparison.failures.groupby("method", sort=False):
        scored = table.dropna()
        risk, disagreement = 1 - scored["dice"].to_numpy(), scored["disagreement"].to_numpy()
        areas = [area_under_risk_coverage(order, risk) for order in (disagreement, risk)] + [
            risk.mean() if risk.size else np.nan
        ]
        worst = [f"{row.case} ({row.disagreement:.3f}, {number(row.dice, 3)})" for row in table.head(WORST).itertuples()]
        rows.append([method, *(number(area, 4) for area in areas), "; ".join(worst)])
    return rows


def title(structure: str) -> str:
    return "mean foreground" if structure == MEAN else structure.replace("_", " ")


def number(value: object, digits: int) -> str:
    """A number with so many digits, "-" for None and NaN."""
    if value is None or pd.isna(value):
        return "-"
    return f"{value:.{digits}f}"


def p_text(p: float, sign: str = "") -> str:
    if np.isnan(p):
        return "-"
    return f"{sign.replace('=', '<') or '<'}0.001" if p < 0.001 else f"{sign}{p:.3f}"


def _paired_cells(values: pd.Series, digits: int, known: bool) -> dict[str, str]:
    """By column; what nobody can know of single runs has none."""
    record = {"w/t/l": f"{values['wins']}/{values['ties']}/{values['losses']}", "n": str(values["n"])}
    difference = "-" if np.isnan(values["difference"]) else f"{values['difference']:+.{digits}f}"
    if not known:
        return {"difference": difference} | record
    interval = "" if np.isnan(values["low"]) else f" [{values['low']:+.{digits}f}, {values['high']:+.{digits}f}]"
    needed = values["runs_needed"]
    runs = "-" if np.isnan(needed) else f"> {MOST_RUNS}" if np.isinf(needed) else f"{needed:.0f}"
    cells = {"difference [95 % CI]": difference + interval, "p (Holm)": p_text(values["p_holm"])}
    return cells | {"detectable": number(values["detectable"], digits), "runs needed": runs} | record

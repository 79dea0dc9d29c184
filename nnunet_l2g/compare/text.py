"""What the report says: findings in sentences, how numbers were made, and the tables as text.

A `Table` is the one model of a table. The page, Markdown and the terminal show the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pandas as pd

from nnunet_l2g import __version__
from nnunet_l2g.compare.statistics import FOLDS, MOST_RUNS
from nnunet_l2g.compare.tables import MEAN, Comparison
from nnunet_l2g.evaluation.shifts import TITLES

MAIN = ("dice", "hd95", "nsd", "lesion_f1")  # the page folds the other scores away, the terminal leaves them out
HEADS = {
    "dice": "Dice",
    "parameters": "parameters [million]",
    "gflops": "GFLOPs per patch",
    "memory_gib": "training memory [GiB]",
    "absent": "absent in reference",
    "invented": "of these predicted",
    "missed": "missed altogether",
    "low": "95 % interval from",
    "high": "to",
}  # of columns whose name is not enough
NOTES = (
    "Cells are mean ± standard deviation over cases, each case the mean of its runs. The row mean foreground is the mean of "
    "the structures' means.",
    "Difference: method minus baseline, over the n cases that are defined in every run of both. The row mean foreground "
    "averages the defined structures of each case. w/t/l: cases won, tied and lost.",
    f"Interval and p: Student's t. The variance counts runs, cases and their interaction, and folds where there are {FOLDS} "
    "or more; degrees of freedom by Welch and Satterthwaite. p has Holm's correction over the structures of one score. Mean "
    "foreground is one test and is not corrected. Nothing is corrected over scores or methods. Folds share training data, and "
    "cases of one patient are not independent: intervals can be too narrow for either reason.",
    "SD between runs: of mean scores, without the noise of the cases; 0 if this noise explains all. Detectable: the difference "
    "that such runs and cases show with 80 % power. Runs needed: of each method, for the difference seen.",
    "A structure that reference and prediction both lack is undefined and left out. If one of them lacks it, overlap and "
    "surface Dice are 0, and distances are the image's diagonal. docs/evaluation.md of nnunet_l2g defines every number.",
)


@dataclass(frozen=True)
class Table:
    """One table of the report. `frame` holds text; `main` says whether it is shown at once."""

    title: str
    frame: pd.DataFrame
    main: bool = True

    def html(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return self.frame.to_html(index=False, border=0)

    def markdown(self) -> str:
        """Padded, so that it can be read on the terminal too."""
        cells = [list(map(str, self.frame.columns)), *self.frame.to_numpy().tolist()]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def describe(comparison: Comparison) -> str:
    """What is compared, in one sentence: runs, cases, folds."""
    methods, folds = [method for method in comparison.inputs.methods if not method.ensemble], comparison.inputs.folds
    counts = [len(method.runs) for method in methods]
    runs = f"{_count(counts[0], 'run')} of each"
    if len(set(counts)) > 1:
        runs = " and ".join(f"{_count(len(method.runs), 'run')} of {method.name}" for method in methods)
    where = f", validation cases of fold{'s' if len(folds) > 1 else ''} {', '.join(folds)}" if folds else ""
    others, cases = " and ".join(comparison.trained[1:]), _count(len(comparison.inputs.cases), "case")
    return f"{others} compared with {methods[0].name}, the baseline: {runs}, {cases}{where}."


def findings(comparison: Comparison) -> list[str]:
    """For each method the main difference, or why nothing can be said of the methods."""
    paired = comparison.main_row(comparison.paired)
    score = "Mean foreground Dice" if MEAN in comparison.rows else f"Dice of {structure_title(comparison.rows[0])}"
    return [_finding(row, score, comparison) for _, row in paired.iterrows() if row["method"] in comparison.trained]


def _finding(row: pd.Series, score: str, comparison: Comparison) -> str:
    method, baseline = row["method"], row["baseline"]
    if row["n"] == 0:
        return f"{score}: no case has it in all runs of {method} and {baseline}."
    higher = "higher" if row["difference"] > 0 else "lower"
    text = f"{score} of {method} is {abs(row['difference']):.3f} {higher} than that of {baseline}"
    single = [name for name, runs in ((baseline, row["baseline_runs"]), (method, row["runs"])) if runs == 1]
    spreads = {baseline: row["baseline_sd_between_runs"], method: row["sd_between_runs"]}
    known = [
        f"{sd:.4f} for {name}" if sd else f"not above the noise of the cases for {name}"
        for name, sd in spreads.items()
        if not np.isnan(sd)
    ]
    spread = f" Standard deviation between runs: {', '.join(known)}." if known else ""
    more = f" For more runs: {comparison.more_runs}."
    if np.isnan(row["p"]) and not single:
        return f"{text} in {_count(row['n'], 'case')}: too few for p and interval."
    if np.isnan(row["p"]):
        return (
            f"{text}. This holds for these two models and says nothing of the methods: two runs of one method differ too. With "
            f"one run of {' and '.join(single)} and fewer than {FOLDS} folds there is no p and no interval.{spread}{more}"
        )
    text += (
        f" (95 % interval {row['low']:+.3f} to {row['high']:+.3f}, {p_text(row['p'], 'p = ')}).{spread} These runs and cases "
        f"would show a difference of {row['detectable']:.3f} with 80 % power."
    )
    if single:
        return f"{text} How many runs would show the difference seen is not known from one run.{more}"
    if np.isinf(row["runs_needed"]):
        return f"{text} To show a difference of the size seen takes more cases, or more than {MOST_RUNS} runs of each."
    if np.isnan(row["runs_needed"]):
        return text
    return f"{text} A difference of the size seen takes {row['runs_needed']:.0f} runs of each."


def make_notes(comparison: Comparison) -> list[str]:
    """How the numbers were computed."""
    labels, options = comparison.inputs.labels, comparison.options
    unit = "px" if labels.pixels else "mm"
    notes = [*NOTES, f"NSD: normalised surface Dice at a tolerance of {options.tolerance:g} {unit}, counting surface voxels."]
    if options.lesions:
        overlap = f"at least {options.lesion_overlap:g} of it" if options.lesion_overlap else "a voxel"
        notes.append(
            f"A lesion is detected if one predicted component shares {overlap} with it; a component is correct if it shares a "
            f"voxel with a lesion; components below {options.lesion_min_size} voxels are left out."
        )
    if labels.ignore is not None:
        notes.append(f"Voxels with the ignore label ({labels.ignore}) are left out everywhere.")
    if "failures" in comparison.extra:
        notes.append("Disagreement of a case: 1 - mean Dice between pairs of runs; failures.csv ranks all cases by it.")
    shown = ", ".join(f"{name} {number}" for name, number in versions().items())
    return [*notes, f"Command: {comparison.command}", f"Versions: {shown}"]


def make_tables(comparison: Comparison) -> list[Table]:
    """Every table that has rows, in the report's order."""
    tables = [Table(score.label, score_table(comparison, name), name in MAIN) for name, score in comparison.shown.items()]
    cost = comparison.cost.dropna(axis="columns", how="all")
    if "parameters" in cost:
        cost = cost.assign(parameters=cost["parameters"].astype(float) / 1e6)
    extra = {
        "Empty structures": comparison.empty,
        "Dice on perturbed images": shift_table(comparison),
        "Dice without the method": comparison.extra.get("without", pd.DataFrame()),
        "Where runs disagree": failure_table(comparison),
        "Cost": cost if cost.shape[1] > 1 else pd.DataFrame(),
    }
    return [*tables, *(Table(title, as_text(frame)) for title, frame in extra.items() if not frame.empty)]


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with heads and cells as the report shows them."""
    text = pd.DataFrame({name: [cell(value) for value in frame[name]] for name in frame})
    if "structure" in text:
        text["structure"] = text["structure"].map(structure_title)
    return text.rename(columns=lambda name: HEADS.get(name, name.replace("_", " ")))


def cell(value: object) -> str:
    """Numbers with four significant digits, "-" for None and NaN."""
    if pd.isna(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def score_table(comparison: Comparison, name: str) -> pd.DataFrame:
    """One row for each structure and method: mean ± SD, and for each method but the first its paired difference."""
    score, methods = comparison.shown[name], comparison.methods
    summary = comparison.summary[comparison.summary["score"] == name].set_index(["structure", "method"])
    paired = comparison.paired[comparison.paired["score"] == name].set_index(["structure", "method"])
    rows = []
    for structure in comparison.rows:
        for method in methods:
            baseline, values = method == methods[0], summary.loc[(structure, method)]
            pair = paired.loc[(structure, methods[1] if baseline else method)]
            spread = "" if structure == MEAN else f" ± {number(values['sd'], score.digits)}"
            row = {
                "structure": structure_title(structure) if baseline else "",
                "method": method,
                "mean ± SD": number(values["mean"], score.digits) + spread,
            }
            if comparison.several_runs:
                row["SD between runs"] = number(pair["baseline_" * baseline + "sd_between_runs"], score.digits + 1)
            rows.append(row if baseline else row | _difference_cells(pair, score.digits, comparison.paired["p"].notna().any()))
    frame = pd.DataFrame(rows).fillna("")
    return frame.loc[:, ~frame.isin(["", "-"]).all()]  # without columns in which nothing is known


def _difference_cells(pair: pd.Series, digits: int, with_interval: bool) -> dict[str, str]:
    difference = "-" if np.isnan(pair["difference"]) else f"{pair['difference']:+.{digits}f}"
    counts = {"w/t/l": f"{pair['wins']}/{pair['ties']}/{pair['losses']}", "n": str(pair["n"])}
    if not with_interval:
        return {"difference": difference} | counts
    interval = "" if np.isnan(pair["low"]) else f" [{pair['low']:+.{digits}f}, {pair['high']:+.{digits}f}]"
    cells = {"difference [95 % CI]": difference + interval, "p (Holm)": p_text(pair["p_holm"])}
    needed = f"> {MOST_RUNS}" if np.isinf(pair["runs_needed"]) else number(pair["runs_needed"], 0)
    return cells | {"detectable": number(pair["detectable"], digits), "runs needed": needed} | counts


def shift_table(comparison: Comparison) -> pd.DataFrame:
    """Mean Dice on perturbed images, the unperturbed first; one column a method."""
    shift = comparison.extra.get("shift", pd.DataFrame())
    if shift.empty:
        return shift
    plain = comparison.main_row(comparison.summary).rename(columns={"mean": "dice"}).assign(kind="none", strength=0.0)
    both = pd.concat([plain[plain["method"].isin(shift["method"])], shift.replace({"kind": TITLES})])
    return both.pivot_table("dice", ["kind", "strength"], "method", sort=False).reset_index()


def failure_table(comparison: Comparison) -> pd.DataFrame:
    """The cases in which the runs of a method disagree most."""
    failures = comparison.extra.get("failures", pd.DataFrame())
    return failures if failures.empty else failures.groupby("method", sort=False).head(3)


def structure_title(structure: str) -> str:
    return "mean foreground" if structure == MEAN else structure.replace("_", " ")


def number(value: float | None, digits: int) -> str:
    """A number with so many digits, "-" for None and NaN."""
    return "-" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def p_text(p: float, prefix: str = "") -> str:
    if np.isnan(p):
        return "-"
    return f"{prefix.replace('=', '<') or '<'}0.001" if p < 0.001 else f"{prefix}{p:.3f}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def versions() -> dict[str, str]:
    names = ("nnunetv2", "torch", "SimpleITK", "numpy", "scipy")
    return {"nnunet_l2g": __version__} | {name: version(name) for name in names}

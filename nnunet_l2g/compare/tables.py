"""The tables of a comparison: scores of cases, means of methods, paired differences to the baseline, cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from nnunet_l2g.compare.fairness import score_warnings
from nnunet_l2g.compare.results import Inputs
from nnunet_l2g.compare.statistics import EQUAL, compare_runs, holm, run_variance
from nnunet_l2g.evaluation.cases import Options, score_pairs, with_unit
from nnunet_l2g.evaluation.scores import Score, shown_scores

MEAN = "mean"  # the row of the mean over structures
Scores = dict[tuple[str, int, str], dict[str, dict]]  # (method, run, case): {structure: {score: value}}


@dataclass
class Comparison:
    """Everything that a report shows.

    command, more_runs : the command that was run, and how to add runs
    shown : the scores by name
    cases, summary, paired, runs, empty, cost : made by the functions of this module, which describe their columns
    extra : tables that were asked for, by name: shift, without, failures
    """

    inputs: Inputs
    options: Options
    command: str
    more_runs: str
    shown: dict[str, Score]
    cases: pd.DataFrame
    summary: pd.DataFrame
    paired: pd.DataFrame
    runs: pd.DataFrame
    empty: pd.DataFrame
    cost: pd.DataFrame
    warnings: list[str]
    extra: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return [method.name for method in self.inputs.methods]

    @property
    def trained(self) -> list[str]:
        """The methods without their ensembles."""
        return [method.name for method in self.inputs.methods if not method.ensemble]

    @property
    def several_runs(self) -> bool:
        return any(len(method.runs) > 1 for method in self.inputs.methods)

    @property
    def rows(self) -> list[str]:
        """The structures, and MEAN if there are several."""
        names = self.inputs.labels.names
        return [*names, MEAN] if len(names) > 1 else names

    def main_row(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows of `summary`, `paired` or `runs` with the mean foreground Dice, or with Dice of the only structure."""
        return table[(table["score"] == "dice") & (table["structure"] == self.rows[-1])]


def compare(inputs: Inputs, options: Options, processes: int, command: str, more_runs: str) -> Comparison:
    """Scores all cases and computes all tables. UserError for files that cannot be compared."""
    inputs.labels, of_spacing = with_unit(inputs.labels, inputs.pairs())
    scores, of_headers = score_pairs(inputs.pairs(), inputs.labels, options, processes)
    shown = shown_scores(options.lesions, inputs.labels.pixels)
    cases = case_table(inputs, scores)
    paired, runs = paired_tables(cases, shown)
    return Comparison(
        inputs=inputs,
        options=options,
        command=command,
        more_runs=more_runs,
        shown=shown,
        cases=cases,
        summary=summary_table(cases, shown),
        paired=paired,
        runs=runs,
        empty=empty_table(cases),
        cost=cost_table(inputs),
        warnings=[*of_headers, *of_spacing, *inputs.warnings, *score_warnings(inputs, scores), *dropped_warnings(paired)],
    )


def dropped_warnings(paired: pd.DataFrame) -> list[str]:
    """Cases that count in means and in no difference."""
    return [
        f"{row.structure}: {row.dropped} cases are left out of the difference between {row.method} and {row.baseline}: their "
        "references lack the structure, and only some runs predicted it there."
        for row in paired[(paired["score"] == "dice") & (paired["dropped"] > 0)].itertuples()
    ]


def case_table(inputs: Inputs, scores: Scores) -> pd.DataFrame:
    """One row for each method, run, case and structure: method, run, fold, case, structure, TP, FP, FN and every score."""
    rows = []
    for method in inputs.methods:
        for number, run in enumerate(method.runs, 1):
            for case in inputs.cases:
                place = {"method": method.name, "run": number, "fold": run.folds.get(case, ""), "case": case}
                for structure, values in scores[method.name, number, case].items():
                    rows.append({**place, "structure": structure, **values})
    return pd.DataFrame(rows)


def summary_table(cases: pd.DataFrame, shown: dict[str, Score]) -> pd.DataFrame:
    """Columns method, structure, score, n (cases where it is defined), mean, sd, median: over cases, each the mean of its runs.

    The row MEAN is the mean over structures of the means over cases, as nnU-Net's foreground_mean; it has no n, sd and median.
    A structure without any defined case is left out of it.
    """
    of_cases = cases.groupby(["method", "structure", "case"], sort=False)[list(shown)].mean().reset_index()
    long = of_cases.melt(["method", "structure", "case"], list(shown), "score")
    grouped = long.groupby(["method", "structure", "score"], sort=False)["value"]
    summary = grouped.agg(n="count", mean="mean", sd="std", median="median").reset_index()
    if cases["structure"].nunique() == 1:
        return summary
    means = summary.groupby(["method", "score"], sort=False)["mean"].mean().reset_index()
    return pd.concat([summary, means.assign(structure=MEAN)], ignore_index=True)


def paired_tables(cases: pd.DataFrame, shown: dict[str, Score]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every other method against the first, by structure and score: `paired_row`, with Holm's correction over structures.

    The row MEAN compares the mean over those structures of a case that are defined in all runs of both methods. It is one test,
    and its p is not corrected. The second table has the mean of every run over the same cases: method, baseline, structure,
    score, of (the method of the run), run, mean.
    """
    baseline, *others = dict.fromkeys(cases["method"])
    structures = list(dict.fromkeys(cases["structure"]))
    folds = cases.groupby("case")["fold"].first().to_numpy()  # (n,), cases sorted
    paired, runs = [], []
    for method in others:
        both = cases[cases["method"].isin([baseline, method])]
        for name, score in shown.items():
            wide = both.pivot(index=["method", "run", "case"], columns="structure", values=name)[structures]
            if len(structures) > 1:
                defined = wide.notna().groupby("case").transform("all")
                wide[MEAN] = wide[structures].where(defined).mean(axis=1)
            rows = []
            for structure in wide:
                values = wide[structure].unstack("case")  # (method and run, n)
                row, means = paired_row(*(values.loc[side].to_numpy() for side in (baseline, method)), folds, score)
                key = {"method": method, "baseline": baseline, "structure": structure, "score": name}
                rows.append(key | row)
                for side, of_runs in zip((baseline, method), means, strict=True):
                    runs += [{**key, "of": side, "run": run, "mean": mean} for run, mean in enumerate(of_runs, 1)]
            corrected = holm([row["p"] for row in rows[: len(structures)]])
            paired += [row | {"p_holm": p} for row, p in zip(rows, [*corrected, rows[-1]["p"]], strict=False)]
    return pd.DataFrame(paired), pd.DataFrame(runs)


def paired_row(baseline: np.ndarray, method: np.ndarray, folds: np.ndarray, score: Score) -> tuple[dict, tuple]:
    """Method minus baseline over the n cases that are defined in every run of both, and the means of their runs (R,).

    Parameters
    ----------
    baseline, method : (R, n), NaN where undefined
    folds : (n,)

    Returns
    -------
    n, dropped (cases that are defined in some runs only), runs, baseline_runs, folds; baseline_mean, method_mean, difference,
    low, high, p; sd_between_runs, baseline_sd_between_runs; detectable, runs_needed; wins, ties, losses in cases
    """
    undefined = np.isnan(np.concatenate([baseline, method]))  # (R + R, n)
    kept = ~undefined.any(0)
    row = {"n": int(kept.sum()), "dropped": int((~kept & ~undefined.all(0)).sum())}
    baseline, method, folds = baseline[:, kept], method[:, kept], folds[kept]
    row |= {"runs": len(method), "baseline_runs": len(baseline), "folds": len(set(folds))}
    names = ("baseline_mean", "method_mean", "difference", "low", "high", "p")
    row |= dict.fromkeys((*names, "sd_between_runs", "baseline_sd_between_runs", "detectable", "runs_needed"), np.nan)
    if row["n"] == 0:
        nothing = np.full(len(baseline), np.nan), np.full(len(method), np.nan)
        return row | {"wins": 0, "ties": 0, "losses": 0}, nothing
    effect = compare_runs(baseline, method, folds)
    means = baseline.mean(1), method.mean(1)
    found = {"baseline_mean": means[0].mean(), "method_mean": means[1].mean(), "difference": effect.difference, "p": effect.p}
    found |= {"low": effect.difference - effect.half_width, "high": effect.difference + effect.half_width}
    for name, side in (("sd_between_runs", method), ("baseline_sd_between_runs", baseline)):
        found[name] = np.sqrt(np.maximum(run_variance(side, folds), 0))
    found |= {"detectable": effect.detectable, "runs_needed": effect.runs_needed()}
    change = (method.mean(0) - baseline.mean(0)) * (1 if score.higher_is_better else -1)  # (n,)
    wins, losses = int((change > EQUAL).sum()), int((change < -EQUAL).sum())
    row |= {name: float(value) for name, value in found.items()}
    return row | {"wins": wins, "ties": row["n"] - wins - losses, "losses": losses}, means


def empty_table(cases: pd.DataFrame) -> pd.DataFrame:
    """Columns structure, method, absent (cases without it in the reference), invented (predicted in these), missed (cases with
    it in the reference and not in the prediction): means over runs. Structures that are never absent nor missed are left out.
    """
    absent, nothing = cases["TP"] + cases["FN"] == 0, cases["TP"] + cases["FP"] == 0
    flags = cases[["structure", "method", "run"]].assign(absent=absent, invented=absent & ~nothing, missed=~absent & nothing)
    of_runs = flags.groupby(["structure", "method", "run"], sort=False).sum()
    table = of_runs.groupby(["structure", "method"], sort=False).mean().reset_index()
    shown = table.groupby("structure")[["absent", "missed"]].transform("sum").sum(axis=1) > 0
    return table[shown].reset_index(drop=True)


def cost_table(inputs: Inputs) -> pd.DataFrame:
    """Columns method, epochs, parameters, seconds_per_epoch (median over runs and folds of medians), from the checkpoints."""
    rows = []
    for method in (method for method in inputs.methods if not method.ensemble):
        seconds = [curve.seconds_per_epoch for run in method.runs for curve in run.curves.values() if curve.seconds]
        epochs = [number for run in method.runs for number in run.epochs.values()]
        row = {"method": method.name, "epochs": max(epochs, default=None), "parameters": method.runs[0].parameters}
        rows.append(row | {"seconds_per_epoch": np.median(seconds) if seconds else None})
    return pd.DataFrame(rows)

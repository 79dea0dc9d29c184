"""The report's sentences: what is compared, what the runs say, how the numbers were made."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nnunet_l2g.compare.comparison import Comparison
from nnunet_l2g.compare.statistics import FOLDS, MOST_RUNS
from nnunet_l2g.compare.tables import MEAN
from nnunet_l2g.compare.text import p_text, title
from nnunet_l2g.evaluation.shifts import STRENGTHS, TITLES


def heading(comparison: Comparison) -> str:
    """The methods against the baseline."""
    return f"{' and '.join(comparison.trained[1:])} against {comparison.trained[0]}"


def sentence(comparison: Comparison) -> str:
    """What is compared, in one sentence: runs, folds, cases."""
    methods, folds = [m for m in comparison.inputs.methods if not m.ensemble], comparison.inputs.folds
    counts = [len(method.runs) for method in methods]
    if len(set(counts)) == 1:
        runs = f"{_count(counts[0], 'run')} of each"
    else:
        runs = " and ".join(f"{_count(n, 'run')} of {m.name}" for n, m in zip(counts, methods, strict=True))
    where = f", validation cases of fold{'s' if len(folds) > 1 else ''} {', '.join(folds)}" if folds else ""
    others, cases = " and ".join(comparison.trained[1:]), len(comparison.inputs.cases)
    return f"{others} compared with {methods[0].name}, the baseline: {runs}, {_count(cases, 'case')}{where}."


def findings(comparison: Comparison) -> list[str]:
    """For each method what its runs say: the main difference, or why nothing can be said of the methods."""
    row = comparison.rows[-1]  # MEAN, or the only structure
    paired = comparison.paired[(comparison.paired["score"] == "dice") & (comparison.paired["structure"] == row)]
    score = "Mean foreground Dice" if row == MEAN else f"Dice of {title(row)}"
    return [_finding(values, score, comparison) for _, values in paired.iterrows() if values["method"] in comparison.trained]


def _finding(values: pd.Series, score: str, comparison: Comparison) -> str:
    method, baseline, size = values["method"], values["baseline"], abs(values["difference"])
    than = f"{size:.3f} {'higher' if values['difference'] > 0 else 'lower'} than"
    spreads = {baseline: values["baseline_sd_between_runs"], method: values["sd_between_runs"]}
    shown = {name: f"{spread:.4f}" if spread else "none beyond the noise of the cases" for name, spread in spreads.items()}
    known = [f"{shown[name]} for {name}" for name, spread in spreads.items() if not np.isnan(spread)]
    spread = f" Standard deviation between runs: {' and '.join(known)}." if known else ""
    if np.isnan(values["difference"]):
        return f"{score}: no case has it in all runs of {method} and {baseline}."
    if not np.isnan(values["p"]):
        return (
            f"{score} of {method} is {than} that of {baseline} (95 % interval {values['low']:+.3f} to {values['high']:+.3f}, "
            f"{p_text(values['p'], 'p = ')}).{spread} These runs and cases would show a difference of "
            f"{values['detectable']:.3f} with 80 % power.{_advice(values, comparison)}"
        )
    single = [name for name, runs in ((baseline, values["baseline_runs"]), (method, values["runs"])) if runs == 1]
    if not single:  # one case
        return f"{score} of {method} is {than} that of {baseline} in {_count(values['n'], 'case')}: too few for p and interval."
    return (
        f"{score} of {method} is {than} that of {baseline}. This holds for these two models and says nothing of the methods: "
        f"two runs of one method differ too. With one run of {' and '.join(single)} and fewer than {FOLDS} folds there is no p "
        f"and no interval.{spread} For more runs: `{comparison.more_runs}`"
    )


def _advice(values: pd.Series, comparison: Comparison) -> str:
    needed, single = values["runs_needed"], min(values["runs"], values["baseline_runs"]) == 1
    if single:
        return (
            f" How many runs would show the difference seen is not known from one run. For more runs: `{comparison.more_runs}`"
        )
    if np.isinf(needed):
        return f" More cases, or more than {MOST_RUNS} runs of each, would be needed to show a difference of the size seen."
    return "" if np.isnan(needed) else f" A difference of the size seen takes {needed:.0f} runs of each."


def method_lines(comparison: Comparison) -> list[str]:
    """How the numbers were computed."""
    unit = "px" if comparison.inputs.labels.pixels else "mm"
    lines = [
        'Cells are mean ± standard deviation over cases, each case the mean of its runs; the row "mean foreground" is the mean '
        "of the structures' means.",
        'Difference: method minus baseline, over the n cases that are defined in every run of both; the row "mean '
        'foreground" averages, in each case, the structures that are.',
        "Interval and p: Student's t. The variance counts runs, cases and their interaction, and folds where there are "
        f"{FOLDS} or more; degrees of freedom by Welch and Satterthwaite. One run and fewer than {FOLDS} folds: none. Holm's "
        'correction over the structures of one score; the row "mean foreground" is one test and is not corrected. No '
        "correction over scores or methods.",
        "SD between runs: of mean scores, without what chance in the cases adds to it; 0 if that explains all. Detectable: the "
        "difference that such runs and cases show with 80 % power. Runs needed: of each method, for the difference seen.",
        "Folds share training data, and cases of one patient are not independent: intervals can be too narrow for either.",
        "w/t/l: cases won, tied, lost by the means over runs; n: cases.",
        "Structure absent from reference and prediction: undefined, left out. Absent from one of them only: overlap and "
        "surface Dice 0, distances the image's diagonal.",
        "HD95: the larger of the two directed 95th percentiles; ASSD: mean over both surfaces; NSD: normalised surface Dice "
        f"at a tolerance of {comparison.options.tolerance:g} {unit}, counting surface voxels.",
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
    if comparison.failures is not None:
        lines.append(
            "Ensemble: mean of the runs' probabilities, or their majority vote; one ensemble is one run. Disagreement of a "
            "case: 1 - mean Dice between pairs of runs. AURC: area under the risk-coverage curve, the mean of 1 - Dice over "
            "the cases of least disagreement, averaged over their number. failures.csv ranks all cases; "
            "ensemble/*/disagreement has maps of the percentage of runs that differ from the ensemble."
        )
    if comparison.without is not None:
        lines.append(
            "Without the method: each trained network predicts the validation cases again with its encoder and decoder alone. "
            "Difference with Student's t interval over cases, of this trained network; another training may differ."
        )
    versions = ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
    return [*lines, f"Command: `{comparison.command}`", f"Versions: {versions}"]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

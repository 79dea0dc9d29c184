r"""Do two training methods differ? Runs of each method on the same cases, in one or several folds.

A run is one training with its own random numbers. Every run predicts the same cases. Runs are therefore nested in methods and
crossed with cases: a split-plot design. Radiology analyses several readers and several cases in the same way [1]_.

Model
-----
The score of method m, run r, fold f and case c (a case belongs to one fold) is::

    y = mean_m + case_c + run_mrf + (method x case)_mc + noise_mrc

Runs, cases and noise are random and independent. run_mrf is drawn anew in every fold, because every fold is a training of its
own. The variance of run_mrf may differ between the methods.

Estimate
--------
R_m is the number of runs of method m, n the number of cases in F folds, n_f the number of cases in fold f, and w_f = n_f / n.
d_c is the difference of the methods' means over runs in case c, D_f the mean of d_c in fold f, and D the mean of all d_c::

    v_cases = sum_f sum_c (d_c - D_f)^2 / (n - F) / n                              n - F degrees of freedom
    v_runs  = sum_m v_m,  v_m = sum_f w_f^2 var_r(mean_c y_mrf) / R_m              degrees of freedom below
    v_both  = sum_m MS_m / (R_m n),  MS_m the mean square of run x case within method m and fold
    v       = max(v_cases + v_runs - v_both, v_cases, v_runs)

v_cases and v_runs both contain the noise, so v_both takes it off once. The expectation of v_cases + v_runs - v_both is the
variance of D. The maximum keeps the estimate away from zero, where a difference of mean squares is unreliable [2]_. The
degrees of freedom are those of Welch and Satterthwaite [3]_::

    df = v^2 / (v_cases^2 / (n - F) + sum_m v_m^2 / (k (R_m - 1))),   k = (sum_f w_f^2)^2 / sum_f w_f^4

With three folds or more, the differences of the folds are replications too::

    v_folds = sum_f w_f^2 (D_f - D)^2 / (1 - w_f)                                  F - 1 degrees of freedom

With one run of a method, v = v_folds: Student's t over folds, on D_f of unequal weight. With several runs of each method, the
excess x = max(v_folds - v, 0) is attributed to the training set, on which the difference of the methods may depend. It is added
to v, and x^2 / (F - 1) is added to the denominator of df.

The interval is D -+ t_df sqrt(v), and p comes from t_df. With one run of a method and fewer than three folds, v is unknown, and
interval and p are NaN.

Spread between runs: var_r(mean_c y_mrf) - MS_m / n_f, averaged over folds, is an unbiased estimate of the variance of run_mrf.
Its square root is reported, or 0 for a negative estimate. It is the spread of mean scores over infinitely many cases.

Assumptions
-----------
Cases are independent; several files of one patient are not. Means over cases and runs are roughly normal. Folds share most of
their training data, so their differences are positively correlated, and v_folds is too small for other training data [4]_.

tests/compare/test_statistics.py simulates equal methods. Where the model holds, at most 0.06 of them are called different, or
0.08 with two runs. Where the training set moves the difference as much as a run does, three to five folds with several runs
call up to 0.12 different.

References
----------
.. [1] Obuchowski, Rockette: Hypothesis testing of diagnostic accuracy for multiple readers and multiple tests. Communications
   in Statistics: Simulation and Computation 24 (1995).
.. [2] Hillis: A marginal-mean ANOVA approach for analyzing multireader multicase radiological imaging data. Statistics in
   Medicine 33 (2014). Readers nested in tests are our runs.
.. [3] Satterthwaite: An approximate distribution of estimates of variance components. Biometrics Bulletin 2 (1946); Welch: The
   generalization of Student's problem when several different population variances are involved. Biometrika 34 (1947).
.. [4] Nadeau, Bengio: Inference for the generalization error. Machine Learning 52 (2003).
.. [5] Holm: A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

CONFIDENCE, POWER = 0.95, 0.8
FOLDS = 3  # the least number of folds whose differences give a variance
MOST_RUNS = 99  # the search for the number of runs needed ends here
EQUAL = 1e-9  # smaller differences are ties: they come from rounding


@dataclass(frozen=True)
class Effect:
    """Method minus baseline. Each array has the batch shape of the scores, with NaN where a value is unknown.

    difference : D of the module's docstring
    variance, df : of D, and its degrees of freedom
    v_cases, excess : parts of the variance
    fixed : the part of v_cases that more runs do not reduce; it comes from method x case
    run_share : sum_m v_m^2 / (k (R_m - 1)), the runs' part of the denominator of df
    runs : of baseline and method
    cases, folds : n, F
    """

    difference: np.ndarray
    variance: np.ndarray
    df: np.ndarray
    v_cases: np.ndarray
    excess: np.ndarray
    fixed: np.ndarray
    run_share: np.ndarray
    runs: tuple[int, int]
    cases: int
    folds: int

    @property
    def half_width(self) -> np.ndarray:
        """Half the width of the 95 % interval."""
        return np.where(self.variance > 0, stdtrit(self.df, (1 + CONFIDENCE) / 2), 1) * np.sqrt(self.variance)

    @property
    def p(self) -> np.ndarray:
        """Two-sided p-value of no difference."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.difference == 0, 0, -np.abs(self.difference) / np.sqrt(self.variance))
        return np.where(np.isnan(self.variance), np.nan, np.where(self.variance > 0, 2 * stdtr(self.df, t), t == 0))

    @property
    def detectable(self) -> np.ndarray:
        """The true difference that such runs and cases call significant with a power of 80 %."""
        return _detectable(self.variance, self.df)

    def runs_needed(self) -> float:
        """Runs of each method, up to MOST_RUNS, with which the difference seen would be detectable. For a batch of shape ().

        The part of the variance that is neither fixed nor excess is proportional to 1 / runs. The result is infinity if more
        runs or more cases are needed, and NaN if the spread between runs is unknown.
        """
        if np.isnan(self.variance) or min(self.runs) == 1 or self.difference == 0:
            return float("nan")
        runs = np.arange(2, MOST_RUNS + 1)  # (98,)
        now = 2 / sum(1 / number for number in self.runs)  # harmonic mean
        scale, stays = now / runs, self.fixed + self.excess
        variance = stays + (self.variance - stays) * scale
        shares = (self.fixed + (self.v_cases - self.fixed) * scale) ** 2 / (self.cases - self.folds)
        shares = shares + self.run_share * scale**2 * (now - 1) / (runs - 1) + self.excess**2 / max(self.folds - 1, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            enough = runs[_detectable(variance, variance**2 / shares) <= abs(self.difference)]
        return float(enough[0]) if enough.size else float("inf")


def compare_runs(baseline: np.ndarray, method: np.ndarray, folds: Sequence[int] | None = None) -> Effect:
    """The difference of two methods with its variance, by the equations of the module's docstring.

    Parameters
    ----------
    baseline, method : (..., R, n), the same cases in the same order, without NaN; R may differ
    folds : (n,), the fold of each case; None for one fold

    Raises
    ------
    ValueError : the numbers of cases differ
    """
    baseline, method = np.asarray(baseline, float), np.asarray(method, float)
    n = baseline.shape[-1]
    fold_of = np.zeros(n, int) if folds is None else np.unique(folds, return_inverse=True)[1]  # (n,)
    if method.shape[-1] != n or fold_of.size != n:
        raise ValueError(
            f"baseline {baseline.shape}, method {method.shape}, {fold_of.size} folds: expected the same cases in each"
        )
    sizes = np.bincount(fold_of)  # (F,)
    count, weights = sizes.size, sizes / max(n, 1)
    cases_df = n - count
    runs = baseline.shape[-2], method.shape[-2]
    k = (weights**2).sum() ** 2 / (weights**4).sum() if n else 1.0

    differences = method.mean(-2) - baseline.mean(-2)  # (..., n)
    differences = np.where(np.abs(differences) < EQUAL, 0.0, differences)
    of_folds = _fold_means(differences, fold_of)  # (..., F)
    difference = (weights * of_folds).sum(-1)
    unknown = np.full_like(difference, np.nan)
    v_folds = unknown
    if count >= FOLDS:
        v_folds = ((weights * (of_folds - difference[..., None])) ** 2 / (1 - weights)).sum(-1)
    if min(runs) == 1 or cases_df == 0:
        return Effect(difference, v_folds, np.full_like(difference, max(count - 1, 1)), *[unknown] * 4, runs, n, count)

    v_cases = ((differences - of_folds[..., fold_of]) ** 2).sum(-1) / cases_df / n
    v_method, v_both = [], 0
    for scores, number in zip((baseline, method), runs, strict=True):
        means, interaction = _between_runs(scores, fold_of)
        v_method.append((weights**2 * means).sum(-1) / number)
        v_both = v_both + interaction / (number * n)
    v_runs = sum(v_method)
    variance = np.maximum(v_cases + v_runs - v_both, np.maximum(v_cases, v_runs))
    excess = np.fmax(v_folds - variance, 0)
    run_share = sum(v**2 / (k * (number - 1)) for v, number in zip(v_method, runs, strict=True))
    shares = v_cases**2 / cases_df + run_share + excess**2 / max(count - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (variance + excess) ** 2 / shares
    fixed = np.maximum(v_cases - v_both, 0)
    return Effect(difference, variance + excess, df, v_cases, excess, fixed, run_share, runs, n, count)


def run_variance(scores: np.ndarray, folds: Sequence[int] | None = None) -> np.ndarray:
    """Unbiased estimate of the variance between runs. It can be negative by chance, and is NaN for one run.

    scores : (..., R, n), without NaN; folds : (n,) or None
    """
    scores = np.asarray(scores, float)
    fold_of = np.zeros(scores.shape[-1], int) if folds is None else np.unique(folds, return_inverse=True)[1]
    sizes = np.bincount(fold_of)
    if scores.shape[-2] == 1 or sizes.sum() == sizes.size:
        return np.full(scores.shape[:-2], np.nan)
    means, interaction = _between_runs(scores, fold_of)
    return (means - interaction[..., None] / sizes).mean(-1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction [5]_: p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)), m the number of values without NaN."""
    values = np.asarray(p_values, float)
    corrected = np.full(values.shape, np.nan)
    count = np.count_nonzero(~np.isnan(values))
    order = np.argsort(values)[:count]  # NaN are sorted to the end
    corrected[order] = np.minimum(np.maximum.accumulate((count - np.arange(count)) * values[order]), 1)
    return corrected.tolist()


def _detectable(variance: np.ndarray, df: np.ndarray) -> np.ndarray:
    """From the noncentral t distribution: the noncentrality with POWER, times the standard error."""
    noncentrality = nctdtrinc(df, 1 - POWER, stdtrit(df, (1 + CONFIDENCE) / 2))
    return np.where(variance == 0, 0, noncentrality * np.sqrt(variance))


def _fold_means(values: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """(..., n) -> (..., F)"""
    return np.stack([values[..., fold_of == fold].mean(-1) for fold in range(fold_of.max(initial=-1) + 1)], -1)


def _between_runs(scores: np.ndarray, fold_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The variance of the runs' means in each fold (..., F), and the mean square of run x case (...), of scores (..., R, n)."""
    means = _fold_means(scores, fold_of)  # (..., R, F)
    rest = scores - means[..., fold_of]
    rest = rest - rest.mean(-2, keepdims=True)  # (..., R, n): neither run nor case explains it
    degrees = (scores.shape[-2] - 1) * (scores.shape[-1] - means.shape[-1])
    return means.var(-2, ddof=1), (rest**2).sum((-2, -1)) / degrees

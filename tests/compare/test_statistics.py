"""Runs, cases and folds: simulation under the null, scipy's tests and a mixed model of statsmodels where they say the same."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_l2g.compare.statistics import compare_runs, holm, run_variance

P_VALUES = st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=8)
NOISE, DRAWS = 0.03, 4000
SPREADS = [(0, 0), (0.002, 0.01), (0.01, 0), (0.01, 0.02), (0.06, 0.02)]  # SD of runs, of method x case


def simulate(generator, runs, cases, folds=1, spreads=((0.01, 0.01),), draws=DRAWS, noise=NOISE):
    """For each of `spreads` two equal methods, (draws, R, n) each, and the fold of each case."""
    fold_of = np.arange(cases) % folds
    case = generator.normal(0, 0.05, (draws, 1, cases))
    parts = [
        (
            generator.standard_normal((draws, number, folds))[..., fold_of],
            generator.standard_normal((draws, 1, cases)),
            case + noise * generator.standard_normal((draws, number, cases)),
        )
        for number in runs
    ]
    for run_sd, method_sd in spreads:
        yield *(run_sd * run + method_sd * both + rest for run, both, rest in parts), fold_of


@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize("runs", [(2, 2), (3, 3), (5, 5), (2, 5)])
def test_equal_methods_are_seldom_called_different_and_the_interval_covers(runs, folds):
    generator = np.random.default_rng(0)
    bound = 0.08 if min(runs) == 2 else 0.06
    for cases in (6, 20, 100):
        for spread, (*scores, fold_of) in zip(SPREADS, simulate(generator, runs, cases, folds, SPREADS), strict=True):
            effect = compare_runs(*scores, fold_of)
            assert np.mean(effect.p < 0.05) <= bound, (cases, spread)
            assert np.mean(np.abs(effect.difference) <= effect.half_width) >= 1 - bound, (cases, spread)
    assert np.mean(effect.p < 0.05) > 0.02  # runs far apart: not conservative without end


@pytest.mark.parametrize(("runs", "folds"), [(3, 3), (5, 3), (5, 5)])
def test_training_sets_that_move_the_difference_as_much_as_runs_do(runs, folds):
    """Not in the model: the excess of the folds keeps it from 0.2 to 0.5."""
    generator = np.random.default_rng(11)
    for baseline, method, fold_of in simulate(generator, (runs, runs), 50, folds):
        of_folds = generator.normal(0, 0.01 * np.sqrt(2), (DRAWS, 1, folds))[..., fold_of]
        assert np.mean(compare_runs(baseline, method + of_folds, fold_of).p < 0.05) <= 0.12


@pytest.mark.parametrize("cases", [6, 20, 100])
def test_one_run_in_each_of_five_folds(cases):
    generator = np.random.default_rng(1)
    for *scores, fold_of in simulate(generator, (1, 1), cases, 5, SPREADS, draws=8000):
        assert 0.03 < np.mean(compare_runs(*scores, fold_of).p < 0.05) <= 0.06


@pytest.mark.parametrize(("runs", "cases", "folds"), [(2, 6, 1), (3, 52, 1), (5, 20, 5)])
def test_the_spread_between_runs_is_estimated_without_bias(runs, cases, folds):
    generator = np.random.default_rng(2)
    for (sd, _), (scores, _, fold_of) in zip(SPREADS, simulate(generator, (runs, 1), cases, folds, SPREADS), strict=True):
        estimates = run_variance(scores, fold_of)
        assert abs(estimates.mean() - sd**2) < 4 * estimates.std() / np.sqrt(DRAWS)


def test_two_runs_of_plain_nnunet_differ_and_say_nothing_of_methods():
    path = Path(__file__).parents[2] / "benchmarks" / "search_hippocampus_2d_cpu.json"
    first, second = json.loads(path.read_text())["rows"][:2]
    assert first["trainer"] == second["trainer"]
    scores = [np.array([[np.mean(list(case["dice"].values())) for case in run["cases"].values()]]) for run in (first, second)]
    assert stats.ttest_rel(scores[0][0], scores[1][0]).pvalue < 1e-6  # what a test over cases would have said
    effect = compare_runs(*scores)
    assert effect.difference == pytest.approx(-0.0133, abs=1e-4)
    assert np.isnan([effect.p, effect.half_width, effect.detectable, effect.runs_needed()]).all()


def test_the_detectable_difference_is_detected_as_often_as_it_says():
    """With the true variance known from one simulation, the effect `detectable` of it is found in 80 % of another."""
    generator = np.random.default_rng(4)
    ((baseline, method, fold_of),) = simulate(generator, (5, 5), 60)
    effect = compare_runs(baseline, method, fold_of)
    true_variance = 2 * (0.01**2 / 5 + 0.01**2 / 60 + NOISE**2 / 300)
    assert effect.variance.mean() == pytest.approx(true_variance, rel=0.05)
    size = np.mean(effect.detectable / np.sqrt(effect.variance)) * np.sqrt(true_variance)
    assert 0.76 < np.mean(compare_runs(baseline, method + size, fold_of).p < 0.05) < 0.86


@pytest.mark.parametrize(("runs", "folds"), [(2, 1), (3, 1), (4, 5)])
def test_runs_needed_are_those_there_are_where_the_difference_is_the_detectable_one(runs, folds):
    generator = np.random.default_rng(5)
    ((baseline, method, fold_of),) = simulate(generator, (runs, runs), 60, folds, spreads=[(0.02, 0.01)], draws=1)
    level = compare_runs(baseline[0], method[0], fold_of)

    def needed(size):
        return compare_runs(baseline[0], method[0] - level.difference + size * level.detectable, fold_of).runs_needed()

    assert needed(1.001) == runs < needed(0.99) <= needed(0.5) and needed(1e-4) == np.inf


def test_equal_cases_of_all_runs_leave_nothing_to_more_runs():
    one, other = np.random.default_rng(6).normal(0, 1, (2, 15))
    effect = compare_runs(np.tile(one, (3, 1)), np.tile(other, (3, 1)))
    assert abs(effect.difference) < effect.detectable and effect.runs_needed() == np.inf  # more cases are needed


# known answers


def test_welchs_t_where_only_runs_vary():
    generator = np.random.default_rng(6)
    first, second = generator.normal(0, 1, 3), generator.normal(1, 3, 4)
    case = generator.normal(0, 1, 9)
    effect = compare_runs(first[:, None] + case, second[:, None] + case)
    assert effect.p == pytest.approx(stats.ttest_ind(first, second, equal_var=False).pvalue)
    for runs in (first, second):
        assert run_variance(runs[:, None] + case) == pytest.approx(runs.var(ddof=1))


def test_paired_t_over_cases_where_all_runs_are_alike_and_over_folds_with_one_run():
    generator = np.random.default_rng(7)
    first, second = generator.normal(0, 1, (2, 15))
    expected = stats.ttest_rel(second, first)
    effect = compare_runs(np.tile(first, (3, 1)), np.tile(second, (2, 1)))
    assert effect.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval()
    assert effect.half_width == pytest.approx((high - low) / 2) and effect.difference == pytest.approx((high + low) / 2)
    folds = np.repeat(["0", "1", "4"], 5)
    of_folds = (second - first).reshape(3, 5).mean(1)
    assert compare_runs(first[None], second[None], folds).p == pytest.approx(stats.ttest_1samp(of_folds, 0).pvalue)


def test_a_mixed_model_says_the_same():
    """REML of y ~ method with random cases, method x case and runs; equal to mean squares in a balanced design."""
    formula = pytest.importorskip("statsmodels.formula.api")
    import pandas as pd

    generator = np.random.default_rng(8)
    ((baseline, method, _),) = simulate(generator, (3, 3), 8, spreads=[(0.06, 0.05)], draws=1)
    y = np.stack([baseline[0], method[0] + 0.05])  # (2, 3, 8)
    index = np.indices(y.shape).reshape(3, -1)
    table = pd.DataFrame({"y": 100 * y.ravel(), "method": index[0], "run": index[0] * 3 + index[1], "case": index[2]})
    table["pair"] = table["case"] * 2 + table["method"]
    parts = {name: f"0 + C({name})" for name in ("case", "pair", "run")}
    fit = formula.mixedlm("y ~ method", table, groups=np.ones(len(table)), vc_formula=parts, re_formula="0").fit()
    effect = compare_runs(*y)
    components = dict(zip(sorted(parts), fit.vcomp, strict=True))
    assert min(components.values()) > 0.1  # none is cut off at 0
    assert 100 * effect.difference == pytest.approx(fit.params["method"], rel=1e-6)
    assert 100 * np.sqrt(effect.variance) == pytest.approx(fit.bse["method"], rel=1e-2)
    assert 1e4 * np.mean([run_variance(side) for side in y]) == pytest.approx(components["run"], rel=2e-2)


def test_nothing_to_compare_no_difference_and_a_constant_one():
    ones = np.ones((3, 4))
    same = compare_runs(ones * (0.1 + 0.2), ones * 0.3)
    assert (same.difference, same.half_width, same.p, same.detectable) == (0, 0, 1, 0)
    moved = compare_runs(ones * 0.5, ones * 0.75)
    assert (moved.difference, moved.half_width, moved.p) == (0.25, 0, 0)
    assert np.isnan(compare_runs(ones[:, :1], ones[:, :1]).p) and np.isnan(compare_runs(ones[:1], ones).p)
    assert np.isnan(run_variance(ones[:1])) and np.isnan(run_variance(ones[:, :1]))
    with pytest.raises(ValueError, match=r"baseline \(3, 4\), method \(3, 3\)"):
        compare_runs(ones, ones[:, :3])


def test_order_of_runs_and_cases_and_the_unit_do_not_matter():
    generator = np.random.default_rng(9)
    ((baseline, method, fold_of),) = simulate(generator, (2, 4), 30, 3, draws=1)
    effect = compare_runs(baseline[0], method[0], fold_of)
    order = generator.permutation(30)
    again = compare_runs(10 * baseline[0][::-1, order] + 3, 10 * method[0][:, order] + 3, fold_of[order])
    for name, unit in {"p": 1, "df": 1, "half_width": 10, "detectable": 10}.items():
        assert getattr(again, name) == pytest.approx(unit * getattr(effect, name)), name
    back = compare_runs(method[0], baseline[0], fold_of)
    assert back.p == pytest.approx(effect.p) and back.difference == pytest.approx(-effect.difference)


# Holm's correction


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, float("nan"), 0.2]) == pytest.approx([0.5, float("nan"), 0.4], nan_ok=True)
    assert holm([]) == [] and holm([0.9, 0.8]) == [1, 1]


@settings(deadline=None, max_examples=100)
@given(P_VALUES)
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(values):
    corrected = holm(values)
    defined = [(p, c) for p, c in zip(values, corrected, strict=True) if not np.isnan(p)]
    assert all(np.isnan(c) for p, c in zip(values, corrected, strict=True) if np.isnan(p))
    assert all(p <= c <= min(1, len(defined) * p) + 1e-12 for p, c in defined)
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(sorted(defined)))


def test_holm_equals_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    values = np.random.default_rng(0).random(12) ** 3
    assert holm(values) == pytest.approx(multitest.multipletests(values, method="holm")[1])

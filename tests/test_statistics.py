"""Paired statistics against scipy, statsmodels, enumeration and numbers worked out by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_l2g.comparison.statistics import bootstrap_interval, compare_paired, holm, wilcoxon_p

P_VALUES = st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=8)


def test_by_hand():
    baseline = np.array([0.5, 0.6, 0.7, 0.8, np.nan, np.nan])
    method = np.array([0.6, 0.6, 0.8, 0.7, 0.9, np.nan])
    result = compare_paired(baseline, method, resamples=100)
    assert (result.n, result.dropped, result.wins, result.ties, result.losses) == (4, 1, 2, 1, 1)
    assert (result.baseline, result.method, result.difference) == pytest.approx((0.65, 0.675, 0.025))
    distances = compare_paired(baseline, method, higher_is_better=False, resamples=100)
    assert (distances.wins, distances.ties, distances.losses) == (1, 1, 2)
    assert (distances.difference, distances.p) == (result.difference, result.p)


def test_nothing_to_compare_and_no_difference():
    nothing = compare_paired([np.nan, 1], [1, np.nan])
    assert (nothing.n, nothing.dropped) == (0, 2) and np.isnan(nothing.difference) and np.isnan(nothing.p)
    same = compare_paired([0.1 + 0.2, 1], [0.3, 1])
    assert (same.difference, same.low, same.high, same.p, same.ties) == (0, 0, 0, 1, 2)
    one = compare_paired([0.1], [0.2])
    assert one.n == 1 and np.isnan(one.low) and one.p == 1
    with pytest.raises(ValueError, match=r"baseline \(2,\), method \(3,\)"):
        compare_paired([1, 2], [1, 2, 3])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([d for d in range(-6, 7) if d]), min_size=1, max_size=9))
def test_wilcoxon_equals_enumeration_of_all_signs(differences):
    """Under the null every sign is a coin's: p is the share of the 2^n rank sums as far from their mean as the one seen."""
    ranks = stats.rankdata(np.abs(differences))
    centre = ranks.sum() / 2
    seen = abs(ranks[np.array(differences) > 0].sum() - centre)
    sums = [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(ranks))]
    expected = np.mean(np.abs(np.array(sums) - centre) >= seen - 1e-9)
    assert wilcoxon_p(np.array(differences, float)) == pytest.approx(expected)


def test_wilcoxon_equals_scipys():
    generator = np.random.default_rng(0)
    for size in (1, 5, 17, 50):
        few = generator.normal(0.2, 1, size)
        assert wilcoxon_p(few) == pytest.approx(stats.wilcoxon(few, method="exact").pvalue)
        assert wilcoxon_p(np.append(few, [0.0, 0.0])) == wilcoxon_p(few)  # zeros are dropped
    many = np.round(generator.normal(0.1, 1, 200), 1)
    assert wilcoxon_p(many) == pytest.approx(stats.wilcoxon(many[many != 0], method="approx").pvalue)
    assert wilcoxon_p(np.array([0.1] * 3 + [0.3 - 0.2] * 3)) == wilcoxon_p(np.full(6, 0.1))  # rounding breaks no tie


def test_bootstrap_is_seeded_and_agrees_with_scipy_and_theory():
    values = np.random.default_rng(1).normal(2.0, 1.0, 80)
    low, high = bootstrap_interval(values, 20_000, seed=3)
    assert (low, high) == bootstrap_interval(values, 20_000, seed=3)
    assert (low, high) != bootstrap_interval(values, 20_000, seed=4)
    oracle = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0))
    assert (low, high) == pytest.approx(tuple(oracle.confidence_interval), abs=0.01)
    normal = stats.norm.interval(0.95, values.mean(), values.std() / np.sqrt(values.size))
    assert (low, high) == pytest.approx(normal, abs=0.02)
    assert bootstrap_interval(np.full(5, 0.7), 100, 0) == pytest.approx((0.7, 0.7))


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(2)
    intervals = [bootstrap_interval(generator.normal(size=30), 400, seed) for seed in range(300)]
    assert 0.88 < np.mean([low <= 0 <= high for low, high in intervals]) < 0.98


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

"""Lesion-wise matching against hand-counted cases and against scipy's components."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label

from nnunet_l2g.evaluation import match_lesions, recall_by_size

SHAPES = st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 5)] * 3))


def mask(*rows):
    return np.array([[character == "#" for character in row] for row in rows])


@st.composite
def pairs(draw):
    shape = draw(SHAPES)
    return tuple(draw(arrays(bool, shape)) for _ in range(2))


def brute_force(reference, prediction, overlap=0.0, min_size=1):
    """Loops over all pairs of components, as the rule is written."""
    corners = np.ones((3,) * reference.ndim)
    lesions, n = label(reference, corners)
    components, m = label(prediction, corners)
    all_lesions = [lesions == i for i in range(1, n + 1)]
    everything = [components == j for j in range(1, m + 1)]
    predicted = [p for p in everything if p.sum() >= min_size]
    counted = [r for r in all_lesions if r.sum() >= min_size]
    small = [r for r in all_lesions if r.sum() < min_size]
    found = [any((r & p).sum() > 0 and (r & p).sum() / r.sum() >= overlap for p in predicted) for r in counted]
    right = [p for p in predicted if any((r & p).any() for r in counted)]
    wrong = [p for p in predicted if not any((r & p).any() for r in counted) and not any((r & p).any() for r in small)]
    return sorted(zip([int(r.sum()) for r in counted], found, strict=True)), len(right) + len(wrong), len(right)


@settings(deadline=None, max_examples=150)
@given(pairs(), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 4))
def test_equals_the_rule_written_as_loops(masks, overlap, min_size):
    match = match_lesions(*masks, overlap=overlap, min_size=min_size)
    sizes = sorted(zip(match.sizes, match.detected, strict=True))
    assert (sizes, match.predicted, match.correct) == brute_force(*masks, overlap, min_size)


@settings(deadline=None, max_examples=50)
@given(pairs())
def test_recall_of_one_side_is_precision_of_the_other_and_a_mask_finds_itself(masks):
    there, back = match_lesions(*masks).scores(), match_lesions(*reversed(masks)).scores()
    for name, other in (("lesion_recall", "lesion_precision"), ("lesion_f1", "lesion_f1")):
        assert there[name] == pytest.approx(back[other], nan_ok=True)
    same = match_lesions(masks[0], masks[0], overlap=1.0).scores()
    assert all(np.isnan(value) if not masks[0].any() else value == 1 for value in same.values())


def test_one_component_over_two_lesions_and_two_on_one():
    lesions = mask("##...##", ".......")
    bridge = mask(".#####.", ".......")
    match = match_lesions(lesions, bridge)
    assert (match.sizes, match.detected, match.predicted, match.correct) == ((2, 2), (True, True), 1, 1)
    assert match.scores() == {"lesion_precision": 1, "lesion_recall": 1, "lesion_f1": 1}
    match = match_lesions(bridge, lesions)
    assert (match.sizes, match.detected, match.predicted, match.correct) == ((5,), (True,), 2, 2)


def test_closed_form_of_precision_recall_and_f1():
    reference = mask("##..##..##", "..........", "..........")
    prediction = mask("#.........", "..........", "#.........")  # one of three lesions found, one of two components right
    scores = match_lesions(reference, prediction).scores()
    assert scores == pytest.approx({"lesion_precision": 1 / 2, "lesion_recall": 1 / 3, "lesion_f1": 0.4})


def test_overlap_is_a_fraction_of_the_lesion_and_counts_single_components():
    reference, prediction = mask("####...."), mask("##......")
    assert match_lesions(reference, prediction, overlap=0.5).detected == (True,)
    assert match_lesions(reference, prediction, overlap=0.51).detected == (False,)
    assert match_lesions(reference, prediction, overlap=0.51).correct == 1  # it does touch a lesion
    assert match_lesions(reference, mask("#.#....."), overlap=0.5).detected == (False,)  # each holds a quarter


def test_connectivity_by_corners_is_the_default():
    diagonal = mask("#.", ".#")
    assert match_lesions(diagonal, diagonal).sizes == (2,)
    assert match_lesions(diagonal, diagonal, connectivity=4).sizes == (1, 1)
    cube = np.zeros((2, 2, 2), bool)
    cube[0, 0, 0] = cube[1, 1, 1] = True
    assert match_lesions(cube, cube).sizes == (2,)
    assert match_lesions(cube, cube, connectivity=6).sizes == match_lesions(cube, cube, connectivity=18).sizes == (1, 1)


def test_small_lesions_are_left_out_and_so_is_what_lies_on_them():
    reference = mask("#...###...", "..........")
    prediction = mask("##..##..##", "..........")  # on the small lesion, on the large one, on nothing
    match = match_lesions(reference, prediction, min_size=2)
    assert (match.sizes, match.detected, match.predicted, match.correct) == ((3,), (True,), 2, 1)
    assert match_lesions(reference, mask("....#.....", ".........."), min_size=2).detected == (False,)


def test_empty_masks():
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert all(np.isnan(value) for value in match_lesions(empty, empty).scores().values())
    assert set(match_lesions(empty, full).scores().values()) == {0.0}
    assert set(match_lesions(full, empty).scores().values()) == {0.0}


def test_ignored_voxels_hide_lesions():
    reference, prediction = mask("##..##"), mask("....#.")
    valid = ~mask("##....")
    assert match_lesions(reference, prediction, valid).scores()["lesion_recall"] == 1
    assert match_lesions(reference, prediction).scores()["lesion_recall"] == 0.5


def test_recall_by_size():
    bins = recall_by_size([1, 2, 10, 11, 100], [False, True, True, True, True], [1, 10, 100, 1000, 2000])
    assert bins[:3] == [(2, 0.5), (2, 1.0), (1, 1.0)]
    assert bins[3][0] == 0 and np.isnan(bins[3][1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: match_lesions(m, m, connectivity=26), r"connectivity 26: expected one of \[4, 8\] in 2D"),
        (lambda m: match_lesions(m, m, overlap=50), "overlap 50: expected a fraction"),
        (lambda m: match_lesions(m, m, min_size=0), "min_size 0: expected 1"),
        (lambda m: match_lesions(m, m[:1]), r"prediction has shape \(1, 3\), reference \(2, 3\)"),
        (lambda m: match_lesions(m, m.astype(int)), "prediction: expected a boolean array, got int64"),
        (lambda m: match_lesions(m[0], m[0]), "1 dimensions: expected 2 or 3"),
        (lambda m: recall_by_size([1], [True, False], [0, 2]), "1 sizes and 2 detections"),
        (lambda m: recall_by_size([1], [True], [2, 1]), "expected at least two increasing"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 3), bool))

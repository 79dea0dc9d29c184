"""Overlap, surfaces and lesions against closed forms, brute force and other implementations; perturbations of images."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label

from nnunet_l2g.evaluation import count_voxels, match_lesions, overlap_scores, surface_scores
from nnunet_l2g.evaluation.scores import surface_voxels
from nnunet_l2g.evaluation.shifts import STRENGTHS, TITLES, perturb

SHAPES = st.one_of(st.tuples(*[st.integers(1, 8)] * 2), st.tuples(*[st.integers(1, 5)] * 3))


@st.composite
def cases(draw, valid=False):
    shape = draw(SHAPES)
    masks = tuple(draw(arrays(bool, shape)) for _ in range(3 if valid else 2))
    return *masks, tuple(draw(st.sampled_from([0.5, 1.0, 1.7, 4.0])) for _ in shape)


def brute_force(reference, prediction, spacing, tolerance, valid=None):
    """All pairs of surface points, from the definition."""
    points = [np.array(list(surface_points(mask, valid))).reshape(-1, mask.ndim) for mask in (reference, prediction)]
    distances = np.linalg.norm((points[0][:, None] - points[1][None]) * spacing, axis=-1)
    there, back = distances.min(axis=1), distances.min(axis=0)
    both = np.concatenate([there, back])
    return {
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd": both.mean(),
        "nsd": np.mean(both <= tolerance + 1e-9),
    }


def surface_points(mask, valid):
    known = np.ones_like(mask) if valid is None else valid
    for point in np.argwhere(mask & known):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = point.copy()
            neighbour[axis] += step
            inside = np.all(neighbour >= 0) and np.all(neighbour < mask.shape)
            if not inside or (known[tuple(neighbour)] and not mask[tuple(neighbour)]):
                yield point
                break


def balls(shape=(24, 30, 34), radii=((7, 9, 11), (6, 10, 9)), shift=(1, 2, -3)):
    """Two ellipsoids, the second moved."""
    grid = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij"), axis=-1)
    first = ((grid / radii[0]) ** 2).sum(-1) <= 1
    second = (((grid - shift) / radii[1]) ** 2).sum(-1) <= 1
    return first, second


# overlap


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((2, 1, 1), (4 / 6, 2 / 4, 2 / 3, 2 / 3)),
        ((3, 0, 0), (1, 1, 1, 1)),
        ((0, 4, 0), (0, 0, 0, 0)),  # nothing to find
        ((0, 0, 4), (0, 0, 0, 0)),  # nothing found
        ((0, 2, 3), (0, 0, 0, 0)),
        ((0, 0, 0), (np.nan,) * 4),
    ],
)
def test_overlap_closed_forms(counts, expected):
    assert list(overlap_scores(*counts).values()) == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(cases(valid=True))
def test_overlap_is_symmetric_and_equals_nnunets(case):
    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn

    reference, prediction, valid, _ = case
    tp, fp, fn = count_voxels(reference, prediction, valid)
    assert (tp, fp, fn) == tuple(compute_tp_fp_fn_tn(reference, prediction, ~valid)[:3])
    assert count_voxels(prediction, reference, valid) == (tp, fn, fp)
    there, back = overlap_scores(tp, fp, fn), overlap_scores(tp, fn, fp)
    for name, other in (("dice", "dice"), ("iou", "iou"), ("precision", "recall")):
        assert there[name] == pytest.approx(back[other], nan_ok=True)
    if tp + fp + fn:
        assert there["dice"] == pytest.approx(2 * there["iou"] / (1 + there["iou"]))
        assert 0 <= there["iou"] <= there["dice"] <= 1


# surfaces


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_surface_scores_equal_brute_force(case, tolerance):
    reference, prediction, spacing = case
    assume(reference.any() and prediction.any())
    found = surface_scores(reference, prediction, spacing, tolerance)
    assert found == pytest.approx(brute_force(reference, prediction, spacing, tolerance), rel=1e-4, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(cases(valid=True))
def test_ignored_voxels_have_no_surface(case):
    reference, prediction, valid, spacing = case
    surfaces = [surface_voxels(mask, valid) for mask in (reference, prediction)]
    for mask, surface in zip((reference, prediction), surfaces, strict=True):
        assert {tuple(p) for p in np.argwhere(surface)} == {tuple(p) for p in surface_points(mask, valid)}
    assume(all(surface.any() for surface in surfaces))
    found = surface_scores(reference, prediction, spacing, 1.0, valid)
    assert found == pytest.approx(brute_force(reference, prediction, spacing, 1.0, valid), rel=1e-4, abs=1e-4)
    changed = np.where(valid, prediction, ~prediction)  # what is predicted there does not matter
    assert surface_scores(reference, changed, spacing, 1.0, valid) == found


@settings(deadline=None, max_examples=60)
@given(cases())
def test_surface_scores_properties(case):
    reference, prediction, spacing = case
    assume(reference.any() and prediction.any())
    found = surface_scores(reference, prediction, spacing, 1.0)
    assert surface_scores(prediction, reference, spacing, 1.0) == pytest.approx(found)
    doubled = surface_scores(reference, prediction, tuple(2 * s for s in spacing), 2.0)
    assert doubled == pytest.approx({"hd95": 2 * found["hd95"], "assd": 2 * found["assd"], "nsd": found["nsd"]}, rel=1e-4)
    assert surface_scores(reference, reference, spacing, 0.0) == {"hd95": 0, "assd": 0, "nsd": 1}
    padded = [np.pad(mask, 3) for mask in (reference, prediction)]
    assert surface_scores(*padded, spacing, 1.0) == pytest.approx(found)
    axes = tuple(reversed(range(reference.ndim)))
    turned = surface_scores(reference.transpose(axes), prediction.transpose(axes), spacing[::-1], 1.0)
    assert turned == pytest.approx(found, rel=1e-4, abs=1e-4)


def test_surface_closed_forms():
    first, second = np.zeros((3, 20), bool), np.zeros((3, 20), bool)
    first[1, 2], second[1, 10] = True, True  # two points, 8 voxels of 1.5 mm apart
    assert surface_scores(first, second, (4.0, 1.5), 11.9) == pytest.approx({"hd95": 12, "assd": 12, "nsd": 0})
    assert surface_scores(first, second, (4.0, 1.5), 12.0)["nsd"] == 1
    plate = np.zeros((9, 6, 6), bool)
    plate[2], moved = True, np.roll(plate, 3, axis=0)
    plate[2], moved[5] = True, True
    assert surface_scores(plate, moved, (5.0, 1.0, 1.0), 1.0) == pytest.approx({"hd95": 15, "assd": 15, "nsd": 0})


def test_empty_masks():
    full, empty = np.ones((4, 5, 6), bool), np.zeros((4, 5, 6), bool)
    assert all(np.isnan(value) for value in surface_scores(empty, empty, (1, 1, 1), 1).values())
    diagonal = np.sqrt(8**2 + 5**2 + 18**2)
    for masks in ((full, empty), (empty, full)):
        assert surface_scores(*masks, (2, 1, 3), 1) == pytest.approx({"hd95": diagonal, "assd": diagonal, "nsd": 0})
    assert all(np.isnan(value) for value in surface_scores(full, full, (1, 1, 1), 1, valid=empty).values())


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.8, 1.1)])
def test_equals_monai(spacing):
    monai = pytest.importorskip("monai.metrics")
    import torch

    masks = balls()
    first, second = (torch.from_numpy(mask)[None, None].float() for mask in masks)
    found = surface_scores(*masks, spacing, 2.0)
    hausdorff = monai.compute_hausdorff_distance(second, first, percentile=95, include_background=True, spacing=spacing)
    average = monai.compute_average_surface_distance(second, first, True, symmetric=True, spacing=spacing)
    dice = monai.compute_surface_dice(second, first, [2.0], include_background=True, spacing=spacing)
    assert found["hd95"] == pytest.approx(hausdorff.item(), rel=1e-4)
    assert found["assd"] == pytest.approx(average.item(), rel=1e-4)
    assert found["nsd"] == pytest.approx(dice.item(), rel=1e-4)


def test_is_close_to_deepminds_area_weighted_surfaces():
    deepmind = pytest.importorskip("surface_distance")
    masks, spacing = balls(), (1.0, 1.0, 1.0)
    distances = deepmind.compute_surface_distances(*masks, spacing)
    found = surface_scores(*masks, spacing, 2.0)
    assert found["hd95"] == pytest.approx(deepmind.compute_robust_hausdorff(distances, 95), abs=0.5)
    assert found["nsd"] == pytest.approx(deepmind.compute_surface_dice_at_tolerance(distances, 2.0), abs=0.05)
    there, back = deepmind.compute_average_surface_distance(distances)
    assert found["assd"] == pytest.approx((there + back) / 2, abs=0.3)


# lesions


def mask(*rows):
    return np.array([[character == "#" for character in row] for row in rows])


def matched_by_loops(reference, prediction, overlap=0.0, min_size=1):
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


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 4))
def test_lesions_equal_the_rule_written_as_loops(case, overlap, min_size):
    masks = case[:2]
    match = match_lesions(*masks, overlap=overlap, min_size=min_size)
    sizes = sorted(zip(match.sizes, match.detected, strict=True))
    assert (sizes, match.predicted, match.correct) == matched_by_loops(*masks, overlap, min_size)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_recall_of_one_side_is_precision_of_the_other_and_a_mask_finds_itself(case):
    masks = case[:2]
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


def test_lesions_of_empty_masks():
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert all(np.isnan(value) for value in match_lesions(empty, empty).scores().values())
    assert set(match_lesions(empty, full).scores().values()) == {0.0}
    assert set(match_lesions(full, empty).scores().values()) == {0.0}


def test_ignored_voxels_hide_lesions():
    reference, prediction = mask("##..##"), mask("....#.")
    valid = ~mask("##....")
    assert match_lesions(reference, prediction, valid).scores()["lesion_recall"] == 1
    assert match_lesions(reference, prediction).scores()["lesion_recall"] == 0.5


# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: surface_scores(m, m, (1.0,), 1), r"spacing \(1.0,\): expected 2 positive numbers"),
        (lambda m: surface_scores(m, m, (1.0, 0.0), 1), "expected 2 positive numbers"),
        (lambda m: surface_scores(m, m, (1.0, np.nan), 1), "expected 2 positive numbers"),
        (lambda m: surface_scores(m, m, (1, 1), -1.0), "tolerance -1.0: expected 0 or more"),
        (lambda m: surface_scores(m, m, (1, 1), np.nan), "tolerance nan: expected 0 or more"),
        (lambda m: surface_scores(m, m, (1, 1), 1, m * 1.0), "valid: expected a boolean array, got float64"),
        (lambda m: match_lesions(m, m, overlap=50), "overlap 50: expected a fraction"),
        (lambda m: match_lesions(m, m, min_size=0), "min_size 0: expected 1"),
        (lambda m: count_voxels(m, m[:1]), r"prediction has shape \(1, 3\), reference \(2, 3\)"),
        (lambda m: count_voxels(m, m.astype(int)), "prediction: expected a boolean array, got int64"),
        (lambda m: count_voxels(m[0], m[0]), r"masks of shape \(3,\): expected 2 or 3"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 3), bool))


# perturbations

IDENTITY = {"noise": 0.0, "blur": 0.0, "bias": 0.0, "contrast": 1.0, "resolution": 1.0}


@pytest.fixture(scope="module")
def image():
    import SimpleITK as sitk

    from nnunet_l2g.phantom import make_case

    return sitk.GetArrayFromImage(make_case(0)[0]), (8.0, 1.8, 1.8)  # (z, y, x)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_perturbations_grow_with_strength_and_vanish_at_none(image, kind):
    array, spacing = image
    assert np.allclose(perturb(array, spacing, kind, IDENTITY[kind], 0), array, atol=1e-9)
    changes = [np.abs(perturb(array, spacing, kind, strength, 0) - array).mean() for strength in STRENGTHS[kind]]
    assert 0 < changes[0] < changes[1] < changes[2]
    first, again, other = (perturb(array, spacing, kind, STRENGTHS[kind][1], seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and np.all(np.isfinite(first)) and first.shape == array.shape
    assert np.array_equal(first, other) == (kind not in ("noise", "bias"))
    flat = np.full((4, 12, 12), 7.0)
    if kind != "noise":
        assert np.allclose(perturb(flat, spacing, kind, STRENGTHS[kind][2], 0), flat)
    assert kind in TITLES


def test_perturbations_do_what_they_say(image):
    array, spacing = image
    low, high = np.percentile(array, [0.5, 99.5])
    noise = perturb(array, spacing, "noise", 0.1, 0) - array
    assert noise.std() == pytest.approx(0.1 * (high - low), rel=0.02) and abs(noise.mean()) < 0.01 * (high - low)
    ratio = (perturb(array, spacing, "bias", 0.4, 3) - low) / np.where(array > low + 1, array - low, np.nan)
    assert np.nanmax(np.abs(np.log(ratio))) == pytest.approx(0.4, abs=0.02)
    contrast = perturb(array, spacing, "contrast", 2.0, 0)
    middle = (array > low) & (array < high)
    assert np.allclose((contrast[middle] - low) / (high - low), ((array[middle] - low) / (high - low)) ** 2)
    point = np.zeros((7, 33, 33))
    point[3, 16, 16] = 1
    blurred = perturb(point, (4.0, 1.0, 1.0), "blur", 2.0, 0)
    grid = np.arange(33) - 16
    assert np.sqrt((blurred.sum((0, 1)) * grid**2).sum() / blurred.sum()) == pytest.approx(2.0, rel=0.05)  # in-plane
    assert blurred.sum((1, 2))[3] > 0.7  # and half a voxel through the coarse planes
    ramp = np.broadcast_to(np.arange(30.0), (5, 30, 30)).copy()
    coarse = perturb(ramp, (9.0, 1.0, 1.0), "resolution", 2.0, 0)
    assert np.allclose(coarse[:, :, 4:-4], ramp[:, :, 4:-4], atol=0.1)  # nothing moves
    planes = np.zeros((6, 8, 8))
    planes[::2] = 1
    assert np.allclose(perturb(planes, (9.0, 1.0, 1.0), "resolution", 3.0, 0), planes)  # the coarse axis stays


def test_the_documents_example():
    document = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = document.split("```python\n")[1].split("```")[0]
    results: dict = {}
    exec(code, results)
    mask = results["mask"]
    assert overlap_scores(tp=2, fp=1, fn=1)["dice"] == pytest.approx(0.667, abs=1e-3)
    found = surface_scores(mask, np.roll(mask, 2, axis=1), spacing=(3.0, 0.5), tolerance=0.5)
    assert found == pytest.approx({"hd95": 1.0, "assd": 1.0, "nsd": 0.0})

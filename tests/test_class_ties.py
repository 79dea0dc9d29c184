"""References that belong to classes: what their shares, marginals and losses have to be."""

import copy

import pytest
import torch
from distributed import run_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_l2g.layers import TransportAlignment
from nnunet_l2g.layers.class_ties import SMALLEST_SHARE, ClassTies, class_shares

D = 8


def labels(*shape, classes=3, seed=0):
    return torch.randint(classes, (2, 1, *shape), generator=torch.Generator().manual_seed(seed)).float()


# ---- shares ----


@pytest.mark.parametrize(("shape", "grid"), [((8, 12), (4, 3)), ((4, 8, 8), (2, 4, 2)), ((7, 9), (4, 5))])
def test_shares_are_the_voxels_counted_one_by_one(shape, grid):
    target = labels(*shape)
    found = class_shares(target, 3, grid)
    assert found.shape == (2, torch.tensor(grid).prod(), 4)
    torch.testing.assert_close(found.sum(2), torch.ones(found.shape[:2]))
    assert not found[..., 3].any()  # each voxel has a class
    if all(s % g == 0 for s, g in zip(shape, grid, strict=True)):
        first = target[(0, 0, *(slice(s // g) for s, g in zip(shape, grid, strict=True)))]
        assert found[0, 0, 1] == pytest.approx(float((first == 1).float().mean()))


def test_what_is_ignored_counts_for_no_class():
    target = labels(4, 4)
    target[:, :, :2, :2] = 3  # nnU-Net's ignore label is the highest
    found = class_shares(target, 3, (2, 2))
    assert not found[:, 0].any() and torch.equal(found[:, 1:].sum(2), torch.ones(2, 3))


@pytest.mark.parametrize("ignore", [False, True])
def test_regions_become_the_labels_that_nnunet_makes_of_them(ignore):
    """The last region that holds a voxel names it, as in nnU-Net's convert_logits_to_segmentation; the rest is background."""
    manager = LabelManager({"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[1, 2])
    regions = torch.randint(2, (1, 2, 4, 4), generator=torch.Generator().manual_seed(1))
    expected = torch.as_tensor(manager.convert_probabilities_to_segmentation(regions[0].float()))  # (4, 4) of 0, 1, 2
    target = regions.float()
    if ignore:
        target = torch.cat((target, torch.zeros(1, 1, 4, 4)), 1)
        target[:, 2, 0, 0] = 1
    found = class_shares(target, 2, (4, 4))[0].reshape(4, 4, 3)
    for label, channel in ((1, 0), (2, 1), (0, 2)):
        mask = (expected == label).float()
        mask[0, 0] *= not ignore
        assert torch.equal(found[..., channel], mask)


def test_a_single_region_is_no_label_map():
    target = torch.tensor([0.0, 1, 1, 1]).reshape(1, 1, 2, 2)
    assert torch.equal(class_shares(target, 1, (2, 1))[0], torch.tensor([[0.5, 0.5], [1, 0]]))
    assert torch.equal(class_shares(target.bool(), 1, (2, 1)), class_shares(target, 1, (2, 1)))


# ---- prior and marginal ----


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(1, 8), per_class=st.integers(1, 5), seed=st.integers(0, 100))
def test_marginal_sums_to_one_and_follows_the_prior(classes, per_class, seed):
    ties = ClassTies(classes, per_class)
    ties.prior.copy_(torch.rand(classes + 1, generator=torch.Generator().manual_seed(seed)) ** 4)
    ties.prior.div_(ties.prior.sum())
    b = ties.column_marginal()
    assert b.shape == (ties.num_references,) and float(b.sum()) == pytest.approx(1, abs=1e-5) and float(b.min()) > 0
    torch.testing.assert_close(b.reshape(-1, per_class).sum(1), ties.prior, atol=(classes + 1) * SMALLEST_SHARE, rtol=0)


def test_prior_is_the_mean_at_first_and_a_moving_average_later():
    ties = ClassTies(1, 1, decay=0.5)
    seen = []
    for share in (0.2, 0.6, 0.9):
        ties.shares = torch.tensor([[[share, 1 - share]]])
        ties.update()
        seen.append(float(ties.prior[0]))
    assert seen == pytest.approx([0.2, 0.4, 0.65])
    ties.update()  # without a step since
    assert float(ties.prior[0]) == pytest.approx(0.65)


@pytest.mark.parametrize("when", ["first", "last"])
def test_a_batch_that_is_all_ignored_leaves_the_prior_alone(when):
    ties, ignored, seen = ClassTies(1, 1), torch.zeros(1, 1, 2), torch.tensor([[[0.9, 0.1]]])
    for ties.shares in (ignored, seen) if when == "first" else (seen, ignored):
        ties.update()
    assert float(ties.prior[0]) == pytest.approx(0.9)


def _prior(rank, shares):
    ties = ClassTies(2, 1)
    ties.shares = shares[rank]
    ties.update()
    return ties.prior


@pytest.mark.slow
def test_processes_share_one_prior():
    shares = torch.rand(2, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    first, second = run_two_processes(_prior, shares)
    assert torch.equal(first, second)
    total = shares.sum((0, 1, 2))
    torch.testing.assert_close(first, total / total.sum())


# ---- plan and loss ----


def image(counts):
    """Tokens (1, n, D) of three classes, so many of each, and their shares (1, n, 4)."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(3).repeat_interleave(torch.tensor(counts))
    centres = 3 * torch.eye(D)[:3] + 1
    q = centres[owner] + 0.3 * torch.randn(len(owner), D, generator=generator)
    return q[None], torch.nn.functional.one_hot(owner, 4).float()[None]


def tied(per_class=2, **keywords):
    """Tokens of three classes in shares 80, 15 and 5 %, a tied alignment that was placed on them, and their shares."""
    torch.manual_seed(0)
    ties, (q, shares) = ClassTies(3, per_class, **keywords), image([80, 15, 5])
    alignment = TransportAlignment(D, ties.num_references).train()
    alignment.initialise(q, shares)
    return ties, alignment, q, shares


def test_references_are_placed_class_by_class():
    _, alignment, q, shares = tied()
    centred = q[0] - q[0].mean(0)
    for group, references in enumerate(alignment.references.chunk(4)[:3]):
        mean = centred[shares[0, :, group] > 0].mean(0, keepdim=True)
        assert torch.nn.functional.cosine_similarity(references, mean).min() > 0.8
    before = alignment.references.detach().clone()
    alignment.initialise(q, torch.zeros_like(shares))
    torch.testing.assert_close(alignment.references, before)  # nothing known, nothing moved


def test_a_structure_that_fills_no_token_is_placed_where_there_is_most_of_it():
    _, alignment, q, shares = tied()
    small = torch.zeros(1, 100, 1)
    small[0, 80:84], small[0, 84:90] = 0.2, 0.05  # in tokens of the second class
    alignment.initialise(q, torch.cat((shares[:, :, :3] * (1 - small), small), 2))
    centred = q[0] - q[0].mean(0)
    cosines = torch.nn.functional.cosine_similarity(alignment.references[6:, None], centred[None], dim=2)
    assert set(cosines.argmax(1).tolist()) <= set(range(80, 84))


def agreement(counts, per_class=2, iterations=20, relaxation=None, marginal="prior"):
    """Share of an image's tokens whose references' class is theirs; the prior is 80, 15 and 5 %, the image has `counts`."""
    ties, placed, _, shares = tied(per_class)
    ties.shares = shares
    ties.update()
    layer = TransportAlignment(D, ties.num_references, iterations=iterations, relaxation=relaxation).train()
    layer.load_state_dict(placed.state_dict())
    q, shares = image(counts)
    log_p = ties.log_probabilities(layer.align(q, None, ties.column_marginal() if marginal == "prior" else None)[2])
    ties.loss(log_p, layer.references, shares)
    return ties.diagnostics()["class_accuracy"]


def test_marginals_of_the_class_prior_fit_an_image_with_its_shares_and_uniform_ones_do_not():
    """Uniform marginals give each class a quarter of the tokens, whatever the image holds. Scores alone would do here, too."""
    assert agreement([80, 15, 5]) > 0.98 and agreement([80, 15, 5], marginal="uniform") < 0.7
    assert agreement([80, 15, 5], iterations=0) > 0.98


def test_marginals_of_the_class_prior_are_wrong_for_an_image_with_other_shares():
    """A fixed marginal sends tokens to classes that are not there: what a form with ties has to show it can live with."""
    assert agreement([40, 40, 20]) < 0.7 < agreement([40, 40, 20], relaxation=0.1)


def test_loss_equals_the_equation_written_out():
    ties, alignment, q, shares = tied(weight=0.5)
    shares[:, 90:] = 0  # ignored
    _, _, row_logits = alignment.align(q, None, ties.column_marginal())
    p = row_logits[0].detach().softmax(1).reshape(100, 4, 2).sum(2)  # (n, G)
    entropy = -sum(float(p[i, shares[0, i].argmax()].log()) for i in range(90)) / 90
    unit = torch.nn.functional.normalize(alignment.references.detach(), dim=1).reshape(4, 2, D)
    spread = sum(float((g[0] @ g[1]).clamp_min(0)) for g in unit) / 4
    found = ties.loss(ties.log_probabilities(row_logits), alignment.references, shares)
    assert float(found.detach()) == pytest.approx(0.5 * entropy + 0.01 * spread, rel=1e-4)


def test_one_reference_a_class_has_no_spread_and_a_finite_loss_when_all_is_ignored():
    ties, alignment, q, shares = tied(per_class=1)
    log_p = ties.log_probabilities(alignment.align(q, None, ties.column_marginal())[2])
    loss = ties.loss(log_p, alignment.references, torch.zeros_like(shares))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.isfinite(alignment.references.grad).all()


def test_shuffled_twin_keeps_the_shares_and_loses_the_meaning():
    ties, alignment, q, shares = tied(shuffled=True)
    log_p = ties.log_probabilities(alignment.align(q, None, ties.column_marginal())[2])
    ties.loss(log_p, alignment.references, shares)
    torch.testing.assert_close(ties.shares.sum(1), shares.sum(1))
    assert not torch.equal(ties.shares, shares)


def test_copies_hold_no_batch():
    ties, alignment, q, shares = tied()
    ties.loss(ties.log_probabilities(alignment.align(q)[2]), alignment.references, shares)
    assert copy.deepcopy(ties).shares is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"per_class": 0}, "references_per_class is 0"),
        ({"per_class": 1, "weight": -1}, "class_weight is -1"),
        ({"per_class": 1, "weight": float("nan")}, "class_weight is nan"),
        ({"per_class": 1, "decay": 1.0}, "decay 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        ClassTies(2, **arguments)

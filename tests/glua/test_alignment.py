"""What aligns features: mask, discriminator, loss and step; and the gap between domains as a number."""

import copy

import pytest
import torch

from nnunet_l2g.architectures.glua import alignment as module
from nnunet_l2g.architectures.glua.alignment import (
    AdversarialAlignment,
    DomainDiscriminator,
    alignment_weight,
    local_feature_mask,
)
from nnunet_l2g.architectures.glua.domain_gap import DomainGap


def test_the_mask_is_detached_in_0_to_1_and_0_where_the_domains_cannot_be_told_apart():
    score = torch.tensor([[[0.5, 0.0, 1.0, 0.75, -3.0, 4.0]]], requires_grad=True)
    mask = local_feature_mask(score)
    assert not mask.requires_grad
    assert mask.flatten().tolist() == [0, 1, 1, 0.5, 1, 1]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_mask_starts_at_0_whatever_the_features(dims):
    features = 50 * torch.randn(2, 12, *[4] * dims) + 7
    score = DomainDiscriminator(12, dims)(features)
    assert score.shape == (2, 1, *[4] * dims) and score.dtype == torch.float32
    assert local_feature_mask(score).max() < 1e-6


def test_the_discriminator_does_not_depend_on_the_scale_of_features():
    torch.manual_seed(0)
    source, target = torch.randn(2, 2, 8, 4, 4)
    scores = []
    for scale in (1.0, 100.0):
        discriminator = DomainDiscriminator(8, 2)
        torch.manual_seed(1)
        for parameter in discriminator.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        discriminator.observe(scale * source, scale * target)
        scores.append(discriminator(scale * target))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def features(shift, number=4, channels=16, seed=None):
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    f = torch.randn(number, channels, 6, 6, generator=generator)
    f[:, :4] += shift
    return f


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(module, "WIDTHS", (64, 32))


def trained(shift, steps=60):
    torch.manual_seed(0)
    alignment = AdversarialAlignment(DomainDiscriminator(16, 2))
    for _ in range(steps):
        alignment.loss(features(0.0), features(shift))
        alignment.step()
    return alignment


def test_identical_domains_leave_the_mask_near_0_and_different_ones_raise_it():
    same, other = trained(0.0).diagnostics(), trained(1.5).diagnostics()
    assert same["mask_mean"] < 0.1 and 0.4 < same["domain_accuracy"] < 0.6
    assert other["mask_mean"] > 0.3 and other["domain_accuracy"] > 0.8


def test_each_gradient_reaches_its_own_side_alone():
    alignment = trained(1.5, 20)
    before = copy.deepcopy(alignment.discriminator.state_dict())
    alignment.weight = 1.0
    source, target = features(0.0).requires_grad_(), features(1.5).requires_grad_()
    for p in alignment.discriminator.parameters():
        p.grad = None  # of its training
    alignment.loss(source, target).backward()
    assert target.grad.abs().max() > 0 and source.grad is None
    assert all(p.grad is None for p in alignment.discriminator.parameters())
    target.grad = None
    alignment.step()
    assert target.grad is None and source.grad is None
    assert all(p.grad is not None and not p.requires_grad for p in alignment.discriminator.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in alignment.discriminator.state_dict().items())


def test_the_loss_is_the_equation_and_the_ablation_has_no_mask():
    alignment, target = trained(1.5, 20), features(1.5)
    score = alignment.discriminator(target)
    alignment.weight = 0.25
    expected = 0.25 * ((2 * score - 1).abs().clamp(0, 1) * (score - 1) ** 2).mean()
    torch.testing.assert_close(alignment.loss(target, target), expected)
    alignment.mask = False
    torch.testing.assert_close(alignment.loss(target, target), 0.25 * ((score - 1) ** 2).mean())
    alignment.weight = 0.0
    assert alignment.loss(target, target) is None


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("domain", ["source", "target"])
def test_features_that_are_not_finite_show_in_the_loss_and_never_reach_the_discriminator(value, weight, domain):
    """Under AMP nothing else would stop them: the discriminator has no gradient scaler."""
    alignment, source, target = trained(1.5, 5), features(0.0), features(1.5)
    alignment.weight = weight
    before = {key: tensor.clone() for key, tensor in alignment.discriminator.state_dict().items()}
    (source if domain == "source" else target)[0, 0, 0, 0] = value
    loss = alignment.loss(source, target)
    assert loss is None if weight == 0 else domain == "source" or not torch.isfinite(loss)
    alignment.step()
    after = alignment.discriminator.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    for key in ("mean", "square", "batches"):
        assert torch.equal(after[key], before[key])
    alignment.loss(features(0.0), features(1.5))
    alignment.step()
    assert not torch.equal(alignment.discriminator.mean, before["mean"])


def test_the_alignment_closes_a_shift_of_the_features():
    alignment = trained(1.5, 40)
    shift = torch.zeros(1, 16, 1, 1)
    shift[:, :4] = 1.5
    shift.requires_grad_()
    optimizer = torch.optim.Adam([shift], 0.02)
    alignment.weight = 1.0
    for _ in range(100):
        optimizer.zero_grad()
        alignment.loss(features(0.0), features(0.0) + shift).backward()
        optimizer.step()
        alignment.step()
    assert shift[:, :4].detach().abs().mean() < 0.75


def test_only_translated_samples_count_as_source():
    alignments = [trained(1.0, 3) for _ in range(3)]
    source, target = features(0.0, seed=1), features(1.0, seed=2)
    other = source.clone()
    other[1:] += 5.0
    first = torch.tensor([True, False, False, False])
    for alignment, images, chosen in zip(alignments, (source, other, other), (first, first, ~first), strict=True):
        alignment.discriminator.observe = lambda *_: None  # moments are of all samples
        alignment.loss(images, target)
        alignment.step(chosen)
    one, two, three = (torch.cat([p.flatten() for p in a.discriminator.parameters()]) for a in alignments)
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, three, atol=1e-6)
    alignments[0].loss(source, target)
    alignments[0].step(torch.zeros(4, dtype=torch.bool))  # none translated: the target's loss alone
    assert all(torch.isfinite(p).all() for p in alignments[0].discriminator.parameters())


def test_the_weight_of_the_alignment_is_a_ramp():
    weights = [alignment_weight(t, 0.2, (1e-3, 5e-3)) for t in (0, 0.19, 0.2, 0.6, 1)]
    assert weights == pytest.approx([0, 0, 1e-3, 3e-3, 5e-3])


# ---- the gap between domains ----


def test_the_gap_shrinks_by_a_right_translation_and_forgets_its_batches():
    gap, target = DomainGap(), torch.randn(2, 1, 16, 16)
    for _ in range(3):
        gap.remember(torch.randn(2, 1, 16, 16) * 3 + 5, target)
    found = gap.measure(lambda x: torch.cat([x, -x], 1), lambda x: (x - 5) / 3)
    assert found["gap_intensity"] == pytest.approx((5**2 + 2**2) ** 0.5, rel=0.15)  # W_2 of two Gaussians
    for kind in ("intensity", "features"):
        assert found.pop(f"gap_{kind}_translated") < 0.2 * found.pop(f"gap_{kind}")
    assert found == gap.measure(lambda x: x, None) == {}

"""The Global and the Region Compensation Unit, alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.architectures.grcsf import compensation_units
from nnunet_l2g.architectures.grcsf.compensation_units import (
    GlobalCompensationUnit,
    RegionCompensationUnit,
    SqueezeExcitation,
)
from nnunet_l2g.architectures.grcsf.cross_attention import CrossAttention
from nnunet_l2g.architectures.grcsf.patches import patchify, sincos_positions, unpatchify

torch.set_num_threads(1)


def features(dims, seed=0, low=4):
    generator = torch.Generator().manual_seed(seed)
    size = (8, 12, 16)[:dims]
    f = torch.randn(2, low, *size, generator=generator)
    return f, torch.randn(2, 6, *(s // 2 for s in size), generator=generator)


# ---- GCU ----


@pytest.mark.parametrize("dims", [2, 3])
def test_gcu_equals_its_equation(dims):
    torch.manual_seed(0)
    unit = GlobalCompensationUnit(4, 6, dims)
    nn.init.constant_(unit.gamma, 0.7)
    f, below = features(dims)
    found, gap, loss = unit(f, below)
    weight = unit.match.weight.flatten(1)
    ru = F.interpolate(
        torch.einsum("oc,bc...->bo...", weight, below), f.shape[2:], mode="bilinear" if dims == 2 else "trilinear"
    )
    ru = ru + unit.match.bias.reshape(1, -1, *[1] * dims)  # a 1x1 convolution and the upsampling commute
    a, b = unit.excitation(f), unit.excitation(ru)
    m = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(gap[:, 0], m, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, f * (1 + 0.7 * m[:, None]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        loss, 0.1 * (1 - (f * ru).sum(1) / (f.norm(dim=1) * ru.norm(dim=1))).mean(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_gcu_adds_nothing_when_upsampling_is_lossless(dims):
    """Features that are constant in space survive the way down and up; with W the identity, RU = F."""
    torch.manual_seed(0)
    unit = GlobalCompensationUnit(4, 4, dims)
    nn.init.constant_(unit.gamma, 1.0)
    nn.init.dirac_(unit.match.weight)
    nn.init.zeros_(unit.match.bias)
    values = torch.randn(2, 4, *[1] * dims)
    f, below = values.expand(2, 4, *[8] * dims), values.expand(2, 4, *[4] * dims)
    found, gap, loss = unit(f, below)
    assert gap.abs().max() < 1e-5 and loss < 1e-6
    torch.testing.assert_close(found, f, rtol=1e-4, atol=1e-5)
    sharp = f.clone()
    sharp[..., 3] *= torch.tensor([1.0, -1, 1, -1]).reshape(4, *[1] * (dims - 1))  # detail that the level below lacks
    gap = unit(sharp, below)[1]
    assert gap[..., 3].min() > 10 * gap[..., 6].max().clamp_min(1e-4)


def test_gcu_starts_as_identity_and_pulls_only_the_level_below():
    unit = GlobalCompensationUnit(4, 6, 2)
    f, below = (x.requires_grad_() for x in features(2))
    found, gap, loss = unit(f, below)
    assert torch.equal(found, f) and gap.min() >= 0 and gap.max() <= 2
    loss.backward()
    assert f.grad is None and below.grad.abs().max() > 0


def test_gcu_auxiliary_loss_learns_to_restore():
    torch.manual_seed(0)
    unit = GlobalCompensationUnit(4, 6, 2)
    mixing = torch.randn(4, 6)
    below = torch.randn(4, 6, 6, 6)
    f = F.interpolate(torch.einsum("oc,bcyx->boyx", mixing, below), (12, 12), mode="bilinear")
    optimizer = torch.optim.Adam(unit.parameters(), 0.03)
    before = unit(f, below)[1].mean()
    for _ in range(300):
        optimizer.zero_grad()
        unit(f, below)[2].backward()
        optimizer.step()
    assert unit(f, below)[1].mean() < 0.05 * before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_gcu_is_finite_under_autocast_with_features_of_any_size(dtype, scale):
    unit = GlobalCompensationUnit(4, 6, 2)
    nn.init.constant_(unit.gamma, 0.1)
    f, below = ((scale * x).to(dtype).requires_grad_() for x in features(2))
    with torch.autocast("cpu", dtype=dtype):
        found, gap, loss = unit(f, below)
    assert found.dtype == dtype and gap.dtype == loss.dtype == torch.float32
    (found.float().mean() + loss).backward()
    assert all(torch.isfinite(x).all() for x in (found, gap, loss, f.grad, below.grad))


def test_squeeze_excitation_weights_each_channel_by_its_mean():
    unit = SqueezeExcitation(8)
    x = torch.randn(2, 8, 5, 5)
    shuffled = x.flatten(2)[:, :, torch.randperm(25)].reshape(x.shape)
    torch.testing.assert_close(unit(x).sum((2, 3)), unit(shuffled).sum((2, 3)))
    ratio = unit(x) / x
    assert ratio.std((2, 3)).max() < 1e-4 and ((ratio > 0) & (ratio < 1)).all()


# ---- RCU ----

UNITS = {"full": ((1, 1), (16, 16)), "half": ((2, 2), (8, 8)), "anisotropic": ((1, 2), (16, 8))}


def make_unit(kind="full", **settings):
    torch.manual_seed(0)
    return RegionCompensationUnit(4, 6, 3, (4, 4), UNITS[kind][0], **{"dim": 16, "heads": 2, "detail": 3, **settings})


def rcu_input(kind="full", seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(2, 4, *UNITS[kind][1], generator=generator)
    maps = tuple(torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    return u, maps, torch.randn(2, 6, 2, 2, generator=generator), sincos_positions((4, 4), 16)


@pytest.mark.parametrize("kind", UNITS)
def test_rcu_starts_as_identity(kind):
    u, *rest = rcu_input(kind)
    found, importance = make_unit(kind)(u, *rest)
    assert torch.equal(found, u) and importance.shape == (2, 1, 4, 4)
    assert importance.min() > 0 and importance.max() < 1


@pytest.mark.parametrize("kind", UNITS)
def test_rcu_equals_its_equation(kind):
    unit = make_unit(kind)
    nn.init.normal_(unit.conv.weight)
    nn.init.normal_(unit.mix)
    u, maps, bottleneck, position = rcu_input(kind)
    tokens = unit.norm_queries(unit.to_queries(patchify(u, unit.level_token)))
    attended = 0
    for w, embed, r in zip(unit.mix, unit.embed, maps, strict=True):
        v = embed(patchify(r, (4, 4)))
        attended = attended + w * plain_attention(unit.attention, tokens + position, v + position, v)
    hidden = F.gelu(unit.importance_token(tokens) + unit.importance_global(bottleneck.mean((2, 3)))[:, None])
    importance = torch.sigmoid(unit.importance(hidden))
    expected = u + unit.conv(unpatchify(unit.unpatch(importance * attended), unit.level_token, (4, 4)))
    torch.testing.assert_close(unit(u, maps, bottleneck, position)[0], expected, rtol=1e-4, atol=1e-4)


def plain_attention(attention, queries, keys, values):
    """Head by head."""
    q, k, v = attention.query(queries), attention.key(keys), attention.value(values)
    heads = []
    for part in torch.arange(q.shape[-1]).chunk(attention.heads):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / len(part) ** 0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    return attention.project(torch.cat(heads, -1))


def test_attention_equals_the_plain_one():
    torch.manual_seed(0)
    attention = CrossAttention(12, heads=3)
    queries, context = torch.randn(2, 7, 12), torch.randn(2, 9, 12)
    expected = plain_attention(attention, queries, context, context)
    torch.testing.assert_close(attention(queries, context, context), expected, rtol=1e-4, atol=1e-5)


def test_a_lesion_in_the_map_changes_the_features_and_positions_say_where():
    """The same map content at another place gives another answer: without positions it would not."""
    unit = make_unit()
    nn.init.normal_(unit.conv.weight)
    u, _, bottleneck, position = rcu_input()
    u = torch.zeros_like(u)
    answers = []
    for place in ((0, 0), (8, 12)):
        blob = torch.zeros(2, 3, 16, 16)
        blob[:, :, place[0] : place[0] + 4, place[1] : place[1] + 4] = 3.0
        answers.append(unit(u, (blob, blob), bottleneck, position)[0])
    assert not torch.allclose(answers[0], answers[1], atol=1e-5)
    without = [unit(u, (m, m), bottleneck, torch.zeros_like(position))[0] for m in (blob, blob.flip(2, 3))]
    assert torch.allclose(*without, atol=1e-5)


def test_a_level_that_tokens_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"stride \(8, 8\) does not divide token size \(4, 4\)"):
        RegionCompensationUnit(4, 6, 3, (4, 4), (8, 8))


@pytest.mark.parametrize("dims", [2, 3])
def test_gcu_keeps_its_inputs_alone_and_has_the_gradients_of_the_plain_way(dims):
    """Values and gradients with and without recomputation; what is kept of the feature maps is features, once, and the gap."""
    unit = GlobalCompensationUnit(4, 6, dims).train()
    nn.init.constant_(unit.gamma, 0.7)
    f, below = features(dims)
    results, kept = [], []
    for recompute in (True, False):
        unit.zero_grad()
        x, y = f.clone().requires_grad_(), below.clone().requires_grad_()
        sizes = []
        plain = pytest.MonkeyPatch()
        if not recompute:
            plain.setattr(compensation_units, "checkpoint", lambda function, *args, **_: function(*args))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out, gap, loss = unit(x, y)
        (out.square().sum() + gap.sum() + loss).backward()
        plain.undo()
        results.append((out, gap, loss, x.grad, y.grad, *(p.grad for p in unit.parameters())))
        kept.append(sum(sizes))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert kept[0] < 0.4 * kept[1]

"""L2GNet's references: token labels, assignment and collection, against oracles, closed forms and hand-made images."""

import ot
import pytest
import torch
from torch import nn

from nnunet_l2g.architectures.l2gnet import AuxiliaryHead, ClassReferences, class_references
from nnunet_l2g.architectures.l2gnet.class_references import NORM, unit
from nnunet_l2g.architectures.l2gnet.token_labels import balanced_weights, token_labels

D = 8


def make(outputs=3, seed=0, **settings):
    torch.manual_seed(seed)
    module = ClassReferences(D, outputs, **{"dim": D, "per_class": 2, **settings})
    nn.init.eye_(module.project.weight)
    nn.init.zeros_(module.project.bias)  # tokens are the features' directions
    return module


def image(*directions, noise=0.05, grid=(8, 8), seed=0):
    """Features (1, D, *grid) in blocks of rows, one for each direction, and the number of its block for each token."""
    blocks = torch.arange(grid[0]) * len(directions) // grid[0]
    values = torch.stack([torch.eye(D)[d] for d in directions])[blocks]  # (rows, D)
    features = values.T[None, :, :, None].repeat(1, 1, 1, grid[1])
    return features + noise * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed)), blocks


def place(module, directions):
    """References (G, M) on axes of the space."""
    with torch.no_grad():
        module.references.copy_(NORM * torch.eye(D)[torch.tensor(directions)][None])


# ---- labels of tokens ----


def test_a_token_has_a_label_where_most_of_its_voxels_agree():
    target = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 0, 1], [2, 2, 2, 0]])[None, None]
    # of the first token 3 voxels of 4 are 0, but not the one in its middle
    assert token_labels(target, 3, (2, 2), False).tolist() == [[[-1, 1, 2, -1]]]


def test_ignored_voxels_belong_to_no_class():
    target = torch.full((1, 1, 4, 4), 3)
    target[..., 2:] = 1
    assert token_labels(target, 3, (2, 2), False).tolist() == [[[-1, 1, -1, 1]]]
    regions = torch.zeros(1, 3, 4, 4)
    regions[:, 0], regions[:, 1, :, 2:], regions[:, 2, 2:] = 1, 1, 1
    assert token_labels(regions, 2, (2, 2), True).tolist() == [[[1, 1, -1, -1], [0, 1, -1, -1]]]
    assert token_labels(regions[:, :2], 2, (2, 2), True).tolist() == [[[1, 1, 1, 1], [0, 1, 0, 1]]]


@pytest.mark.parametrize(("size", "grid"), [((6, 8, 10), (3, 8, 5)), ((5, 7, 9), (3, 4, 5)), ((9, 9), (9, 9))])
def test_one_class_everywhere_at_any_stride(size, grid):
    assert (token_labels(torch.full((2, 1, *size), 2.0), 3, grid, False) == 2).all()


def test_every_class_of_an_image_weighs_the_same():
    labels = torch.tensor([[[0, 0, 0, 2, -1]], [[-1, -1, -1, -1, -1]], [[1, 1, 1, 1, 1]]])
    expected = torch.tensor([[1 / 6, 1 / 6, 1 / 6, 1 / 2, 0], [0] * 5, [0.2] * 5])[:, None]
    torch.testing.assert_close(balanced_weights(labels, 3), expected)


# ---- assignment ----


def test_tokens_are_assigned_as_by_pots_plan_within_their_class(monkeypatch):
    monkeypatch.setattr(class_references, "WITHIN_CLASS", (0.05, 500))
    module, features = make(codebook=False).double(), torch.randn(2, D, 5, 6, dtype=torch.float64)
    labels = torch.randint(-1, 3, (2, 1, 30), generator=torch.Generator().manual_seed(0))
    e = module.train().relate(features)[0].detach()
    assigned = module._assign(e, labels)
    directions = unit(module.references.detach())[0]
    for tokens, label, found in zip(e.transpose(1, 2), labels[:, 0], assigned[:, 0], strict=True):
        for c in range(3):
            scores = tokens[label == c] @ directions[c].T  # (n_c, M)
            n = len(scores)
            plan = ot.sinkhorn(torch.full((n,), 1 / n).double(), torch.full((2,), 0.5).double(), -scores, 0.05, "sinkhorn_log",
                               numItermax=500, stopThr=0, warn=False)  # fmt: skip
            assert torch.equal(found[label == c], 2 * c + plan.argmax(1))


def test_no_reference_of_a_class_starves():
    """Both references of class 1 begin on the same side of its two halves."""
    features, blocks = image(0, 1, 2, noise=0.1)
    target = (blocks > 0).long()[None, None, :, None].repeat(1, 1, 1, 8)
    module = make(2, codebook=False).train()
    place(module, [[0, 3], [1, 1]])
    with torch.no_grad():
        module.references[0, 1] += NORM * torch.tensor([[0.0, 0, 0.05] + [0] * 5, [0.05, 0, 0.2] + [0] * 5])
    optimizer = torch.optim.SGD([module.references], 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        module(features)
        module.loss(target).backward()
        optimizer.step()
    cosines = unit(module.references.detach())[0, 1] @ torch.eye(D)[1:3].T
    assert cosines.amax(0).min() > 0.9, cosines  # each half of the class has a reference


# ---- collection ----


@pytest.mark.parametrize("codebook", [True, False])
def test_references_collect_their_part_of_the_image_and_move_there(codebook):
    """Each class has drifted away from its reference, by a rotation towards an axis of its own."""
    features, _ = image(0, 1, noise=0.02)
    features[:, 4, :4], features[:, 5, 4:] = 0.7, 0.7
    module = make(2, per_class=1, codebook=codebook)
    place(module, [[0], [1]])
    if codebook:
        module.quantizer.initialise(features.flatten(2).transpose(1, 2) / features.flatten(2).norm(dim=1)[..., None])
    e, _, moved = module.relate(features)
    before, after = (module._best(e, r)[0, 0] for r in (unit(module.references)[None], moved))  # (G, n)
    own = torch.arange(2).repeat_interleave(32)[None]
    assert (after.gather(0, own) > before.gather(0, own) + 0.03).all()
    assert (after.gather(0, 1 - own) < 0.2).all()


def test_collected_tokens_are_weighted_means_of_pots_columns(monkeypatch):
    monkeypatch.setattr(class_references, "WHOLE_IMAGE", (0.1, 500))  # POT begins with the other marginal
    module, features = make(2, codebook=False).double(), torch.randn(1, D, 6, 6, dtype=torch.float64)
    e = module.relate(features)[0]
    directions = unit(module.references.detach())
    found = module.collect(e, None, directions)[0, 0].flatten(0, 1)  # (p, d)
    s = e[0].T @ directions.flatten(0, 2).T  # (n, p)
    shares = (s / 0.1).softmax(1)
    n = len(s)
    plan = ot.sinkhorn(torch.full((n,), 1 / n).double(), shares.mean(0), -s, 0.1, "sinkhorn_log", numItermax=500, stopThr=0,
                       warn=False)  # fmt: skip
    of_class = shares.unflatten(1, (2, 2)).sum(2).repeat_interleave(2, 1)
    torch.testing.assert_close(found, (plan / plan.sum(0) * of_class).T @ e[0].T, rtol=1e-6, atol=1e-8)


def test_a_patch_of_background_alone_invents_no_structure():
    """Columns of the plan sum to 1 even where a class is absent: its references must stay where they are all the same."""
    features, _ = image(0, 3, noise=0.05)  # background alone, of two kinds; class 1 would be at 1 and 2
    module = make(2, codebook=False)
    place(module, [[0, 3], [1, 2]])
    with torch.no_grad():
        module.references[0, 1] += 0.4 * NORM * torch.eye(D)[[0, 3]]  # a structure that looks a little like background
        module.beta.fill_(1.0)
    with torch.no_grad():
        e, _, moved = module.relate(features)
        directions = unit(module.references)
    assert float((moved * directions).sum(4)[0, 0, 1].min()) > 0.99
    margin = module._best(e, moved)[0, 0].diff(dim=0) - module._best(e, directions[None])[0, 0].diff(dim=0)
    assert float(margin.max()) < 0.02
    # without the tokens' own class, columns alone would pull it to the background
    s = (e.transpose(1, 2) @ directions.flatten(1, 2).transpose(1, 2)) / 0.1
    pulled = unit(directions + (s.softmax(1).transpose(1, 2) @ e.transpose(1, 2)).view_as(directions))
    assert float((pulled * directions).sum(3)[0, 1].min()) < 0.95


def test_references_are_placed_on_the_parts_of_their_class_from_counts_of_codes():
    features, blocks = image(0, 1, 2, 3, noise=0.1)
    target = (blocks // 2)[None, None, :, None].repeat(1, 1, 1, 8)
    module = make(2, seed=1).train()
    module.placement_step = 4
    placed = []
    for _ in range(5):
        module(features)
        module.loss(target)
        placed.append(module.after_step())
    assert [len(parameters) for parameters in placed] == [0, 0, 0, 1, 0] and placed[3][0] is module.references
    cosines = unit(module.references.detach())[0] @ torch.eye(D)[:4].T  # (G, M, axis)
    assert cosines[0, :, :2].amax(0).min() > 0.95 and cosines[1, :, 2:].amax(0).min() > 0.95
    torch.testing.assert_close(module.references.detach().norm(dim=3), torch.full((1, 2, 2), NORM))


def test_labels_teach_projection_and_references_which_tokens_are_whose():
    torch.manual_seed(0)
    module = ClassReferences(24, 3, per_class=2, dim=8).train()
    module.placement_step = 20
    target = torch.zeros(2, 1, 16, 16)
    target[:, :, 2:7, 3:12], target[:, :, 10:14, 4:8] = 1, 2
    z = torch.randn(2, 24, 16, 16)
    z[:, :1] += 3 * (target == 1)  # the class, in two weak channels of many
    z[:, 1:2] += 3 * (target == 2)
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9), []
    for _ in range(80):
        optimizer.zero_grad()
        evidence = module(z)
        (loss := module.loss(target)).backward()
        optimizer.step()
        for parameter in module.after_step():
            optimizer.state.pop(parameter)
        losses.append(float(loss))
    right = (evidence.argmax(1, keepdim=True) == target).float()
    assert losses[-1] < 0.4 * losses[0] and float(right[target > 0].mean()) > 0.8
    values = module.diagnostics(module.relate(z)[2])
    assert values["references_used"] == 6 and 0.01 < values["reference_drift"] < 2 and 0 < values["moved_by_image"] < 1
    assert module.diagnostics(module.relate(z)[2])["references_used"] == 0  # counted since the last call


# ---- troubles ----

FINITE = {
    "a class that is absent": (3, 5, torch.zeros(1, 1, 4, 4)),
    "all ignored": (3, 2, torch.full((1, 1, 4, 4), 3.0)),
    "fewer tokens than references": (3, 9, torch.tensor([[0, 0, 1, 2]]).repeat(4, 1)[None, None].float()),
}


@pytest.mark.parametrize("settings", [{}, {"codebook": False}, {"nearest": True}, {"moved": False}, {"readout": False}])
@pytest.mark.parametrize("case", FINITE)
def test_losses_and_gradients_are_finite(case, settings):
    classes, per_class, target = FINITE[case]
    module = make(classes, per_class=per_class, **settings).train()
    module.placement_step = 2
    f = torch.randn(1, D, 4, 4).requires_grad_()
    for _ in range(4):
        evidence = module(f)
        loss = module.loss(target) + (0 if evidence is None else evidence.sum())
        loss.backward()
        module.after_step()
    assert torch.isfinite(loss) and torch.isfinite(f.grad).all() and torch.isfinite(module.references).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    if case == "all ignored":
        assert float(module.references.grad.abs().max()) == 0 or module.readout


@pytest.mark.parametrize("make_features", [torch.zeros, torch.ones])
def test_constant_features_stay_finite(make_features):
    module = make().train()
    module.placement_step = 2
    z = make_features(2, D, 4, 4).requires_grad_()
    for _ in range(3):
        (module(z).sum() + module.loss(torch.zeros(2, 1, 4, 4))).backward()
        module.after_step()
    assert torch.isfinite(z.grad).all() and all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_is_float32_under_autocast_with_features_of_any_size(dtype, scale):
    module = make(3).train()
    z, target = (scale * torch.randn(2, D, 4, 6)).to(dtype).requires_grad_(), torch.randint(0, 3, (2, 1, 4, 6)).float()
    for _ in range(3):
        with torch.autocast("cpu", dtype=dtype):
            evidence, loss = module(z), module.loss(target)
        assert evidence.dtype == loss.dtype == torch.float32 and torch.isfinite(evidence).all() and torch.isfinite(loss)
        (evidence.mean() + loss).backward()
        module.after_step()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    torch.testing.assert_close(evidence, module(z.float()), rtol=1e-2, atol=1e-2)


def test_nonfinite_features_are_refused_before_they_reach_the_codebook():
    module = make().train()
    before = module.quantizer.codebook.clone()
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        module(torch.full((1, D, 4, 4), float("nan")))
    assert torch.equal(module.quantizer.codebook, before) and module.quantizer.pending is None


def test_regions_may_overlap():
    """One inside of the other: evidence is high in both for what is in both."""
    features, blocks = image(0, 1, 2, noise=0.05, grid=(9, 9))
    target = torch.stack([blocks > 0, blocks > 1])[None, :, :, None].repeat(1, 1, 1, 9).float()
    module = make(2, regions=True, seed=3).train()
    module.placement_step = 3
    for _ in range(6):
        evidence = module(features)
        assert torch.isfinite(module.loss(target))
        module.after_step()
    assert torch.equal(evidence > 0, target.bool())


def test_auxiliary_head_is_a_convolution_with_balanced_cross_entropy():
    torch.manual_seed(0)
    head, f, target = AuxiliaryHead(D, 3).train(), torch.randn(2, D, 4, 4), torch.randint(0, 4, (2, 1, 4, 4))
    evidence = head(f)
    torch.testing.assert_close(evidence, nn.functional.conv2d(f, head.project.weight[..., None, None], head.project.bias))
    losses = [
        torch.stack([nn.functional.cross_entropy(one[:, own == c].T, own[own == c]) for c in own.unique() if c < 3]).mean()
        for one, own in zip(evidence, target[:, 0], strict=True)
    ]
    torch.testing.assert_close(head.loss(target), 0.3 * torch.stack(losses).mean())
    regions = AuxiliaryHead(D, 2, regions=True).train()
    regions(f)
    assert torch.isfinite(regions.loss(torch.randint(0, 2, (2, 3, 4, 4)).float()))

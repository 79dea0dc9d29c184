"""L2GNet through the shared tester, and what is its own: ablations, level, read-out, settings, DDP."""

import copy

import network_tester as tester
import pytest
import torch
from distributed import run_two_processes
from torch import nn

from nnunet_l2g.architectures import L2GNet
from nnunet_l2g.architectures.l2gnet import class_references
from nnunet_l2g.architectures.l2gnet.network import choose_level

ABLATIONS = {
    "no_codebook": {"codebook": False},
    "nearest_reference": {"nearest": True},
    "fixed_references": {"moved": False},
    "one_reference": {"per_class": 1},
    "no_readout": {"readout": False},
    "auxiliary_head": {"auxiliary_head": True},
}


@pytest.fixture(autouse=True)
def few_codes(monkeypatch):
    monkeypatch.setattr(class_references, "CODES_PER_REFERENCE", 1)  # k-means of many takes a second each time


def make(plan="plain_2d", **settings):
    return L2GNet(tester.make_backbone(plan), **settings)


def region_target(x):
    """Three regions (B, 3, *spatial), and a channel of what is ignored."""
    labels = tester.make_target(x)
    return torch.cat([labels > 0, labels > 1, labels > 5, labels > 7], 1).float()


@pytest.mark.parametrize("plan", tester.PLANS)
def test_every_plan(plan):
    tester.check_network(lambda: make(plan), plan)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation(ablation):
    tester.check_network(lambda: make(**ABLATIONS[ablation]), "plain_2d")


def test_regions(monkeypatch):
    target = region_target(tester.make_input("plain_2d"))
    monkeypatch.setattr(tester, "make_target", lambda x: target)
    tester.check_network(lambda: make(regions=True), "plain_2d")


@pytest.mark.parametrize("regions", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiled_without_graph_break_equals_eager(regions):
    """The codebook too: an update inside the compiled forward would spoil the gradients."""
    network = make(regions=regions)
    network.alpha.data.fill_(0.1)
    tester.check_compiled(network, "plain_2d", region_target if regions else tester.make_target, steps=3)


def test_the_read_out_moves_the_logits_of_full_resolution_and_no_other():
    network, x = make().eval(), tester.make_input("plain_2d")
    before = network(x)
    network.alpha.data.fill_(1.0)
    after = network(x)
    assert not torch.allclose(after[0], before[0]) and torch.equal(after[1], before[1])
    evidence = (after[0] - before[0]) * class_references.TEMPERATURE
    assert float(evidence.detach().abs().max()) <= 1 + 1e-5  # cosines
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(x), after[0])


def test_explain_has_the_logits_with_and_without_the_read_out():
    network, x = make().eval(), tester.make_input("plain_2d")
    network.alpha.data.fill_(1.0)
    found = network.explain(x)
    torch.testing.assert_close(found["logits"], network(x)[0])
    torch.testing.assert_close(found["without"], network.decoder(network.encoder(x))[0])
    assert found["cosines"].shape == (2, 15, 16, 24) and found["moved"].shape == (2, 1, 3, 5, 32)


def test_changed_voxels_is_the_share_whose_label_the_read_out_changes():
    network, x = make().train(), tester.make_input("plain_2d")
    network(x)
    assert network.diagnostics()["changed_voxels"] == 0  # alpha is 0
    network.alpha.data.fill_(0.5)
    plain, full = network.decoder(network.encoder(x[:1]))[0].argmax(1), network.eval()(x[:1])[0].argmax(1)
    assert network.diagnostics()["changed_voxels"] == pytest.approx(float((plain != full).float().mean()))
    assert network.diagnostics()["alpha"] == 0.5


def test_without_a_target_the_commitment_is_left_and_in_eval_nothing():
    network, x = make(), tester.make_input("plain_2d")
    network.train()(x)
    assert network.auxiliary_loss(tester.make_target(x)) > network.auxiliary_loss() > 0
    network.eval()(x)
    assert network.auxiliary_loss(tester.make_target(x)) is None


def test_the_patch_size_may_change_between_forwards():
    assert make().eval()(torch.randn(1, 1, 24, 64))[0].shape == (1, tester.CLASSES, 24, 64)


def test_a_step_without_a_training_forward_moves_nothing():
    network = make().train()
    tester.train_steps(network, tester.make_input("plain_2d"), 1)
    before = copy.deepcopy(network.state_dict())
    network.eval()(tester.make_input("plain_2d"))
    assert network.after_step() == []
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("strides", "features", "references", "level"),
    [
        ([1, 2, 2, 2, 2], 32, 15, 1),
        ([1, 2, 2, 2, 2], 32, 75, 1),  # 14 structures
        ([1, 2, 2, 2, 2], 32, 305, 2),  # 60 structures
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], 32, 20, 1),
        ([[1, 1], [2, 2], [2, 2], [2, 2]], 32, 75, 2),
        ([[1, 1], [2, 2], [2, 2], [2, 2]], 32, 10**6, 2),  # the coarsest level
        ([1, 2], 32, 15, 0),
    ],
)
def test_the_level_is_the_finest_one_with_few_enough_scores(strides, features, references, level):
    strides = [stride if isinstance(stride, list) else [stride] * 3 for stride in strides]
    assert choose_level(strides, features, references) == level


def _ddp_steps(rank, batches):
    """Four steps, the second of which places the references; under DDP, or with rank None in one process on whole batches."""
    network = make("plain_2d").train()
    network.alpha.data.fill_(0.1)
    network.l2g.steps.fill_(100)  # past the placement of codes, which sees the tokens of rank 0 only
    network.l2g.placement_step = 102
    network.l2g.quantizer.dead_below = 0.0  # codes restart at tokens of rank 0
    wrapped = network if rank is None else nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9, nesterov=True)
    for x in batches if rank is None else [batch.chunk(2)[rank] for batch in batches]:
        optimizer.zero_grad()
        loss = sum(o.square().mean() for o in wrapped(x)) + network.auxiliary_loss(tester.make_target(x))
        loss.backward()
        optimizer.step()
        torch.manual_seed(0)
        network.after_step()
    return {name: p.grad for name, p in network.named_parameters()}, network.state_dict()


def test_two_processes_train_like_one_with_the_whole_batch(monkeypatch):
    monkeypatch.undo()  # the processes have as many codes as users have
    batches = [torch.randn(4, 1, 32, 48) for _ in range(4)]
    first, second = run_two_processes(_ddp_steps, batches)
    for found, other, expected in zip(first, second, _ddp_steps(None, batches), strict=True):
        for name, value in expected.items():
            assert torch.equal(found[name], other[name]), name
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


# ---- refusals ----


def test_plain_weights_are_refused_where_a_checkpoint_is_continued():
    with pytest.raises(RuntimeError, match=r"not L2GNet's.*-pretrained_weights"):
        make().load_state_dict(tester.make_backbone("plain_2d").state_dict())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (
            {"network": "L2GNet", "format": 2, "level": 0, "regions": True},
            "level: checkpoint 0, here 1; regions: checkpoint True",
        ),
        # of the bottleneck block
        ({"network": "L2GNet", "format": 1, "levels": [-1]}, r"other settings \(format: checkpoint 1, here 2\)\. Use the"),
    ],
)
def test_weights_of_other_settings_are_refused_by_name(other, named):
    old = make()
    old.store_settings({"auxiliary_head": False, **other})
    with pytest.raises(RuntimeError, match=named):
        make().load_state_dict(old.state_dict())


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"per_class \(M\) is 0, expected at least 1"):
        make(per_class=0)


def test_backbones_without_encoder_and_decoder_are_refused():
    with pytest.raises(NotImplementedError, match="Sequential"):
        L2GNet(nn.Sequential(nn.Conv2d(1, 2, 1)))

"""GRCSF through the shared tester, and what is its own: twins, frozen autoencoder, levels, settings, pictures' ingredients."""

import copy

import network_tester as tester
import pytest
import torch
from distributed import run_two_processes
from torch import nn

from nnunet_l2g.architectures import GRCSF
from nnunet_l2g.architectures.grcsf.network import fitting_levels, level_strides

SMALL = dict(dim=16, autoencoder=dict(width=16, depth=1, decoder_width=12, decoder_depth=1))
TWINS = {
    "grcsf": {},
    "no_gcu": {"gcu": False},
    "no_rcu": {"residual": None},
    "other": {"residual": "other"},
    "dog": {"residual": "dog"},
    "plain": {"gcu": False, "residual": None},
}
TOKENS = {  # of the tester's plans
    "plain_2d": (8, 8),
    "plain_3d": (4, 4, 4),
    "plain_3d_anisotropic": (2, 8, 8),
    "plain_3d_4_channels": (4, 4, 4),
    "resenc_2d_3_channels": (4, 4),
    "resenc_3d_anisotropic": (1, 8, 8),
}


def make(plan="plain_3d", **settings):
    patch = tester.PLANS[plan][3]
    return GRCSF(tester.make_backbone(plan), patch, TOKENS[plan], **{**SMALL, **settings})


@pytest.mark.parametrize("plan", tester.PLANS)
@pytest.mark.parametrize("twin", TWINS)
def test_every_plan_and_twin(plan, twin):
    settings = TWINS[twin]
    tester.check_starts_as_plain(make(plan, **settings), plan)
    tester.check_logits_only(make(plan, **settings), plan)
    tester.check_every_parameter_learns(make(plan, **settings), plan)
    tester.check_saves_and_loads(make(plan, **settings), make(plan, **settings), plan)
    tester.check_copies(make(plan, **settings), plan)


def test_the_autoencoder_is_frozen_and_never_reached_by_a_gradient():
    network = make()
    before = copy.deepcopy(network.autoencoder.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    for _ in range(2):
        tester.training_loss(network.train(), tester.make_input("plain_3d")).backward()
        optimizer.step()
    assert all(p.grad is None for p in network.autoencoder.parameters())
    assert all(torch.equal(value, network.autoencoder.state_dict()[key]) for key, value in before.items())


def wake(network):
    """Takes the units out of their zero start, so that what they are given reaches the logits."""
    for unit in network.rcu.values():
        nn.init.normal_(unit.conv.weight)
    for unit in network.gcu:
        nn.init.constant_(unit.gamma, 0.5)
    return network


@pytest.mark.parametrize("twin", ["grcsf", "other", "dog"])
def test_what_the_twins_look_at(twin):
    """The image, through the autoencoder or through Gaussians; or the image of the step before, also at prediction."""
    network, x = wake(make(**TWINS[twin])), tester.make_input("plain_3d")
    tester.train_steps(network.train(), x, 1)
    network.eval()
    maps = [network._residual_maps(y, {}) for y in (x, x.flip(2))]
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True)) == (twin == "other")
    if twin == "other":
        assert network.other_maps.any()
        before = copy.deepcopy(network.other_maps)
        network(x)
        network.after_step()
        assert torch.equal(before, network.other_maps)  # prediction leaves it as it is
        tester.train_steps(network.train(), x.flip(2), 1)
        assert not torch.equal(before, network.other_maps)


def test_prediction_is_deterministic():
    network, x = wake(make()).eval(), tester.make_input("plain_3d")
    with torch.no_grad():
        assert torch.equal(network(x)[0], network(x)[0])
        alone = torch.cat([network(x[i : i + 1])[0] for i in range(2)])
    torch.testing.assert_close(network(x)[0], alone, rtol=1e-3, atol=1e-4)  # nor does it depend on the rest of the batch


def test_patch_size_may_change():
    assert make().eval()(torch.randn(1, 1, 24, 16, 32))[0].shape == (1, tester.CLASSES, 24, 16, 32)


def test_explain_shows_every_part_and_leaves_the_network_as_it_was():
    network, x = make().train(), tester.make_input("plain_3d")
    tester.training_loss(network, x)
    found = network.explain(x)
    patch = tuple(x.shape[2:])
    channels = {"mean_50": 1, "mean_75": 1, "residual_50": 1, "residual_75": 1, "map_50": 3, "map_75": 3, "compensation": 1}
    assert {key: value.shape[1] for key, value in found.items() if key in channels} == channels
    assert all(found[key].shape[2:] == patch for key in (*channels, "logits"))
    assert [key for key in found if key.startswith("importance")] == ["importance_0", "importance_1"]
    assert all(torch.isfinite(value).all() for value in found.values())
    assert network.training and network.decoder.deep_supervision


def test_diagnostics_are_those_promised():
    for settings in TWINS.values():
        network = make(**settings)
        assert list(network.diagnostics()) == network.diagnostic_keys()


def test_levels_that_tokens_fit():
    strides = level_strides([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], 3)
    assert strides == [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]
    assert fitting_levels((2, 8, 8), strides) == [0, 1, 2] and fitting_levels((1, 8, 8), strides) == [0, 1]
    assert sorted(make("resenc_2d_3_channels").rcu) == ["0", "1", "2"]  # four stages: all three decoder levels
    assert sorted(make(rcu_levels=1).rcu) == ["1"]  # the last one


# at 1e4 the first convolution of plain nnU-Net may exceed float16 by itself
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1e-4), (torch.float16, 1e3), (torch.bfloat16, 1e-4), (torch.bfloat16, 1e4)]
)
def test_finite_under_autocast_with_images_of_any_size(dtype, scale):
    network, x = wake(make("plain_2d")).train(), scale * tester.make_input("plain_2d")
    with torch.autocast("cpu", dtype=dtype):
        loss = tester.training_loss(network, x)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


# ---- torch.compile, DDP ----


# inductor, which nnU-Net uses, takes a minute or more for each network; the twins' graphs are run by eager's own kernels
@pytest.mark.parametrize(
    ("twin", "backend"),
    [
        pytest.param("grcsf", "inductor", marks=pytest.mark.long),
        pytest.param("grcsf", "aot_eager", marks=pytest.mark.slow),
        *(pytest.param(twin, "aot_eager", marks=pytest.mark.long) for twin in ("other", "dog", "no_rcu")),
    ],
)
def test_compiled_without_graph_break_equals_eager_in_train_mode(twin, backend):
    torch._dynamo.reset()
    x = tester.make_input("plain_2d")
    eager = tester.smooth(wake(make("plain_2d", **TWINS[twin]))).train()
    raw = copy.deepcopy(eager)
    compiled = torch.compile(raw, backend=backend, fullgraph=True)
    for _ in range(2):
        losses = []
        for forward, network in ((eager, eager), (compiled, raw)):
            network.zero_grad()
            loss = sum(o.square().mean() for o in forward(x)) + (network.auxiliary_loss() or 0)
            loss.backward()
            network.after_step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    for (name, one), two in zip(eager.named_parameters(), raw.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(two.grad, one.grad, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def _ddp_gradients(rank, x):
    network = wake(make("plain_2d")).train()
    wrapped = network if rank is None else torch.nn.parallel.DistributedDataParallel(network)
    x = x if rank is None else x.chunk(2)[rank]
    for _ in range(2):  # DDP complains about an unused parameter at the second step
        network.zero_grad()
        (sum(o.square().mean() for o in wrapped(x)) + network.auxiliary_loss()).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch():
    x = torch.randn(4, 1, 32, 48)
    first, second = run_two_processes(_ddp_gradients, x)
    for name, value in _ddp_gradients(None, x).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# ---- weights, bad input ----


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("plain_3d", {"gcu": False}), "gcu: checkpoint False, here True"),
        (("plain_3d", {"residual": "other"}), "residual: checkpoint 'other', here 'autoencoder'"),
        (("plain_3d_4_channels", {}), "channels: checkpoint 4, here 1"),
        (("plain_3d_anisotropic", {}), r"token_size: checkpoint \[2, 8, 8\], here \[4, 4, 4\]"),
    ],
)
def test_weights_of_other_settings_or_channels_are_refused_by_name(other, named):
    plan, settings = other
    with pytest.raises(RuntimeError, match=named):
        make().load_state_dict(make(plan, **settings).state_dict())


def test_vanilla_weights_load():
    vanilla = tester.make_backbone("plain_3d")
    for parameter in vanilla.parameters():
        nn.init.normal_(parameter)
    network = make()
    network.plain_weights_only = True
    assert set(network.state_dict()) == set(vanilla.state_dict())
    network.load_state_dict(vanilla.state_dict())
    assert network.plain_weights_loaded and torch.equal(network.encoder.stages[0][0].convs[0].conv.weight,
                                                        vanilla.encoder.stages[0][0].convs[0].conv.weight)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"residual": "mae"}, "residual is 'mae', expected one of 'autoencoder'"),
        ({"rcu_levels": 0}, "rcu_levels is 0"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        make(**settings)


def test_tokens_that_do_not_divide_the_patch_are_refused():
    with pytest.raises(ValueError, match="not divisible by token size"):
        GRCSF(tester.make_backbone("plain_3d"), (16, 16, 24), (5, 4, 4))


def test_backbones_without_encoder_and_decoder_are_refused():
    with pytest.raises(NotImplementedError, match="Sequential"):
        GRCSF(nn.Sequential(nn.Conv2d(1, 2, 1)), (16, 16), (4, 4))

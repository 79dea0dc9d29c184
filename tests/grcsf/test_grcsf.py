"""GRCSF through the shared tester, and what is its own: ablations, frozen autoencoder, levels, settings, `explain`."""

import copy

import network_tester as tester
import pytest
import torch
from distributed import run_two_processes
from torch import nn

from nnunet_l2g.architectures import GRCSF
from nnunet_l2g.architectures.grcsf.network import fitting_levels, level_strides

SMALL = dict(dim=16, autoencoder=dict(width=16, depth=1, decoder_width=12, decoder_depth=1))
FORMS = {
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
def test_every_plan(plan):
    tester.check_network(lambda: make(plan), plan)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "grcsf"])
def test_every_ablation(form):
    tester.check_network(lambda: make(**FORMS[form]), "plain_3d")


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


@pytest.mark.parametrize("form", ["grcsf", "other", "dog"])
def test_what_the_units_read(form):
    """Maps of the image, by the autoencoder or by Gaussians, or of the image of the step before, at prediction too."""
    network, x = wake(make(**FORMS[form])), tester.make_input("plain_3d")
    tester.train_steps(network.train(), x, 1)
    network.eval()
    maps = [network._residual_maps(y, {}) for y in (x, x.flip(2))]
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True)) == (form == "other")
    if form == "other":
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


def test_levels_that_tokens_fit():
    strides = level_strides([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], 3)
    assert strides == [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]
    assert fitting_levels((2, 8, 8), strides) == [0, 1, 2] and fitting_levels((1, 8, 8), strides) == [0, 1]
    assert sorted(make("resenc_2d_3_channels").rcu) == ["0", "1", "2"]  # four stages: all three decoder levels


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


# inductor, which nnU-Net uses, takes a minute or more; aot_eager runs the same graphs with eager's own kernels
@pytest.mark.parametrize(
    ("form", "backend"),
    [
        pytest.param("grcsf", "inductor", marks=pytest.mark.long),
        pytest.param("grcsf", "aot_eager", marks=pytest.mark.slow),
        *(pytest.param(form, "aot_eager", marks=pytest.mark.long) for form in ("other", "dog", "no_rcu")),
    ],
)
def test_compiled_without_graph_break_equals_eager(form, backend):
    tester.check_compiled(wake(make("plain_2d", **FORMS[form])), "plain_2d", backend=backend)


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


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="residual is 'mae', expected one of 'autoencoder'"):
        make(residual="mae")


def test_tokens_that_do_not_divide_the_patch_are_refused():
    with pytest.raises(ValueError, match="not divisible by token size"):
        GRCSF(tester.make_backbone("plain_3d"), (16, 16, 24), (5, 4, 4))


def test_backbones_without_encoder_and_decoder_are_refused():
    with pytest.raises(NotImplementedError, match="Sequential"):
        GRCSF(nn.Sequential(nn.Conv2d(1, 2, 1)), (16, 16), (4, 4))

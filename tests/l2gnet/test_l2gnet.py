"""L2GNet through the shared tester, and what is its own: ablations, level, settings, vanilla weights, compile, DDP."""

import copy

import network_tester as tester
import pytest
import torch
from distributed import run_two_processes
from torch import nn

from nnunet_l2g.architectures import L2GNet
from nnunet_l2g.architectures.l2gnet import class_references
from nnunet_l2g.architectures.l2gnet.network import choose_level
from nnunet_l2g.architectures.plan_network import decode_settings

FORMS = {
    "l2gnet": {},
    "no_codebook": {"codebook": False},
    "nearest_reference": {"nearest": True},
    "fixed_references": {"moved": False},
    "one_reference": {"per_class": 1},
    "no_readout": {"readout": False},
    "auxiliary_head": {"auxiliary_head": True},
    "regions": {"regions": True},
}


@pytest.fixture(autouse=True)
def few_codes(monkeypatch):
    monkeypatch.setattr(class_references, "CODES_PER_REFERENCE", 1)  # k-means of many takes a second each time


def make(plan="plain_2d", **settings):
    return L2GNet(tester.make_backbone(plan), **settings)


def region_target(labels):
    """(B, 1, ...) -> three regions, and what is ignored."""
    return torch.cat([labels > 0, labels > 1, labels > 5, labels > 7], 1).float()


@pytest.mark.parametrize("plan", tester.PLANS)
def test_every_plan(plan):
    check_form(plan, "l2gnet")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "l2gnet"])
def test_every_form(form, monkeypatch):
    if form == "regions":
        monkeypatch.setattr(tester, "make_target", lambda x, labels=tester.make_target: region_target(labels(x)))
    check_form("plain_2d", form)


def check_form(plan, form):
    settings = FORMS[form]
    tester.check_starts_as_plain(make(plan, **settings), plan)
    tester.check_logits_only(make(plan, **settings), plan)
    tester.check_every_parameter_learns(make(plan, **settings), plan)
    tester.check_saves_and_loads(make(plan, **settings), make(plan, **settings), plan)
    tester.check_copies(make(plan, **settings), plan)
    network = make(plan, **settings).train()
    tester.train_steps(network, tester.make_input(plan), 2)
    values = network.diagnostics()
    assert list(values) == network.diagnostic_keys() and all(value == value for value in values.values())


def test_read_out_moves_the_logits_of_full_resolution_and_no_other():
    network, x = make().eval(), tester.make_input("plain_2d")
    before = network(x)
    network.alpha.data.fill_(1.0)
    after = network(x)
    assert not torch.allclose(after[0], before[0]) and torch.equal(after[1], before[1])
    evidence = (after[0] - before[0]) * class_references.TEMPERATURE
    assert float(evidence.detach().abs().max()) <= 1 + 1e-5  # cosines
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(x), after[0])


def test_without_the_method_encoder_and_decoder_are_left():
    network, x = make().eval(), tester.make_input("plain_2d")
    network.alpha.data.fill_(1.0)
    found = network.explain(x)
    torch.testing.assert_close(found["logits"], network(x)[0])
    torch.testing.assert_close(found["without"], network.decoder(network.encoder(x))[0])
    assert found["cosines"].shape == (2, 15, 16, 24) and found["moved"].shape == (2, 1, 3, 5, 32)


def test_changed_voxels_is_the_share_whose_label_the_read_out_changes():
    network, x = make(readout=True).train(), tester.make_input("plain_2d")
    network(x)
    assert network.diagnostics()["changed_voxels"] == 0  # alpha is 0
    network.alpha.data.fill_(0.5)
    plain, full = network.decoder(network.encoder(x[:1]))[0].argmax(1), network.eval()(x[:1])[0].argmax(1)
    assert network.diagnostics()["changed_voxels"] == pytest.approx(float((plain != full).float().mean()))
    assert network.diagnostics()["alpha"] == 0.5


def test_labels_are_not_needed_where_there_are_none():
    network, x = make(), tester.make_input("plain_2d")
    network.train()(x)
    assert network.auxiliary_loss(tester.make_target(x)) > network.auxiliary_loss() > 0
    network.eval()(x)
    assert network.auxiliary_loss(tester.make_target(x)) is None


def test_patch_size_may_change_between_forwards():
    network = make().eval()
    assert network(torch.randn(1, 1, 24, 64))[0].shape == (1, tester.CLASSES, 24, 64)


def test_a_step_without_a_training_forward_moves_nothing():
    network = make().train()
    tester.train_steps(network, tester.make_input("plain_2d"), 1)
    before = copy.deepcopy(network.state_dict())
    network.eval()(tester.make_input("plain_2d"))
    assert network.after_step() == []
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_as_plain_networks_do(dtype):
    network, x = make().eval(), tester.make_input("plain_2d")
    network.alpha.data.fill_(1.0)
    expected = network(x)[0]
    found = network.to(dtype)(x.to(dtype))[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float64 else 0.3, rtol=1e-2)


# ---- where ----


@pytest.mark.parametrize(
    ("strides", "features", "references", "level"),
    [
        ([1, 2, 2, 2, 2], 32, 15, 1),
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], 32, 75, 1),  # 14 structures
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], 32, 305, 2),  # 60 structures
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], 32, 20, 1),
        ([[1, 1], [2, 2], [2, 2], [2, 2]], 32, 75, 2),
        ([[1, 1], [2, 2], [2, 2], [2, 2]], 32, 10**6, 2),  # the coarsest that there is
        ([1, 2], 32, 15, 0),
    ],
)
def test_level_is_the_finest_whose_scores_are_few(strides, features, references, level):
    strides = [stride if isinstance(stride, list) else [stride] * 3 for stride in strides]
    assert choose_level(strides, features, references) == level


# ---- torch.compile, DDP ----


@pytest.mark.parametrize("form", ["l2gnet", pytest.param("regions", marks=pytest.mark.long)])
def test_compiled_without_graph_break_equals_eager_in_train_mode(form):
    """Values, gradients and codebook over several steps: an update inside the compiled forward would spoil the gradients."""
    torch._dynamo.reset()
    x = tester.make_input("plain_2d")
    target = tester.make_target(x) if form == "l2gnet" else region_target(tester.make_target(x))
    eager, raw = (tester.smooth(make("plain_2d", **FORMS[form])).train() for _ in range(2))
    compiled = torch.compile(raw, backend="aot_eager", fullgraph=True)
    optimizers = [torch.optim.SGD(network.parameters(), 1e-2) for network in (eager, raw)]
    for step in range(3):
        raw.load_state_dict(eager.state_dict())  # the rounding of one step is not to grow in the next
        losses = []
        for forward, network, optimizer in zip((eager, compiled), (eager, raw), optimizers, strict=True):
            network.alpha.data.fill_(0.1 * step)
            optimizer.zero_grad()
            loss = sum(o.square().mean() for o in forward(x)) + network.auxiliary_loss(target)
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        for (name, one), two in zip(eager.named_parameters(), raw.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        for network, optimizer in zip((eager, raw), optimizers, strict=True):
            optimizer.step()
            torch.manual_seed(4)
            network.after_step()
        for (key, one), two in zip(eager.state_dict().items(), raw.state_dict().values(), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def _ddp_steps(rank, batches):
    """Four steps under DDP (rank None: one process, whole batches), one that places references among them: gradients, state."""
    network = make("plain_2d").train()
    network.alpha.data.fill_(0.1)
    network.l2g.steps.fill_(100)  # past the placement of codes, which sees rank 0's tokens only
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
    monkeypatch.undo()  # the processes have as many codes as nnU-Net's users
    batches = [torch.randn(4, 1, 32, 48) for _ in range(4)]
    (gradients, state), (other_gradients, other_state) = run_two_processes(_ddp_steps, batches)
    expected_gradients, expected_state = _ddp_steps(None, batches)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(gradients[name], other_gradients[name])
    for name, value in expected_state.items():
        assert torch.equal(state[name], other_state[name]), name
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


# ---- weights ----


def test_vanilla_weights_load_and_new_modules_keep_their_start():
    vanilla = tester.make_backbone("plain_2d")
    for parameter in vanilla.parameters():
        nn.init.normal_(parameter)
    network = make()
    before = {key: value.clone() for key, value in network.state_dict().items() if key.startswith(("l2g.", "alpha"))}
    network.plain_weights_only = True
    assert set(network.state_dict()) == set(vanilla.state_dict())
    network.load_state_dict(vanilla.state_dict())
    assert network.plain_weights_loaded
    network.plain_weights_only = False
    for key, value in {**vanilla.state_dict(), **before}.items():
        assert torch.equal(network.state_dict()[key], value)


def test_own_weights_load_whole_while_vanilla_ones_are_welcome():
    source, network = make(), make()
    tester.train_steps(source.train(), tester.make_input("plain_2d"), 2)
    network.plain_weights_only = True
    network.load_state_dict(source.state_dict())
    assert not network.plain_weights_loaded
    assert torch.equal(network.l2g.quantizer.codebook, source.l2g.quantizer.codebook)


def test_vanilla_weights_are_refused_where_a_checkpoint_is_continued():
    with pytest.raises(RuntimeError, match=r"not L2GNet's.*-pretrained_weights"):
        make().load_state_dict(tester.make_backbone("plain_2d").state_dict())


@pytest.mark.parametrize(
    ("other", "named"),
    [({"per_class": 1}, "per_class: checkpoint 1, here 'none'"), ({"level": 0}, "level: checkpoint 0, here 1"),
     ({"regions": True}, "regions: checkpoint True, here False")],
)  # fmt: skip
def test_weights_of_other_settings_are_refused_by_name(other, named):
    with pytest.raises(RuntimeError, match=named):
        make().load_state_dict(make(**other).state_dict())


def test_weights_of_the_old_form_are_refused_in_one_sentence():
    old = make()
    old.store_settings({"network": "L2GNet", "format": 1, "levels": [-1], "num_codes": 64, "eps": 0.1})
    with pytest.raises(
        RuntimeError, match=r"other settings \(format: checkpoint 1, here 2\)\. Use the trainer and the version"
    ):
        make().load_state_dict(old.state_dict())


def test_settings_say_what_the_weights_are():
    expected = {"network": "L2GNet", "format": 2, "level": 1, "regions": False, "auxiliary_head": False, "per_class": 2}
    assert decode_settings(make(per_class=2).settings) == expected


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"level": 7}, "decoder level 7 does not exist, expected 0 to 1 for these plans"),
        ({"level": -1}, "decoder level -1 does not exist"),
        ({"per_class": 0}, r"per_class \(M\) is 0, expected at least 1"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        make(**settings)


def test_backbones_without_encoder_and_decoder_are_refused():
    with pytest.raises(NotImplementedError, match="Sequential"):
        L2GNet(nn.Sequential(nn.Conv2d(1, 2, 1)))

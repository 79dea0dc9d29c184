"""L2GNet through the shared tester, and what is its own: twins, levels, settings, vanilla weights, compile."""

import copy

import network_tester as tester
import pytest
import torch
from distributed import run_two_processes
from torch import nn

from nnunet_l2g.architectures import L2GNet
from nnunet_l2g.architectures.plan_network import decode_settings
from nnunet_l2g.layers import L2GBlock

SMALL = dict(dim=16, num_codes=12, num_references=6, iterations=5)
TWINS = {
    "l2gnet": {},
    "no_transport": {"num_references": None},
    "no_codebook": {"num_codes": None},
    "softmax": {"iterations": 0},
    "pot": {"solver": "pot"},
    "three_levels": {"levels": (-1, -2, -3)},
}
TIED = {"levels": (), "decoder_levels": (1,), "references_per_class": 2}
CANDIDATES = {
    "class_tied": TIED,
    "class_tied_relaxed": {"references_per_class": 2, "relaxation": 0.1},
    "class_tied_shuffled": {**TIED, "shuffled_classes": True},
    "class_tied_softmax": {**TIED, "iterations": 0},
    "class_tied_without_feedback": {**TIED, "feed_back": False},
    "readout": {**TIED, "readout": "image", "over_codes": True},
    "readout_of_the_dataset": {**TIED, "readout": "dataset", "over_codes": True},
    "code_dropout": {"keep_features": 0.05},
    "many_tokens": {"levels": (-1,), "decoder_levels": (0, 1), "over_codes": True},
}


def make(plan="plain_3d", **settings):
    backbone = tester.make_backbone(plan)
    return L2GNet(backbone, **{**SMALL, **settings})


@pytest.mark.parametrize("plan", tester.PLANS)
@pytest.mark.parametrize("twin", TWINS)
def test_every_plan_and_twin(plan, twin):
    settings = TWINS[twin]
    tester.check_starts_as_plain(make(plan, **settings), plan)
    tester.check_logits_only(make(plan, **settings), plan)
    tester.check_every_parameter_learns(make(plan, **settings), plan)
    tester.check_saves_and_loads(make(plan, **settings), make(plan, **settings), plan)
    tester.check_copies(make(plan, **settings), plan)


@pytest.mark.parametrize("plan", tester.PLANS)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_every_plan_and_candidate(plan, candidate):
    settings = CANDIDATES[candidate]
    if "keep_features" not in settings:
        tester.check_starts_as_plain(make(plan, **settings), plan)
    tester.check_logits_only(make(plan, **settings), plan)
    tester.check_every_parameter_learns(make(plan, **settings), plan)
    tester.check_saves_and_loads(make(plan, **settings), make(plan, **settings), plan)
    tester.check_copies(make(plan, **settings), plan)


@pytest.mark.parametrize("twin", [*TWINS, *CANDIDATES])
def test_diagnostics_are_those_promised(twin):
    network = make(**{**TWINS, **CANDIDATES}[twin])
    tester.train_steps(network.train(), tester.make_input("plain_3d"), 2)
    values = network.diagnostics()
    assert list(values) == network.diagnostic_keys()
    assert all(value == value for value in values.values())
    if twin == "three_levels":
        assert "level-2_kept_variance" in values


def test_blocks_of_the_decoder_change_what_it_makes_at_their_level():
    """As if nnU-Net's own decoder were run in two parts."""
    network, x = make("plain_2d", **TIED), tester.make_input("plain_2d")
    tester.train_steps(network.train(), x, 3)
    network.eval()
    decoder, skips, seen = network.decoder, network.encoder(x), []
    hook = decoder.stages[0].register_forward_hook(lambda _, given, features: seen.append(network.l2g[0](features)) or seen[0])
    expected = decoder(skips)
    hook.remove()
    for one, other in zip(network(x), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert network.places == ["decoder1"]
    torch.testing.assert_close(network.explain(x)["decoder1"]["grid"], torch.tensor(seen[0].shape[2:]))


def test_read_out_moves_the_logits_of_full_resolution_and_no_other():
    network, x = make(**CANDIDATES["readout"]).eval(), tester.make_input("plain_3d")
    before = network(x)
    network.readout.alpha.data.fill_(1.0)
    after = network(x)
    assert not torch.allclose(after[0], before[0]) and torch.equal(after[1], before[1])
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(x), after[0])


def test_labels_teach_references_and_projection_which_tokens_are_theirs():
    """Features that hold the class in one weak channel of many: a plan of the tokens' own clusters would not find it."""
    torch.manual_seed(0)
    block = L2GBlock(24, dim=8, num_codes=16, num_classes=3, references_per_class=2, feed_back=False).train()
    target = torch.zeros(2, 1, 16, 16)
    target[:, :, 2:7, 3:12], target[:, :, 10:14, 4:8] = 1, 2
    z = torch.randn(2, 24, 16, 16)
    z[:, :1] += 3 * target
    optimizer, accuracy = torch.optim.SGD(block.parameters(), 0.5, momentum=0.9), []
    for _ in range(120):
        optimizer.zero_grad()
        block(z)
        (block.class_loss(target) + block.loss).backward()
        optimizer.step()
        block.after_step()
        accuracy.append(block.ties.diagnostics()["class_accuracy"])
    assert accuracy[-1] > 0.85 > 0.5 > accuracy[0]
    shares = torch.tensor([1 - 61 / 256, 45 / 256, 16 / 256, 0])
    torch.testing.assert_close(block.ties.prior, shares, atol=1e-5, rtol=0)


def test_labels_are_not_needed_where_there_are_none():
    network, x = make(**TIED), tester.make_input("plain_3d")
    network.train()(x)
    assert network.auxiliary_loss() is not None and network.auxiliary_loss(tester.make_target(x)) > network.auxiliary_loss()
    network.eval()(x)
    assert network.auxiliary_loss(tester.make_target(x)) is None


def test_code_dropout_rebuilds_whole_images_in_training_and_mixes_otherwise():
    block = make(keep_features=0.25).l2g[0]
    z, made = torch.randn(64, 16, 2, 2, 2), torch.randn(64, 16, 2, 2, 2)
    torch.testing.assert_close(block.eval()._mix(z, made), 0.25 * z + 0.75 * made)
    found = block.train()._mix(z, made)
    kept = [torch.equal(one, other) for one, other in zip(found, z, strict=True)]
    assert 4 < sum(kept) < 32
    assert all(keep or torch.equal(f, m) for keep, f, m in zip(kept, found, made, strict=True))


@pytest.mark.parametrize("settings", [{}, {"references_per_class": 2}, {"keep_features": 0.5}, {"iterations": 0}])
def test_blocks_over_codes_equal_blocks_over_tokens(settings):
    """Values, the losses and the gradients of all parameters but project_in, whose tokens share their code's mean gradient."""
    torch.manual_seed(0)
    one, z = L2GBlock(6, 8, 5, 4, num_classes=3, **settings).train(), torch.randn(2, 6, 8, 8)
    nn.init.normal_(one.project_out.weight)
    one(z)
    one.after_step()  # places codes and references
    two = copy.deepcopy(one)
    two.over_codes = True
    target, weight, results = tester.make_target(z), torch.randn(2, 6, 8, 8), []
    for block in (one, two):
        torch.manual_seed(1)
        out = block(z)
        tie = block.class_loss(target)
        ((out * weight).sum() + block.loss + (0 if tie is None else tie)).backward()
        gradients = {name: p.grad for name, p in block.named_parameters() if not name.startswith("project_in")}
        results.append((out, block.loss, tie, gradients, block.diagnostics()))
    (out, loss, tie, gradients, values), (out_2, loss_2, tie_2, gradients_2, values_2) = results
    torch.testing.assert_close(out_2, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((loss_2, tie_2) if settings.get("references_per_class") else loss_2,
                               (loss, tie) if settings.get("references_per_class") else loss)  # fmt: skip
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_2[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert values_2 == pytest.approx(values, rel=1e-3, abs=1e-4)


def test_options_that_are_off_are_not_in_the_settings():
    """Weights from before an option was there still fit."""
    stored = decode_settings(make().settings)
    assert set(stored) == {"network", "format", "levels", "dim", "num_codes", "num_references", "eps", "iterations"}
    make(levels=(), decoder_levels=(0, 1)).load_state_dict(make(levels=(), decoder_levels=(1, 0)).state_dict())
    with pytest.raises(RuntimeError, match="references_per_class: checkpoint 2, here 'none'"):
        make().load_state_dict(make(references_per_class=2).state_dict())


def test_training_changes_the_logits_through_the_block():
    network, x = make(), tester.make_input("plain_3d")
    tester.train_steps(network.train(), x, 3)
    with torch.no_grad():
        before = network.eval()(x)[0]
        network.l2g[0].gamma.zero_()
        assert not torch.allclose(network(x)[0], before)


def test_patch_size_may_change():
    network = make().eval()
    assert network(torch.randn(1, 1, 24, 32, 16))[0].shape == (1, tester.CLASSES, 24, 32, 16)


def test_memory_estimate_is_the_plain_networks():
    assert make().compute_conv_feature_map_size((16, 16, 24)) == tester.make_backbone("plain_3d").compute_conv_feature_map_size(
        (16, 16, 24)
    )


def test_steps_place_codes_first_and_references_at_the_stated_steps():
    network, x = make(reference_steps=(1, 3)), tester.make_input("plain_3d")
    references = []
    for _ in range(4):
        tester.train_steps(network.train(), x, 1)
        references.append(network.l2g[0].alignment.references.detach().clone())
    moved = [float((a - b).abs().max()) for a, b in zip(references[1:], references, strict=False)]
    assert moved[1] > 10 * max(moved[0], moved[2])  # only the third step places them again
    assert int(network.l2g[0].steps) == 4


def test_a_step_without_a_training_forward_moves_nothing():
    network = make().train()
    tester.train_steps(network, tester.make_input("plain_3d"), 1)
    before = copy.deepcopy(network.state_dict())
    network.eval()(tester.make_input("plain_3d"))
    network.after_step()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_block_is_float32_under_autocast_with_features_of_any_size(dtype, scale):
    block = make().l2g[0].train()
    nn.init.normal_(block.project_out.weight)
    z = (scale * torch.randn(2, 16, 4, 4, 6)).to(dtype).requires_grad_()
    for _ in range(3):
        with torch.autocast("cpu", dtype=dtype):
            out = block(z)
        assert out.dtype == dtype and torch.isfinite(out).all()
        assert block.loss.dtype == torch.float32 and torch.isfinite(block.loss)
        block.after_step()
    with torch.autocast("cpu", dtype=dtype):
        out = block(z)
    (out.float().mean() + block.loss / scale**2).backward()
    for name, parameter in block.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    with torch.no_grad():
        plain = block(z.float())
    torch.testing.assert_close(out.float(), plain, rtol=2e-2, atol=2e-2 * scale)


def test_constant_features_stay_finite():
    block = make().l2g[0].train()
    z = torch.ones(2, 16, 4, 4, 6).requires_grad_()
    for _ in range(2):
        (block(z).sum() + block.loss).backward()
        block.after_step()
    assert torch.isfinite(z.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


# ---- torch.compile ----


# inductor, which nnU-Net uses, takes up to a minute for each network; the others' graphs are run by eager's own kernels
@pytest.mark.parametrize(
    ("twin", "backend"),
    [
        *(pytest.param(twin, "inductor", marks=pytest.mark.long) for twin in ("l2gnet", "class_tied", "readout")),
        *(pytest.param(twin, "aot_eager", marks=pytest.mark.slow) for twin in ("l2gnet", "readout")),
        *(pytest.param(twin, "aot_eager", marks=pytest.mark.long) for twin in ("no_codebook", "no_transport", "softmax")),
        *(pytest.param(twin, "aot_eager", marks=pytest.mark.long) for twin in ("class_tied", "many_tokens")),
    ],
)
def test_compiled_without_graph_break_equals_eager_in_train_mode(twin, backend):
    """Values, gradients and codebook over several steps: an update inside the compiled forward would spoil the gradients."""
    torch._dynamo.reset()
    x = tester.make_input("plain_2d")
    eager, raw = (tester.smooth(make("plain_2d", **{**TWINS, **CANDIDATES}[twin])).train() for _ in range(2))
    if twin in CANDIDATES:  # tokens of few random codes are nearly constant at the decoder, where only rounding is left of them
        tester.train_steps(eager, x, 1)
    compiled = torch.compile(raw, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(network.parameters(), 1e-2) for network in (eager, raw)]
    for _ in range(3):
        raw.load_state_dict(eager.state_dict())  # the rounding of one step is not to grow in the next
        losses = []
        for forward, network, optimizer in zip((eager, compiled), (eager, raw), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(3)
            outputs = forward(x)
            auxiliary = network.auxiliary_loss(tester.make_target(x))
            loss = sum(o.square().mean() for o in outputs) + (0 if auxiliary is None else auxiliary)
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


# ---- DDP ----


def _ddp_steps(rank, batches):
    """Three steps under DDP (rank None: one process, whole batches); gradients of the last, and the state."""
    network = make("plain_2d").train()
    network.l2g[0].steps.fill_(100)  # past the placement by k-means, which sees rank 0's tokens only
    wrapped = network if rank is None else torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9, nesterov=True)
    for x in batches if rank is None else [batch.chunk(2)[rank] for batch in batches]:
        optimizer.zero_grad()
        loss = sum(o.square().mean() for o in wrapped(x)) + network.auxiliary_loss()
        loss.backward()
        optimizer.step()
        torch.manual_seed(0)
        network.after_step()
    return {name: p.grad for name, p in network.named_parameters()}, network.state_dict()


def _ddp_placement(rank, batches):
    """Two steps that place codes and references."""
    network = make("plain_2d", reference_steps=(1, 2)).train()
    for batch in batches:
        network(batch.chunk(2)[rank])
        network.after_step()
    return network.l2g.state_dict()


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_whole_batch():
    batches = [torch.randn(4, 1, 32, 48) for _ in range(3)]
    (gradients, state), (other_gradients, other_state) = run_two_processes(_ddp_steps, batches)
    expected_gradients, expected_state = _ddp_steps(None, batches)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(gradients[name], other_gradients[name])
    for name, value in expected_state.items():
        assert torch.equal(state[name], other_state[name]), name
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def _ddp_candidate(rank, candidate, batches):
    """Three steps of a candidate with its labels under DDP, placement included; the state and the last gradients."""
    network = make("plain_2d", **CANDIDATES[candidate], reference_steps=(1, 2)).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9, nesterov=True)
    for x in [batch.chunk(2)[rank] for batch in batches]:
        optimizer.zero_grad()
        loss = sum(o.square().mean() for o in wrapped(x)) + network.auxiliary_loss(tester.make_target(x))
        loss.backward()
        optimizer.step()
        network.after_step()
    return {**network.state_dict(), **{f"{name}'s gradient": p.grad for name, p in network.named_parameters()}}


def _ddp_candidates(rank, candidates, batches):
    return {candidate: _ddp_candidate(rank, candidate, batches) for candidate in candidates}


@pytest.mark.slow
def test_two_processes_of_a_candidate_stay_alike():
    candidates = ["readout_of_the_dataset", "class_tied_without_feedback", "code_dropout"]  # their processes take long to start
    first, second = run_two_processes(_ddp_candidates, candidates, [torch.randn(4, 1, 32, 48) for _ in range(3)])
    for candidate in candidates:
        assert any("gradient" in name for name in first[candidate])
        for name, value in first[candidate].items():
            assert torch.equal(value, second[candidate][name]), f"{candidate}: {name}"


@pytest.mark.slow
def test_two_processes_place_the_same_codes_and_references():
    first, second = run_two_processes(_ddp_placement, [torch.randn(4, 1, 32, 48) for _ in range(2)])
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ---- weights ----


def test_vanilla_weights_load_and_new_modules_keep_their_start():
    plan = "plain_3d"
    vanilla = tester.make_backbone(plan)
    for parameter in vanilla.parameters():
        nn.init.normal_(parameter)
    network = make(plan)
    before = {key: value.clone() for key, value in network.state_dict().items() if key.startswith("l2g.")}
    network.plain_weights_only = True
    assert set(network.state_dict()) == set(vanilla.state_dict())
    network.load_state_dict(vanilla.state_dict())
    assert network.plain_weights_loaded
    network.plain_weights_only = False
    for key, value in vanilla.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    assert before and all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_own_weights_load_whole_while_vanilla_ones_are_welcome():
    source, network = make(), make()
    tester.train_steps(source.train(), tester.make_input("plain_3d"), 2)
    network.plain_weights_only = True
    network.load_state_dict(source.state_dict())
    assert not network.plain_weights_loaded
    assert torch.equal(network.l2g[0].quantizer.codebook, source.l2g[0].quantizer.codebook)


def test_vanilla_weights_are_refused_where_a_checkpoint_is_continued():
    with pytest.raises(RuntimeError, match=r"not L2GNet's.*-pretrained_weights"):
        make().load_state_dict(tester.make_backbone("plain_3d").state_dict())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"iterations": 0}, "iterations: checkpoint 0, here 5"),
        ({"num_codes": 13}, "num_codes: checkpoint 13, here 12"),
        ({"levels": (-2,)}, r"levels: checkpoint \[-2\], here \[-1\]"),
    ],
)
def test_weights_of_other_settings_are_refused_by_name(other, named):
    with pytest.raises(RuntimeError, match=named):
        make().load_state_dict(make(**other).state_dict())


def test_weights_of_another_version_are_refused(monkeypatch):
    weights = make().state_dict()
    monkeypatch.setattr(L2GNet, "FORMAT", 2)
    with pytest.raises(RuntimeError, match="format: checkpoint 1, here 2"):
        make().load_state_dict(weights)


def test_solver_and_start_do_not_tie_weights():
    make().load_state_dict(make(solver="pot", gamma=0.5).state_dict())
    assert "solver" not in decode_settings(make().settings)


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_codes": 0}, r"\(K\) is 0"),
        ({"num_references": 0}, r"\(p\) is 0"),
        ({"num_codes": None, "num_references": None}, "both None"),
        ({"gamma": 0.0}, "gamma is 0"),
        ({"iterations": 2.5}, r"\(T\) is 2.5"),
        ({"reference_steps": (0,)}, "positive integers"),
        ({"levels": (3,)}, "level 3 does not exist, expected -3 to 2"),
        ({"levels": (-1, 2)}, "names a stage twice"),
        ({"levels": ()}, "levels and decoder_levels are empty"),
        ({"decoder_levels": (2,)}, "decoder level 2 does not exist, expected 0 to 1"),
        ({"decoder_levels": (1, 1)}, "names a stage twice"),
        ({"readout": "image"}, r"readout 'image' needs references_per_class .* got None and \(\)"),
        ({"readout": "image", "references_per_class": 1, "decoder_levels": (0,)}, r"got 1 and \(0,\)"),
        ({"keep_features": 0.0}, r"keep_features is 0\.0"),
        ({"over_codes": True, "num_codes": None}, "over_codes needs both"),
        ({"references_per_class": 2, "num_references": None}, "references_per_class needs"),
        ({"feed_back": False}, "nothing would be learnt"),
        ({"references_per_class": 2, "feed_back": False, "keep_features": 0.5}, "expected one of them"),
        ({"relaxation": -1.0}, r"\(rho\) is -1\.0"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        make(**settings)


def test_a_single_voxel_is_refused():
    with pytest.raises(ValueError, match=r"spatial shape \(1, 1, 1\), a single voxel"):
        make().l2g[0](torch.randn(1, 16, 1, 1, 1))


class Configuration:
    """What from_plans reads of nnU-Net's ConfigurationManager."""

    network_arch_class_name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    network_arch_init_kwargs_req_import = ("conv_op", "norm_op", "nonlin")

    def __init__(self, patch_size, strides):
        self.patch_size = patch_size
        self.network_arch_init_kwargs = {
            "n_stages": len(strides),
            "features_per_stage": [4] * len(strides),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": 3,
            "strides": strides,
            "n_conv_per_stage": 1,
            "n_conv_per_stage_decoder": 1,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "nonlin": "torch.nn.LeakyReLU",
        }


def test_plans_whose_bottleneck_is_a_single_voxel_are_refused_when_the_network_is_built():
    plans = Configuration([4, 8, 8], [[1, 1, 1], [2, 2, 2], [2, 4, 4]])
    with pytest.raises(ValueError, match=r"level -1 of these plans has spatial shape \(1, 1, 1\) for patch \(4, 8, 8\)"):
        L2GNet.from_plans(plans, 1, 2)
    L2GNet.from_plans(plans, 1, 2, levels=(-2,))  # the level above has (2, 4, 4)


def test_nonfinite_features_are_refused_before_they_reach_the_codebook():
    network, x = make().train(), tester.make_input("plain_3d")
    codebook = network.l2g[0].quantizer.codebook.clone()
    x[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        network(x)
    assert torch.equal(network.l2g[0].quantizer.codebook, codebook)


def test_backbones_without_encoder_and_decoder_are_refused():
    with pytest.raises(NotImplementedError, match="Sequential"):
        L2GNet(nn.Sequential(nn.Conv2d(1, 2, 1)))

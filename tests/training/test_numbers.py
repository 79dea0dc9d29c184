"""Numbers that are not numbers: what a training does with NaN, Inf and constant images, and with weights that were spoilt."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import ADAPTED
from small_trainers import make
from test_trainers import make_batch

from nnunet_l2g.architectures.glua.alignment import DomainDiscriminator
from nnunet_l2g.architectures.l2gnet import VectorQuantizer
from nnunet_l2g.architectures.l2gnet.sinkhorn import sinkhorn_potentials

METHODS = {"L2GNet": "nnUNetPlans", "GRCSF": "nnUNetPlans", "GLUA": ADAPTED}
STAGES = ("GRCSF", "GLUA")


def a_batch(trainer, value=None):
    """A random batch; `value` in one voxel of the first case, or everywhere for ("constant", number)."""
    batch = make_batch(trainer, 2)
    batch["unlabelled"] = torch.randn(batch["data"].shape, generator=torch.Generator().manual_seed(1))
    if isinstance(value, tuple):
        batch["data"].fill_(value[1])
        batch["unlabelled"].fill_(value[1])
    elif value is not None:
        batch["data"][0, 0, 3, 3] = value
    return batch


def start(trainer, *batches):
    """on_train_start with these batches, again and again, in the loaders' place."""
    if not trainer.was_initialized:
        trainer.initialize()
    batches = batches or (a_batch(trainer),)
    trainer.get_dataloaders = lambda: (itertools.cycle(batches), itertools.repeat(a_batch(trainer)))
    trainer.on_train_start()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_a_voxel_that_is_no_number_stops_training_and_names_its_case(adapted_folders, tmp_path, name, value):
    trainer = make(adapted_folders, name, METHODS[name], tmp_path / "results")
    start(trainer)
    trainer.on_train_epoch_start()
    file = tmp_path / "results" / "checkpoint_latest.pth"
    trainer.train_step(a_batch(trainer))
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    with pytest.raises(FloatingPointError, match=r"(loss is (nan|-?inf)|NaN or Inf).*case0.*on disk are from before"):
        trainer.train_step(a_batch(trainer, value))
    if name != "L2GNet":  # which looks at its features before the step; the others have spoilt their weights in memory
        with pytest.raises(FloatingPointError, match=r"NaN or Inf in network_weights\..*no checkpoint"):
            trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before and not list(tmp_path.glob("results/*.partial"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", STAGES)
def test_in_a_stage_too(adapted_folders, tmp_path, name, value):
    trainer = make(adapted_folders, name, METHODS[name], tmp_path / "results")
    trainer.initialize()
    good = a_batch(trainer)
    with pytest.raises(FloatingPointError, match=r"stage .*nan.*in epoch 2 \(cases \['case0', 'case1'\]\)"):
        start(trainer, good, good, good, a_batch(trainer, value))  # two steps an epoch
    (stage,) = trainer.stages()
    checkpoint = torch.load(tmp_path / "results" / f"stage_{stage.name}.pth", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint["module"].values())


@pytest.mark.parametrize("start_of_alignment", [0.0, 0.9], ids=["while aligned", "before"])
def test_a_voxel_of_the_unlabelled_target_too(adapted_folders, tmp_path, start_of_alignment):
    """Before the alignment begins, no loss depends on it: it would reach the discriminator unseen."""
    trainer = make(adapted_folders, "GLUANoTranslation", ADAPTED, tmp_path / "results")
    trainer.alignment_start = start_of_alignment
    start(trainer)
    trainer.on_train_epoch_start()
    assert trainer.raw_network.align == (start_of_alignment == 0)
    batch = a_batch(trainer) | {"unlabelled_keys": ["target7"]}
    batch["unlabelled"][1, 0, 3, 3] = math.nan
    with pytest.raises(FloatingPointError, match=r"the target's images hold NaN or Inf.*cases \['case0', 'case1', 'target7'\]"):
        trainer.train_step(batch)
    state = trainer.alignment_of_features.discriminator.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("value", [0.0, 7.0])
@pytest.mark.parametrize("name", METHODS)
def test_constant_images_train(adapted_folders, tmp_path, name, value):
    trainer = make(adapted_folders, name, METHODS[name], tmp_path / "results")
    trainer.initialize()
    start(trainer, a_batch(trainer, ("constant", value)))
    trainer.on_train_epoch_start()
    for _ in range(2):
        assert math.isfinite(trainer.train_step(a_batch(trainer, ("constant", value)))["loss"])
    trainer.save_checkpoint(str(tmp_path / "results" / "checkpoint_latest.pth"))


@pytest.mark.parametrize("part", ["weight", "momentum", "extra"])
def test_spoilt_weights_never_replace_a_checkpoint(adapted_folders, tmp_path, part):
    """A loss may be finite in the very step that spoils the weights: the last one before a checkpoint is written."""
    trainer = make(adapted_folders, "GLUA", ADAPTED, tmp_path / "results")
    start(trainer)
    trainer.on_train_epoch_start()
    trainer.train_step(a_batch(trainer))
    file = tmp_path / "results" / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    spoilt = {
        "weight": next(trainer.network.parameters()).data,
        "momentum": next(iter(trainer.optimizer.state.values()))["momentum_buffer"],
        "extra": next(trainer.alignment_of_features.discriminator.parameters()).data,
    }[part]
    spoilt.view(-1)[0] = math.nan
    where = {"weight": "network_weights", "momentum": "optimizer_state", "extra": "nnunet_l2g.alignment"}[part]
    with pytest.raises(FloatingPointError, match=f"NaN or Inf in {where}"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before and sorted(Path(file.parent).glob("*.pth*")) == sorted(Path(file.parent).glob("*.pth"))


# ---- layers, at any size ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_discriminator_is_float32_under_autocast_with_features_of_any_size(dtype, scale):
    discriminator = DomainDiscriminator(12, 2)
    torch.nn.init.normal_(discriminator.layers[-1].weight)
    features = (scale * torch.randn(2, 12, 6, 6)).to(dtype).requires_grad_()
    discriminator.observe(features.detach(), features.detach())
    with torch.autocast("cpu", dtype=dtype):
        score = discriminator(features)
    score.square().mean().backward()
    assert score.dtype == torch.float32 and torch.isfinite(score).all()
    assert all(torch.isfinite(p.grad).all() for p in discriminator.parameters())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300), p=st.integers(1, 70), magnitude=st.integers(-4, 4), eps=st.sampled_from([1e-3, 0.05, 0.5, 5.0]),
    iterations=st.integers(1, 10), seed=st.integers(0, 1000),
)  # fmt: skip
def test_sinkhorn_is_finite_and_moves_all_mass_at_any_size_and_scale(n, p, magnitude, eps, iterations, seed):
    """Scores far outside the cosines it is given in the network: a plan whose columns sum to 1 / p."""
    scores = 10.0**magnitude * torch.randn(2, n, p, generator=torch.Generator().manual_seed(seed))
    u, v = sinkhorn_potentials(scores / eps, torch.full((n,), 1 / n), torch.full((p,), 1 / p), iterations)
    plan = p * (scores / eps + u[..., None] + v[:, None]).exp()  # (2, n, p)
    # float32 resolves a potential of size |S| to |S| 2^-24, and the plan to that over eps
    tolerance = 1e-4 + 4e-7 * float(scores.abs().max()) / eps
    if tolerance < 0.1:
        torch.testing.assert_close(plan.sum(1), torch.ones(2, p), rtol=tolerance, atol=tolerance)
    assert torch.isfinite(u).all() and torch.isfinite(v).all()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), n=st.integers(1, 100), k=st.integers(1, 40), d=st.integers(1, 16), magnitude=st.integers(-4, 4),
    constant=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_quantiser_is_finite_at_any_size_and_scale(batch, n, k, d, magnitude, constant, seed):
    """Forward, gradient and several codebook updates; with one token repeated too, where all but one code die."""
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(k, d).train()
    h = 10.0**magnitude * torch.randn(batch, 1 if constant else n, d).expand(batch, n, d).clone()
    for _ in range(4):
        h.requires_grad_()
        loss = quantizer.commitment(h, quantizer(h))
        assert torch.isfinite(loss)
        loss.backward()
        assert torch.isfinite(h.grad).all()
        quantizer.update()
        assert all(torch.isfinite(b).all() for b in quantizer.buffers() if b.is_floating_point())
        nearest = torch.cdist(h.detach(), quantizer.codebook[None].expand(batch, -1, -1)).min(-1).values
        chosen = (h.detach() - quantizer.codebook[quantizer.eval()(h)]).norm(dim=-1)
        quantizer.train()
        torch.testing.assert_close(chosen, nearest, rtol=1e-2, atol=1e-2 * 10.0**magnitude)
        h = h.detach()

"""What a training does with NaN, Inf and constant images, and with weights that are not finite."""

import itertools
import math

import pytest
import torch
from planned import ADAPTED
from small_trainers import make
from test_trainers import make_batch

from nnunet_l2g.architectures.glua.alignment import DomainDiscriminator

METHODS = {"L2GNet": "nnUNetPlans", "GRCSF": "nnUNetPlans", "GLUA": ADAPTED}


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


@pytest.mark.parametrize(
    ("name", "value"), [("L2GNet", math.inf), ("L2GNet", math.nan), ("GRCSF", -math.inf), ("GLUA", math.nan)]
)
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


@pytest.mark.parametrize(("name", "value"), [("GRCSF", math.inf), ("GLUA", math.nan)])
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


@pytest.mark.parametrize(("name", "value"), [("L2GNet", 0.0), ("GRCSF", 7.0), ("GLUA", 0.0)])
def test_constant_images_train(adapted_folders, tmp_path, name, value):
    trainer = make(adapted_folders, name, METHODS[name], tmp_path / "results")
    trainer.initialize()
    start(trainer, a_batch(trainer, ("constant", value)))
    trainer.on_train_epoch_start()
    for _ in range(2):
        assert math.isfinite(trainer.train_step(a_batch(trainer, ("constant", value)))["loss"])
    trainer.save_checkpoint(str(tmp_path / "results" / "checkpoint_latest.pth"))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(adapted_folders, tmp_path):
    """The loss may be finite in the very step that spoils the weights: the last one before a checkpoint is written."""
    trainer = make(adapted_folders, "GLUA", ADAPTED, tmp_path / "results")
    start(trainer)
    trainer.on_train_epoch_start()
    trainer.train_step(a_batch(trainer))
    file = tmp_path / "results" / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    for where, spoilt in {
        "nnunet_l2g.alignment": next(trainer.alignment_of_features.discriminator.parameters()).data,
        "optimizer_state": next(iter(trainer.optimizer.state.values()))["momentum_buffer"],
        "network_weights": next(trainer.network.parameters()).data,
    }.items():
        spoilt.view(-1)[0] = math.nan
        with pytest.raises(FloatingPointError, match=f"NaN or Inf in .*{where}"):
            trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before


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

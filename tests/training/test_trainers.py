"""The trainers in this process, on planned phantoms: every kind of plan, loss, optimiser, log, weights, refusals."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned import PLAIN, RICH, narrow

from nnunet_l2g import compatibility, trainers
from nnunet_l2g.architectures import GRCSF, L2GNet
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers import nnUNetTrainerGRCSF, nnUNetTrainerL2GNet

CPU = torch.device("cpu")
RESENC = {
    "nnUNetResEncUNetMPlans": nnUNetPlannerResEncM,
    "nnUNetResEncUNetLPlans": nnUNetPlannerResEncL,
    "nnUNetResEncUNetXLPlans": nnUNetPlannerResEncXL,
}


@pytest.fixture(scope="session")
def more_plans(planned):
    """ResEnc plans by nnU-Net's planners, and a cascade (the phantom is too small for nnU-Net to plan one)."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in planned.variables.items():
            patch.setenv(name, value)
        for planner in RESENC.values():
            plan_experiment_dataset(981, planner)
    for identifier in RESENC:
        narrow(planned.path("preprocessed", PLAIN, f"{identifier}.json"))
    plans = json.loads(planned.path("preprocessed", PLAIN, "nnUNetPlans.json").read_text())
    plans["plans_name"] = "cascadePlans"
    plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    planned.path("preprocessed", PLAIN, "cascadePlans.json").write_text(json.dumps(plans))


def make(planned, trainer=nnUNetTrainerL2GNet, dataset=PLAIN, configuration="3d_fullres", plans="nnUNetPlans", **settings):
    """A trainer as nnU-Net's command makes it."""
    folder = planned.path("preprocessed", dataset)
    content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": False}
    made = trainer(content, configuration, 0, json.loads((folder / "dataset.json").read_text()), CPU)
    # batches are make_batch's: no worker processes
    made.get_dataloaders = lambda: tuple(itertools.repeat(make_batch(made, made.batch_size)) for _ in range(2))
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def make_batch(trainer, batch=1):
    """A random batch of the shapes nnU-Net's loader gives."""
    generator = torch.Generator().manual_seed(0)
    patch = trainer.configuration_manager.patch_size
    data = torch.randn(batch, trainer.num_input_channels, *patch, generator=generator)
    labels = trainer.label_manager
    channels = trainer.label_manager.num_segmentation_heads + int(labels.has_ignore_label) if labels.has_regions else 1
    values = 2 if labels.has_regions else labels.num_segmentation_heads
    full = torch.randint(0, values, (batch, channels, *patch), generator=generator).float()
    scales = trainer._get_deep_supervision_scales()
    targets = [torch.nn.functional.interpolate(full, scale_factor=[float(s) for s in scale]) for scale in scales]
    return {"data": data, "target": targets, "keys": [f"case{i}" for i in range(batch)]}


PLANS = {
    "3d_fullres": {},
    "2d": {"configuration": "2d"},
    "two channels, regions, ignore label": {"dataset": RICH},
    "two channels, regions, ignore label, 2d": {"dataset": RICH, "configuration": "2d"},
    "cascade": {"plans": "cascadePlans", "configuration": "3d_cascade_fullres"},
    **{f"ResEnc {name[16:-5]}": {"plans": name} for name in RESENC},
}
LARGE = ("ResEnc L", "ResEnc XL")


@pytest.mark.slow
@pytest.mark.parametrize("method", [nnUNetTrainerL2GNet, nnUNetTrainerGRCSF], ids=lambda m: m.__name__[13:])
@pytest.mark.parametrize("plan", [pytest.param(p, marks=pytest.mark.long) if p in LARGE else p for p in PLANS])
def test_every_plan_trains_and_validates_a_step(nnunet_folders, more_plans, plan, method):
    trainer = make(nnunet_folders, method, **PLANS[plan])
    if method is nnUNetTrainerGRCSF and plan == "cascade":
        with pytest.raises(NotImplementedError, match="GRCSF does not support cascades"):
            trainer.initialize()
        return
    trainer.initialize()
    assert isinstance(trainer.network, L2GNet if method is nnUNetTrainerL2GNet else GRCSF)
    if plan == "cascade":
        assert trainer.num_input_channels == 4
    trainer.raw_network.plain_weights_only = False
    trainer.network.train()
    batch = make_batch(trainer, 2 if "2d" in plan else 1)
    assert np.isfinite(trainer.train_step(copy.deepcopy(batch))["loss"])
    trainer.network.eval()
    result = trainer.validation_step(copy.deepcopy(batch))
    assert np.isfinite(result["loss"]) and len(result["tp_hard"])
    prediction = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads, enable_deep_supervision=False,
    )  # fmt: skip
    prediction.load_state_dict(trainer.network.state_dict())
    assert prediction.eval()(batch["data"]).shape[1] == trainer.label_manager.num_segmentation_heads


@pytest.mark.parametrize("name", [name for name in trainers.__all__ if "GLUA" not in name])  # those need a target: test_glua
def test_every_trainer_takes_a_step_and_logs_its_own(nnunet_folders, name):
    trainer = make(nnunet_folders, getattr(trainers, f"{name}_2epochs_3iterations"), configuration="2d")
    trainer.leave_out_labelled = False  # GRCSF's: make_batch labels a voxel of every token
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (2, 3, 1)
    trainer.on_train_start()
    references = "L2GNet" in name and "AuxiliaryHead" not in name
    codes, read = references and "NoCodebook" not in name, "L2GNet" in name and "NoReadout" not in name
    keys = trainer.diagnostic_keys
    assert ("perplexity" in keys, "references_used" in keys, "alpha" in keys) == (codes, references, read)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(make_batch(trainer, 2))])
    logging = trainer.logger.local_logger.my_fantastic_logging
    assert all(len(logging[key]) == 1 and np.isfinite(logging[key][0]) for key in trainer.diagnostic_keys)
    trainer.on_train_end()


def test_auxiliary_loss_counts_in_training_only_and_knows_the_labels(nnunet_folders):
    trainer = make(nnunet_folders, configuration="2d")
    trainer.initialize()
    batch = make_batch(trainer, 2)
    trainer.network.train()
    outputs = trainer.network(batch["data"])
    auxiliary = trainer.network.auxiliary_loss(batch["target"][0])
    assert auxiliary > trainer.network.auxiliary_loss() > 0
    assert trainer.loss(outputs, batch["target"]) == trainer.loss.loss(outputs, batch["target"]) + auxiliary
    trainer.network.eval()
    outputs = trainer.network(batch["data"])
    assert trainer.loss(outputs, batch["target"]) == trainer.loss.loss(outputs, batch["target"])


def test_optimiser_and_rates_are_nnunets(nnunet_folders):
    trainer = make(nnunet_folders, trainers.nnUNetTrainerL2GNet_10epochs, configuration="2d")
    trainer.initialize()
    vanilla = make(nnunet_folders, nnUNetTrainer, configuration="2d", num_epochs=10)
    vanilla.initialize()
    for epoch in (0, 4, 9):
        trainer.lr_scheduler.step(epoch)
        vanilla.lr_scheduler.step(epoch)
        (mine,), (theirs,) = ([{**group, "params": None} for group in one.optimizer.param_groups] for one in (trainer, vanilla))
        assert mine == theirs
    assert {id(p) for p in trainer.optimizer.param_groups[0]["params"]} == {id(p) for p in trainer.network.parameters()}


def test_references_are_placed_early_in_short_trainings_and_lose_their_momentum_there(nnunet_folders):
    for name, step in (("_1epochs_1iterations", 2), ("_10epochs_20iterations", 10), ("", 250)):
        trainer = make(nnunet_folders, getattr(trainers, f"nnUNetTrainerL2GNet{name}"), configuration="2d")
        trainer.initialize()
        assert trainer.network.l2g.placement_step == step
    trainer.network.l2g.placement_step = 2
    batch, references = make_batch(trainer, 2), trainer.network.l2g.references
    for step in (1, 2, 3):
        trainer.train_step(copy.deepcopy(batch))
        assert ("momentum_buffer" in trainer.optimizer.state.get(references, {})) == (step != 2)


def test_regions_are_known_at_prediction(nnunet_folders):
    """nnU-Net builds the network there from the plans alone; it writes the trainer's plans into the model's folder."""
    trainer = make(nnunet_folders, dataset=RICH, configuration="2d")
    trainer.on_train_start()
    plans = json.loads(Path(trainer.output_folder_base, "plans.json").read_text())
    network = nnUNetTrainerL2GNet.build_network_architecture(
        PlansManager(plans), trainer.configuration_manager, 2, trainer.label_manager.num_segmentation_heads, False
    )
    assert network.regions and not make(nnunet_folders).label_manager.has_regions
    network.load_state_dict(trainer.raw_network.state_dict())


def test_a_step_that_the_gradient_scaler_skips_moves_no_code(nnunet_folders):
    trainer = make(nnunet_folders, configuration="2d")
    trainer.initialize()
    block, batch = trainer.network.l2g, make_batch(trainer, 2)
    trainer.network.train()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    trainer.train_step(copy.deepcopy(batch))
    assert int(block.steps) == 1
    before = copy.deepcopy(trainer.network.state_dict())
    loss, trainer.loss = trainer.loss, lambda output, target: output[0].sum() * float("inf")
    trainer.train_step(copy.deepcopy(batch))
    assert all(torch.equal(value, before[key]) for key, value in trainer.network.state_dict().items())
    trainer.loss = loss
    trainer.train_step(copy.deepcopy(batch))
    assert int(block.steps) == 2


def test_a_users_own_optimiser_and_loss_keep_the_codebook_alive(nnunet_folders):
    class OfMine(nnUNetTrainerL2GNet):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.network.parameters(), 1e-3)
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

        def _build_loss(self):
            return lambda output, target: output[0].square().mean()

    trainer = make(nnunet_folders, OfMine, configuration="2d")
    trainer.initialize()
    codebook = trainer.network.l2g.quantizer.codebook.clone()
    trainer.network.train()
    trainer.train_step(make_batch(trainer, 2))
    assert int(trainer.network.l2g.steps) == 1
    assert not torch.equal(codebook, trainer.network.l2g.quantizer.codebook)
    assert trainer.network.l2g.project.weight.grad.abs().max() > 0


def test_nonfinite_loss_stops_training_and_names_the_cases(nnunet_folders, capsys):
    trainer = make(nnunet_folders, configuration="2d")
    trainer.initialize()
    trainer.network.train()
    batch = make_batch(trainer, 2)
    trainer.loss = lambda output, target: output[0].sum() * float("nan")
    trainer.grad_scaler = torch.amp.GradScaler("cpu")  # skips such steps
    for step in range(trainer.max_nonfinite_steps):
        trainer.train_step(batch)
        assert f"cases ['case0', 'case1'], {step + 1}. time" in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match=r"cases \['case0', 'case1'\], 6. time"):
        trainer.train_step(batch)
    trainer.on_train_epoch_start()
    trainer.train_step(batch)  # counted by epoch
    trainer.grad_scaler = None
    with pytest.raises(FloatingPointError, match="checkpoints on disk are from before"):
        trainer.train_step(batch)


# ---- weights ----


def test_vanilla_checkpoint_loads_through_nnunets_own_pretrained_weights(nnunet_folders, tmp_path, capsys):
    vanilla = make(nnunet_folders, nnUNetTrainer, configuration="2d")
    vanilla.initialize()
    for parameter in vanilla.network.parameters():
        torch.nn.init.normal_(parameter)
    vanilla.save_checkpoint(str(tmp_path / "vanilla.pth"))
    trainer = make(nnunet_folders, configuration="2d")
    trainer.initialize()
    before = copy.deepcopy(trainer.network.l2g.state_dict())
    maybe_load_checkpoint(trainer, False, False, str(tmp_path / "vanilla.pth"))
    trainer.on_train_start()
    log = capsys.readouterr().out.rsplit("-pretrained_weights:", 1)[1]
    assert "encoder.stages.0.0.convs.0.conv.weight" in log.split("Not taken")[0]
    assert "l2g.project.weight" in log.split("Not taken")[1]
    loaded = trainer.network.state_dict()
    for key, value in vanilla.network.state_dict().items():
        assert torch.equal(loaded[key], value) != (".seg_layers." in key), key
    assert all(torch.equal(value, trainer.network.l2g.state_dict()[key]) for key, value in before.items())
    trainer.on_train_end()
    saved = torch.load(trainer.output_folder + "/checkpoint_final.pth", weights_only=False)["network_weights"]
    assert "l2g.quantizer.codebook" in saved  # the view of plain weights is over


def test_a_checkpoint_is_nnunets_own_and_ours_serialised_once(nnunet_folders, tmp_path, monkeypatch):
    trainer = make(nnunet_folders, configuration="2d")
    trainer.initialize()
    trainer.train_step(make_batch(trainer, 2))
    trainer.raw_network.plain_weights_only = False
    nnUNetTrainer.save_checkpoint(trainer, str(tmp_path / "nnunets.pth"))
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda contents, *args: saved.append(contents) or save(contents, *args))
    trainer.save_checkpoint(str(tmp_path / "ours.pth"))
    assert len(saved) == 1
    expected, found = (torch.load(tmp_path / f"{name}.pth", weights_only=False) for name in ("nnunets", "ours"))
    assert found.keys() == expected.keys() | {"nnunet_l2g"}
    for key, value in expected["network_weights"].items():
        assert torch.equal(found["network_weights"][key], value), key
    for key in expected.keys() - {"network_weights", "optimizer_state"}:
        assert str(found[key]) == str(expected[key]), key
    assert found["optimizer_state"]["param_groups"] == expected["optimizer_state"]["param_groups"]


def test_a_continued_training_knows_that_the_epoch_it_was_saved_in_was_the_best(nnunet_folders):
    """nnU-Net saves checkpoint_latest before it compares: the worse epoch that follows would replace checkpoint_best."""
    trainer = make(nnunet_folders, configuration="2d")
    trainer.initialize()
    trainer._best_ema = 0.1
    trainer.logger.local_logger.my_fantastic_logging["ema_fg_dice"] = [0.1, 0.9]
    file = trainer.output_folder + "/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    continued = make(nnunet_folders, configuration="2d")
    continued.load_checkpoint(file)
    assert continued._best_ema == 0.9


@pytest.mark.parametrize("other", [nnUNetTrainer, trainers.nnUNetTrainerL2GNetOneReference])
def test_a_checkpoint_of_another_trainer_is_refused(nnunet_folders, other):
    foreign = make(nnunet_folders, other, configuration="2d")
    foreign.initialize()
    file = foreign.output_folder + "/checkpoint_latest.pth"
    foreign.save_checkpoint(file)
    with pytest.raises(RuntimeError, match="these weights"):
        make(nnunet_folders, configuration="2d").load_checkpoint(file)


def test_a_new_run_moves_the_old_ones_checkpoints_aside_and_a_continued_one_does_not(nnunet_folders):
    trainer = make(nnunet_folders, configuration="2d")
    trainer.initialize()
    old = trainer.output_folder + "/checkpoint_final.pth"
    trainer.save_checkpoint(old)
    continued = make(nnunet_folders, configuration="2d", continues=True)
    continued.on_train_start()
    assert not list(Path(trainer.output_folder).glob("previous_*"))
    fresh = make(nnunet_folders, configuration="2d")
    fresh.on_train_start()
    assert len(list(Path(trainer.output_folder).glob("previous_*/checkpoint_final.pth"))) == 1


def test_only_rank_0_touches_the_checkpoint(nnunet_folders):
    trainer = make(nnunet_folders, configuration="2d", local_rank=1)
    trainer.initialize()
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    partial = file.with_name(file.name + ".partial")  # rank 0 is writing
    file.write_text("old")
    partial.write_text("half")
    trainer.save_checkpoint(str(file))
    assert (file.read_text(), partial.read_text()) == ("old", "half")


# ---- refusals ----


@pytest.mark.parametrize("version", ["2.7.0", "2.9.1", None])
def test_other_nnunets_are_refused_at_once(nnunet_folders, monkeypatch, version):
    monkeypatch.setattr(compatibility, "installed_version", lambda _: version)
    with pytest.raises(UserError, match=r">=2\.8\.0,<2\.9"):
        make(nnunet_folders)

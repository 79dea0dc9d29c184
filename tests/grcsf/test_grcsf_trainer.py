"""The GRCSF trainer in this process, on planned phantoms: stage, loss, picture, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_two_processes
from planned import PLAIN, RICH
from test_trainers import make, make_batch

from nnunet_l2g import trainers
from nnunet_l2g.architectures.grcsf.autoencoder_stage import AutoencoderStage
from nnunet_l2g.architectures.grcsf.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.architectures.grcsf.picture import has_foreground, labelled_patch
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers import nnUNetTrainerGRCSF
from nnunet_l2g.training.focal import BinaryFocalLoss, FocalLoss

torch.set_num_threads(1)
SMALL = {"autoencoder": {"width": 16, "depth": 1, "decoder_width": 16, "decoder_depth": 1}, "dim": 16}


class Small(nnUNetTrainerGRCSF):
    """A network that starts at once."""

    network_settings = SMALL
    epochs, iterations = 4, 2
    leave_out_labelled = False  # random targets label a voxel of every token


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [("nnUNetTrainerGRCSF", 20, 10), ("nnUNetTrainerGRCSF", 1, 1), ("nnUNetTrainerGRCSFOtherResidual", 3, 2)],
)
def test_pretraining_is_scaled_in_proportion(nnunet_folders, name, epochs, expected):
    trainer = make(nnunet_folders, getattr(trainers, f"{name}_{epochs}epochs_7iterations"), configuration="2d")
    trainer.initialize()
    (stage,) = trainer.stages()
    assert (stage.epochs, stage.iterations, stage.validation_iterations) == (expected, 7, 1)


@pytest.mark.parametrize("name", ["NoRCU", "DoGResidual"])
def test_ablations_without_an_autoencoder_have_no_stage(nnunet_folders, name):
    trainer = make(nnunet_folders, getattr(trainers, f"nnUNetTrainerGRCSF{name}"), configuration="2d")
    trainer.initialize()
    assert trainer.stages() == [] and trainer.network.autoencoder is None


def test_the_stage_trains_the_autoencoder_alone_and_the_segmenter_leaves_it(nnunet_folders):
    trainer = make(nnunet_folders, Small, configuration="2d")
    trainer.initialize()
    trainer.network.plain_weights_only = False
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.on_train_start()
    after = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("autoencoder.") for key in changed)
    assert all(not p.requires_grad and p.grad is None for p in trainer.network.autoencoder.parameters())
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch(trainer, 2))
    stepped = trainer.network.state_dict()
    changed = {key for key in before if not torch.equal(stepped[key], after[key])}
    assert changed and not any(key.startswith("autoencoder.") for key in changed)
    for name in ("stage_autoencoder.pth", "progress_autoencoder.png", "compensation.png"):
        assert Path(trainer.output_folder, name).stat().st_size > 1000


def test_labelled_tokens_are_left_out_of_the_autoencoders_loss_and_ignored_ones_are_not(nnunet_folders):
    for dataset in (PLAIN, RICH):
        trainer = make(nnunet_folders, Small, dataset, configuration="2d", leave_out_labelled=True)
        trainer.initialize()
        (stage,) = trainer.stages()
        stage.begin()
        batch = make_batch(trainer, 2)
        assert stage.validation_step(batch) == {}
        batch["target"][0].zero_()
        assert stage.validation_step(batch)["error"] > 0
        batch["target"][0][:, -1] = 1  # regions: the ignore label's own channel
        assert bool(stage.validation_step(batch)) == (dataset == RICH)


def test_labels_everywhere_are_refused_with_a_remedy(nnunet_folders):
    trainer = make(nnunet_folders, Small, configuration="2d", leave_out_labelled=True)
    with pytest.raises(UserError, match=r"anything to learn from: every token has a labelled voxel.*= False"):
        trainer.on_train_start()


def test_an_infinite_gradient_stops_the_stage_before_the_weights_are_spoilt(nnunet_folders):
    trainer = make(nnunet_folders, Small, configuration="2d")
    trainer.initialize()
    trainer.network.autoencoder.mask_token.requires_grad_(True).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="stage autoencoder"):
        trainer.on_train_start()
    assert all(torch.isfinite(p).all() for p in trainer.network.autoencoder.parameters())


def test_a_kill_while_the_loaders_start_leaves_no_old_checkpoint_in_the_way(nnunet_folders):
    trainer = make(nnunet_folders, Small, configuration="2d")
    trainer.initialize()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    fresh = make(nnunet_folders, Small, configuration="2d")

    def killed():
        raise KeyboardInterrupt

    fresh.get_dataloaders = killed
    with pytest.raises(KeyboardInterrupt):
        fresh.on_train_start()
    assert not Path(fresh.output_folder, "checkpoint_final.pth").exists()


def _stage_steps(rank, x):
    """Two steps of the stage in each process, on images of its own."""
    torch.manual_seed(rank)  # masks differ between processes
    autoencoder = MaskedAutoencoder(1, (16, 16), (4, 4), width=16, depth=1, decoder_width=12, decoder_depth=1)
    autoencoder.load_state_dict(torch.load(x["weights"], weights_only=True))
    stage = AutoencoderStage(autoencoder, torch.device("cpu"), 1, 2, 1, {})
    stage.begin()
    for step in range(2):
        stage.train_step({"data": x["data"].chunk(2)[rank] + step})
    return autoencoder.state_dict()


@pytest.mark.slow
def test_two_processes_of_the_stage_keep_the_same_weights(tmp_path):
    start = MaskedAutoencoder(1, (16, 16), (4, 4), width=16, depth=1, decoder_width=12, decoder_depth=1).state_dict()
    torch.save(start, tmp_path / "start.pth")
    first, second = run_two_processes(_stage_steps, {"data": torch.randn(4, 1, 16, 16), "weights": str(tmp_path / "start.pth")})
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert any(not torch.equal(value, start[key]) for key, value in first.items())


@pytest.mark.parametrize(("dataset", "kind"), [(PLAIN, FocalLoss), (RICH, BinaryFocalLoss)])
@pytest.mark.parametrize("name", ["GRCSF", "GRCSFFocal", "DiceFocal"])
def test_losses(nnunet_folders, dataset, kind, name):
    trainer = make(nnunet_folders, getattr(trainers, f"nnUNetTrainer{name}"), dataset, configuration="2d")
    trainer.initialize()
    compound = trainer.loss.loss.loss  # auxiliary, deep supervision, nnU-Net's compound
    assert isinstance(compound.ce, kind) and compound.weight_dice == (0 if name == "GRCSFFocal" else 1)
    trainer.network.train()
    assert np.isfinite(trainer.train_step(make_batch(trainer, 2))["loss"])


def test_the_control_is_plain_nnunet_with_this_loss(nnunet_folders):
    control = make(nnunet_folders, trainers.nnUNetTrainerDiceFocal, configuration="2d")
    control.initialize()
    assert control.raw_network.own_keys() == ["settings"]


def test_a_patch_that_no_token_divides_is_refused_before_training_and_suits_the_control(nnunet_folders):
    folder = nnunet_folders.path("preprocessed", PLAIN)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["patch_size"] = [37, 41]
    (folder / "oddPlans.json").write_text(json.dumps(plans))
    with pytest.raises(ValueError, match="no token size divides the patch on axis 0: 37 voxels"):
        make(nnunet_folders, Small, plans="oddPlans", configuration="2d").initialize()
    make(nnunet_folders, trainers.nnUNetTrainerDiceFocal, plans="oddPlans", configuration="2d").initialize()


# ---- the picture ----


@pytest.mark.parametrize(("dataset", "configuration"), [(PLAIN, "2d"), (RICH, "3d_fullres")])
def test_the_picture_shows_a_labelled_patch(nnunet_folders, dataset, configuration):
    trainer = make(nnunet_folders, Small, dataset, configuration=configuration)
    trainer.initialize()
    patch = labelled_patch(trainer.get_tr_and_val_datasets()[1], trainer.configuration_manager.patch_size)
    assert patch.image.shape[1:] == patch.reference.shape == tuple(trainer.configuration_manager.patch_size)
    assert (patch.reference > 0).any() and np.isfinite(patch.image).all()
    trainer.draw_picture("before training")
    first = Path(trainer.output_folder, "compensation.png").read_bytes()
    trainer.draw_picture("before training")
    assert first == Path(trainer.output_folder, "compensation.png").read_bytes() and len(first) > 10_000


# ---- refusals ----


def test_one_training_case_is_refused_where_an_autoencoder_would_memorise_it(nnunet_folders):
    for cls in (Small, trainers.nnUNetTrainerDiceFocal):
        trainer = make(nnunet_folders, cls, configuration="2d")
        trainer.initialize()
        case = trainer.do_split()[0][0]
        trainer.do_split = lambda case=case: ([case], [case])
        if cls is Small:
            with pytest.raises(UserError, match="fold 0 has 1 training case, expected at least 2"):
                trainer.get_tr_and_val_datasets()
        else:
            trainer.get_tr_and_val_datasets()


def test_a_fold_without_labels_is_refused(nnunet_folders, monkeypatch):
    trainer = make(nnunet_folders, Small, configuration="2d")
    trainer.initialize()
    load = trainer.dataset_class.load_case

    def without_labels(self, case):
        data, seg, previous, properties = load(self, case)
        empty = {key: [] for key in properties["class_locations"]}
        return data, seg, previous, {**properties, "class_locations": empty}

    trainer.get_tr_and_val_datasets()
    monkeypatch.setattr(trainer.dataset_class, "load_case", without_labels)
    with pytest.raises(UserError, match=r"fold 0 has no labelled voxel in its \d training cases"):
        trainer.get_tr_and_val_datasets()


def test_one_case_without_labels_is_trained_on_and_the_picture_shows_another(nnunet_folders, monkeypatch):
    trainer = make(nnunet_folders, Small, configuration="2d")
    trainer.initialize()
    cases = trainer.do_split()[0]
    trainer.do_split = lambda: (cases, cases)
    load = trainer.dataset_class.load_case

    def first_without_labels(self, case):
        data, seg, previous, properties = load(self, case)
        if case == self.identifiers[0]:
            properties = {**properties, "class_locations": {key: [] for key in properties["class_locations"]}}
        return data, seg, previous, properties

    monkeypatch.setattr(trainer.dataset_class, "load_case", first_without_labels)
    training, validation = trainer.get_tr_and_val_datasets()
    assert list(training.identifiers) == list(cases)
    assert labelled_patch(validation, trainer.configuration_manager.patch_size).case == validation.identifiers[1]


@pytest.mark.parametrize(
    ("locations", "expected"),
    [
        ({1: [], 2: []}, False),
        ({1: [], 2: [[0, 1, 1, 1]]}, True),
        ({(1, 2): [[0, 1, 1, 1]]}, True),
        ({(-1, 0, 1): [[0, 1, 1, 1]], 1: []}, False),  # nnU-Net's entry of annotated voxels, with an ignore label
    ],
)
def test_foreground_is_what_is_labelled(locations, expected):
    assert has_foreground({"class_locations": locations}) == expected

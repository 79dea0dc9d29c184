"""What we rely on in nnU-Net. When a release changes one of these, the failing test says which file of ours breaks."""

import configparser
import inspect

import pytest
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run import run_training
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities import find_objects
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from throwaway import ROOT

from nnunet_l2g.compatibility import NNUNET_RANGE
from nnunet_l2g.trainers import nnUNetTrainerL2GNet

pytestmark = pytest.mark.oldest

# what it is, its parameters, what of ours depends on it
SIGNATURES = [
    (nnUNetTrainer.__init__, "self plans configuration fold dataset_json device", "trainers/base.py: __init__"),
    (
        nnUNetTrainer.build_network_architecture,
        "plans_manager configuration_manager num_input_channels num_output_channels enable_deep_supervision",
        "trainers/base.py: build_network_architecture",
    ),
    (nnUNetTrainer.initialize, "self", "trainers/base.py: initialize"),
    (nnUNetTrainer.configure_optimizers, "self", "trainers/base.py: configure_optimizers"),
    (nnUNetTrainer._build_loss, "self", "trainers/base.py: _build_loss"),
    (nnUNetTrainer.on_train_start, "self", "trainers/base.py: on_train_start"),
    (nnUNetTrainer.train_step, "self batch", "trainers/base.py: train_step"),
    (nnUNetTrainer.on_train_epoch_end, "self train_outputs", "trainers/base.py: on_train_epoch_end"),
    (nnUNetTrainer.get_tr_and_val_datasets, "self", "trainers/grcsf.py: get_tr_and_val_datasets"),
    (nnUNetTrainer.on_epoch_end, "self", "trainers/base.py: on_epoch_end"),
    (nnUNetTrainer.save_checkpoint, "self filename", "trainers/base.py: save_checkpoint"),
    (nnUNetTrainer.load_checkpoint, "self filename_or_checkpoint", "trainers/base.py: load_checkpoint"),
    (
        PolyLRScheduler.__init__,
        "self optimizer initial_lr max_steps exponent current_step",
        "trainers/base.py: configure_optimizers",
    ),
    (load_pretrained_weights, "network fname verbose", "architectures/plan_network.py: plain_weights_only"),
    (
        get_network_from_plans,
        "arch_class_name arch_kwargs arch_kwargs_req_import input_channels output_channels allow_init deep_supervision",
        "architectures/plan_network.py: backbone_from_plans",
    ),
    (find_objects.recursive_find_trainer_class_by_name, "trainer_name", "nnunet_l2g/lookup.py"),
    (MetaLogger.log, "self key value step", "trainers/base.py: on_train_epoch_end"),
    (
        run_training.maybe_load_checkpoint,
        "nnunet_trainer continue_training validation_only pretrained_weights_file",
        "trainers/base.py: initialize, load_checkpoint",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "parameters", "ours"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", ""))
def test_signatures(function, parameters, ours):
    found = " ".join(inspect.signature(function).parameters)
    assert found == parameters, f"nnU-Net changed {function.__qualname__}: this breaks {ours}"


# source, what has to be in it, what of ours depends on it
HABITS = [
    (find_objects.recursive_find_trainer_class_by_name, "nnUNet_extTrainer", "nnunet_l2g/autoload.py"),
    (nnUNetTrainer.__init__, 'plans.pop("continue_training")', "trainers/base.py: continues"),
    (nnUNetTrainer.initialize, "self.loss = self._build_loss()", "trainers/base.py: _build_loss"),
    (nnUNetTrainer.save_checkpoint, "torch.save(checkpoint, filename)", "trainers/base.py: _nnunets_checkpoint"),
    (nnUNetTrainer.set_deep_supervision_enabled, "mod.decoder.deep_supervision", "architectures/plan_network.py"),
    (nnUNetTrainer.train_step, "self.optimizer", "trainers/base.py: the hook after each optimiser step"),
    (nnUNetTrainer.train_step, "{'loss': l.detach().cpu().numpy()}", "trainers/base.py: _check_finite"),
    (nnUNetTrainer.on_train_end, "self.dataloader_train._finish()", "trainers/base.py: _finish_loaders"),
    (nnUNetTrainer.run_training, "self.on_train_start()", "trainers/base.py: stages run before the first epoch"),
    (nnUNetTrainer.on_train_start, "self.dataloader_train, self.dataloader_val =", "trainers/base.py: _run_stages"),
    (UNetDecoder.forward, "x = torch.cat((x, skips[-(s+2)]), 1)", "architectures/grcsf/network.py: _decode"),
    (DC_and_CE_loss.forward, "self.ce(net_output, target[:, 0])", "nnunet_l2g/training/focal.py"),
    (DC_and_BCE_loss.forward, "self.ce(net_output, target_regions) * mask", "nnunet_l2g/training/focal.py"),
    (
        DatasetFingerprintExtractor.run,
        "self.num_foreground_voxels_for_intensitystats //",
        "nnunet_l2g/demo/command.py: FEW_SAMPLES replaces the number, which __init__ sets, by a property",
    ),
    (LocalLogger.log, "self.my_fantastic_logging", "trainers/base.py: diagnostics in the log"),
    (load_pretrained_weights, "mod.load_state_dict(model_dict)", "architectures/plan_network.py: load_state_dict"),
    (nnUNetPredictor.initialize_from_trained_model_folder, "network.load_state_dict(parameters[0])", "prediction"),
    (
        nnUNetPredictor.initialize_from_trained_model_folder,
        "trainer_class.build_network_architecture(",
        "trainers/base.py: a class method works because nnU-Net calls it on the class",
    ),
]


@pytest.mark.parametrize(("function", "text", "ours"), HABITS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_habits(function, text, ours):
    assert text in inspect.getsource(function), f"nnU-Net's {function.__qualname__} lost {text!r}: this breaks {ours}"


def test_the_range_in_setup_cfg_is_the_checked_one():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"nnunetv2{NNUNET_RANGE}" in setup["options"]["install_requires"].split()


def test_our_own_signature_is_nnunets():
    for name in ("__init__", "build_network_architecture"):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (nnUNetTrainerL2GNet, nnUNetTrainer))
        assert list(ours) == list(theirs)

"""benchmarks/candidates: a form that has not earned its place, trained on nnU-Net's plans."""

import importlib.util
import itertools
import json
from pathlib import Path

import torch
from glua_trainers import a_batch, run_epochs
from planned import ADAPTED, PLAIN
from test_trainers import CPU

FOLDER = Path(__file__).parents[2] / "benchmarks" / "candidates"


def load(name="glua_candidates"):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_glua_reweighted_masks_what_the_decoder_reads_and_predicts_with_its_discriminator(adapted_folders, tmp_path):
    base = load().nnUNetTrainerGLUAReweighted
    attributes = dict(translation_settings={"width": 4}, stage_settings={"slices": 2, "crop": 32}, epochs=2, iterations=2)
    folder = adapted_folders.path("preprocessed", PLAIN)
    plans = json.loads((folder / f"{ADAPTED}.json").read_text()) | {"continue_training": False}
    trainer = type("Small", (base,), attributes)(plans, "2d", 0, json.loads((folder / "dataset.json").read_text()), CPU)
    trainer.get_dataloaders = lambda: tuple(itertools.repeat(a_batch(trainer)) for _ in range(2))
    trainer.on_train_start()
    network = trainer.raw_network
    assert trainer.alignment_of_features.discriminator is network.discriminator
    x = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    trainer.set_deep_supervision_enabled(False)
    plain = network.eval()(x)  # D is 1/2 everywhere: nothing is re-weighted yet
    torch.testing.assert_close(plain, network.decoder(network.encoder(x)))
    torch.nn.init.constant_(network.discriminator.layers[-1].bias, 1.0)  # sure everywhere: m = 1
    skips = network.encoder(x)
    torch.testing.assert_close(network(x), network.decoder([*skips[:-1], 2 * skips[-1]]))
    torch.nn.init.constant_(network.discriminator.layers[-1].bias, 0.5)
    trainer.set_deep_supervision_enabled(True)
    run_epochs(trainer, 2)
    saved = {key: value.clone() for key, value in network.state_dict().items()}
    assert saved["discriminator.layers.0.weight"].isfinite().all() and saved["discriminator.batches"] == 4
    again = base.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 4, False)
    again.load_state_dict(saved)

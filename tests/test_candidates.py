"""benchmarks/candidates: found by nnU-Net under their names, trained with its targets, predicting without labels."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from glua_trainers import a_batch, run_epochs
from planned import ADAPTED, PLAIN, RICH
from test_trainers import CPU

from nnunet_l2g.autoload import VARIABLE, with_trainers

FOLDER = Path(__file__).parents[1] / "benchmarks" / "candidates"


def load(name="l2gnet_candidates"):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = sorted(load().CANDIDATES)


def make(folders, name, dataset, tmp_path):
    folder = folders.path("preprocessed", dataset)
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    trainer = load().CANDIDATES[name](plans, "2d", 0, json.loads((folder / "dataset.json").read_text()), CPU)
    trainer.output_folder = str(tmp_path)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    return trainer


@pytest.mark.parametrize("dataset", [PLAIN, RICH], ids=["labels", "regions-and-ignore"])
@pytest.mark.parametrize("name", NAMES)
def test_trains_on_nnunets_batches_and_predicts_without_labels(nnunet_folders, tmp_path, monkeypatch, name, dataset):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make(nnunet_folders, name, dataset, tmp_path)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(output["loss"])) for output in outputs)
    for parameter in trainer.network.parameters():
        assert torch.isfinite(parameter).all()
    trainer.on_train_epoch_end(outputs)
    trainer.on_validation_epoch_start()
    trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    network, classes = trainer.raw_network, trainer.label_manager.num_segmentation_heads
    for ties in (block.ties for block in network.l2g if block.ties is not None):
        assert int(ties.updates) == 2 and len(ties.prior) == classes + 1
        assert float(ties.prior.sum()) == pytest.approx(1, abs=1e-4)
        # nnU-Net's labels cover each voxel; beside regions there is background
        assert (float(ties.prior[-1]) > 0.1) == trainer.label_manager.has_regions
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        logits = network.eval()(torch.randn(1, trainer.num_input_channels, 32, 32))
    assert logits.shape == (1, classes, 32, 32)


def test_glua_reweighted_masks_what_the_decoder_reads_and_predicts_with_its_discriminator(adapted_folders, tmp_path):
    base = load("glua_candidates").nnUNetTrainerGLUAReweighted
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


@pytest.mark.slow
@pytest.mark.commands
def test_nnunets_commands_train_and_predict_with_one(planned, tmp_path):
    trainer = "nnUNetTrainerL2GNetReadout_2epochs_2iterations"
    variables = {VARIABLE: with_trainers(str(FOLDER)), "nnUNet_results": str(tmp_path / "results")}
    output = planned.run("nnUNetv2_train", 982, "2d", 0, "-tr", trainer, "-device", "cpu", **variables)
    assert "Training done" in output and "class_accuracy" in output
    planned.run(
        "nnUNetv2_predict", "-d", 982, "-c", "2d", "-f", 0, "-tr", trainer, "-device", "cpu", "-npp", 1, "-nps", 1,
        "-i", planned.path("raw", RICH, "imagesTs"), "-o", tmp_path / "predicted", **variables,
    )  # fmt: skip
    assert list((tmp_path / "predicted").glob("*.nii.gz"))


def test_costs_are_those_that_the_page_says():
    root = FOLDER.parents[1]
    page = " ".join((root / "docs" / "methods" / "l2gnet.md").read_text(encoding="utf-8").split())
    plans = json.loads((root / "benchmarks" / "step_count_candidates.json").read_text())["plans"]
    most = {
        plan: {key: f"{max(row[key] for row in rows.values()):.2f}" for key in ("gflop_ratio", "memory_ratio")}
        for plan, rows in plans.items()
    }
    assert all(set(rows) == {"vanilla", *NAMES} for rows in plans.values())
    assert f"at most {max(each['gflop_ratio'] for each in most.values())} of vanilla's operations" in page
    memory = [most[plan]["memory_ratio"] for plan in ("malc", "acdc", "idrid")]
    assert f"at most {memory[0]} of vanilla's on MALC's plans, {memory[1]} on ACDC's, {memory[2]} on IDRiD's" in page

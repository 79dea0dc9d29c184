"""A trained network without its method is nnU-Net's own network with the same weights, and compare says what that costs."""

import json
import shutil
from pathlib import Path

import network_tester as tester
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from test_grcsf import make as make_grcsf
from test_l2gnet import make as make_l2gnet
from tiny_model import make_plans, write_case, write_model

from nnunet_l2g.architectures import PlanNetwork
from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.compare import predicting
from nnunet_l2g.compare.models import Model
from nnunet_l2g.compare.predicting import Predictor, raw_images
from nnunet_l2g.compare.results import read_models
from nnunet_l2g.compare.tables import case_table
from nnunet_l2g.compare.without_method import OPTION, choose_methods, dice_without, has_method, lost_table
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Options, score_pairs

DATASET, CASES = "Dataset990_Tiny", ("a", "b", "c")


@pytest.mark.parametrize("make", [lambda: make_l2gnet("plain_3d"), make_grcsf], ids=["l2gnet", "grcsf"])
def test_a_network_without_its_method_is_its_encoder_and_decoder(make, monkeypatch):
    network, x = make(), tester.make_input("plain_3d")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(PlanNetwork, "method_off", True)
    off = make()
    off.load_state_dict(network.state_dict())
    with torch.no_grad():
        logits = off.eval()(x)[0]
        assert torch.equal(logits, network.eval().decoder(network.encoder(x))[0])
        assert (logits - network(x)[0]).abs().max() > 1e-3


def predict(model, fold, images, target):
    """What nnUNetv2_predict does, in this process."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,), "checkpoint_final.pth")
    target.mkdir(exist_ok=True)
    predictor.predict_from_files_sequential(str(images), str(target), overwrite=True)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two runs of a trainer of ours and plain nnU-Net with the weights of the first, on three cases, validated."""
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind / DATASET).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.setenv(VARIABLE, with_trainers(""))
    raw, truth = tmp_path / "raw" / DATASET, tmp_path / "preprocessed" / DATASET / "gt_segmentations"
    for folder in (raw / "imagesTr", raw / "labelsTr", truth):
        folder.mkdir(parents=True)
    for number, case in enumerate(CASES):
        image, label = write_case(tmp_path / case, shape=(3 + number, 32, 32))
        shutil.copy(image, raw / "imagesTr" / f"{case}_0000.nii.gz")
        for folder in (raw / "labelsTr", truth):
            shutil.copy(label, folder / f"{case}.nii.gz")
    plans = make_plans((32, 32), (1.5, 2.5))
    models = []
    for trainer in ("nnUNetTrainerL2GNet", "nnUNetTrainerL2GNet_run2", "nnUNetTrainer"):
        path = write_model(tmp_path / "results" / DATASET, trainer, plans)
        models.append(Model(trainer, trainer, plans["plans_name"], "2d", path, 2 if "run2" in trainer else 1))
    shutil.copy(models[0].folder / "dataset.json", raw)
    weights = [torch.load(model.fold("0") / "checkpoint_final.pth", weights_only=False) for model in models]
    generator = torch.Generator().manual_seed(3)
    for number in (0, 1):  # trained away from where the method changes nothing
        for name, tensor in weights[number]["network_weights"].items():
            if tensor.is_floating_point() and name.startswith(("l2g.", "alpha")):
                tensor.add_(0.5 * torch.randn(tensor.shape, generator=generator))
    weights[2]["network_weights"] = {k: v for k, v in weights[0]["network_weights"].items() if k.startswith(("enc", "dec"))}
    for model, content in zip(models, weights, strict=True):
        torch.save(content, model.fold("0") / "checkpoint_final.pth")
        predict(model.folder, 0, raw / "imagesTr", model.fold("0") / "validation")
        metrics = {str(label): {"Dice": 0.5} for label in (1, 2)}
        rows = [{"prediction_file": f"/x/{case}.nii.gz", "metrics": metrics} for case in CASES]
        (model.fold("0") / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
    return models


def dice(file, case, folders, label):
    found, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) == label for path in (file, folders / f"{case}.nii.gz"))
    return 2 * (found & truth).sum() / (found.sum() + truth.sum()) if (found | truth).any() else float("nan")


def test_the_dice_lost_is_that_of_nnunet_with_these_weights(folders, tmp_path, monkeypatch):
    calls = []

    def run_nnunet(script, arguments, what, prelude, **more):
        calls.append(arguments)
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        model = tmp_path / "results" / DATASET / f"{given['-tr']}__{given['-p']}__{given['-c']}"
        with monkeypatch.context() as patch:
            patch.setattr(PlanNetwork, "method_off", False)
            exec(prelude, {})
            predict(model, int(given["-f"]), given["-i"], Path(given["-o"]))

    monkeypatch.setattr(predicting, "run_nnunet", run_nnunet)
    methods = [folders[2:], folders[:2]]
    inputs = read_models(methods, ["0"], DATASET)
    chosen = choose_methods(methods, ["0"])
    assert chosen == [folders[:2]] and not has_method(folders[2], "0")
    images = raw_images(folders[:2], inputs, DATASET, OPTION)
    predictor = Predictor(inputs, DATASET, "cpu", tmp_path / "report", Options(), 1)
    scores, _ = score_pairs(inputs.pairs(), inputs.labels, Options())
    table = lost_table(case_table(inputs, scores), dice_without(predictor, chosen, images))
    assert len(calls) == 2 and not PlanNetwork.method_off
    assert set(table["method"]) == {"nnUNetTrainerL2GNet"} and list(table["run"]) == [1, 1, 1, 2, 2, 2]
    (predicted,) = (tmp_path / "report" / "without_method" / "predictions" / folders[0].folder.name).iterdir()
    truth = tmp_path / "preprocessed" / DATASET / "gt_segmentations"
    for number, structure in enumerate(("organ", "lesion"), 1):
        rows = np.array(
            [[dice(path / f"{case}.nii.gz", case, truth, number) for case in CASES]
             for path in (folders[0].fold("0") / "validation", predicted, folders[2].fold("0") / "validation")]
        )  # fmt: skip
        assert np.array_equal(rows[1], rows[2], equal_nan=True)  # plain nnU-Net with these weights
        row = table[(table["run"] == 1) & (table["structure"] == structure)].iloc[0]
        kept = ~np.isnan(rows[:2]).any(0)
        difference = (rows[0] - rows[1])[kept]
        assert row["cases"] == kept.sum() and row["lost"] == pytest.approx(difference.mean())
        assert row["dice"] - row["without"] == pytest.approx(row["lost"])
        half = {3: 4.302653, 2: 12.706205}[len(difference)] * difference.std(ddof=1) / len(difference) ** 0.5
        assert (row["low"], row["high"]) == pytest.approx((row["lost"] - half, row["lost"] + half), rel=1e-4)
    assert table["lost"].abs().max() > 0.001

    dice_without(predictor, chosen, images)
    assert len(calls) == 2  # kept
    images["a"][0].touch()
    dice_without(predictor, chosen, images)
    assert len(calls) == 4  # predicted again, because an image has changed

    with pytest.raises(UserError, match="--without-method: nnUNetTrainer have nothing that could be left out"):
        choose_methods([folders[2:]], ["0"])
    (folders[2].fold("0") / "checkpoint_final.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"checkpoint_final.pth cannot be read"):
        choose_methods([folders[2:]], ["0"])

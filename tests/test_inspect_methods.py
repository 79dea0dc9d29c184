"""What `nnunet_l2g inspect` shows of L2GNet and GRCSF: which files, and that their numbers are right."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import PLAIN
from test_inspect import check_files, inspect, read_map, read_summary
from test_trainers import make
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.evaluation.labels import read_labels
from nnunet_l2g.inspection.case import read_case
from nnunet_l2g.inspection.codes import perplexity
from nnunet_l2g.inspection.compensation import draw_compensation
from nnunet_l2g.inspection.residuals import inside_and_around
from nnunet_l2g.inspection.transport import Plan, collected_shares, exact_plan, measure_plan
from nnunet_l2g.layers.l2g_block import L2GBlock
from nnunet_l2g.layers.transport_alignment import TransportAlignment
from nnunet_l2g.trainers import nnUNetTrainerL2GNet

torch.set_num_threads(1)
WHOLE = (10, 46, 39)  # write_case's image of this shape is cropped to the patch 8 x 32 x 32


# ---- L2GNet ----


def make_plan(scores, iterations=50, eps=0.1, received=None):
    """The layer's plan of given scores (n, p)."""
    layer = TransportAlignment(4, scores.shape[1], eps, iterations)
    layer.scores = lambda *_: torch.from_numpy(scores)[None]
    plan = layer.plan(torch.zeros(1, len(scores), 4), None, None if received is None else torch.from_numpy(received).float())
    tokens = np.random.default_rng(0).normal(size=(len(scores), 4))
    received = plan.received[0].double().numpy() / scores.shape[1]
    return Plan(scores, plan.columns[0].double().numpy(), tokens, tokens, eps, iterations, received)


def test_a_plan_is_measured_against_its_own_marginal():
    received = np.array([0.7, 0.1, 0.1, 0.1])
    found = measure_plan(make_plan(np.random.default_rng(0).uniform(-1, 1, (40, 4)), 300, received=received))
    assert found["marginal_error"] < 1e-3 and 0.5 < found["objective"]["reached"] < 1
    assert np.allclose(exact_plan(np.random.default_rng(0).uniform(-1, 1, (40, 4)), received).sum(0), received)


def test_a_relaxed_plan_has_no_exact_one():
    plan = make_plan(np.eye(4))
    assert "objective" not in measure_plan(dataclasses.replace(plan, relaxed=True)) and "objective" in measure_plan(plan)


def test_objectives_against_closed_forms():
    """Two tokens for each of four references, score 1 with its own and 0 else: the exact plan reaches 1, the even one 1/4."""
    scores = np.repeat(np.eye(4), 2, 0)
    assert np.allclose(exact_plan(scores, np.full(4, 0.25)), scores / 8)
    found = measure_plan(make_plan(scores))
    assert found["objective"]["exact"] == pytest.approx(1) and found["objective"]["product"] == pytest.approx(0.25)
    weight = np.exp(10) / (np.exp(10) + 3)  # entropic: softmax of S / eps, by symmetry
    assert found["objective"]["layer"] == pytest.approx(weight, abs=1e-6)
    assert found["objective"]["reached"] == pytest.approx((weight - 0.25) / 0.75, abs=1e-6)
    assert found["tokens_per_reference"] == pytest.approx(2, abs=0.02) and found["marginal_error"] < 1e-6
    assert found["kept_variance"] == pytest.approx(1) and found["distinct_references"] == 4


def test_the_exact_plan_is_never_worse_and_the_softmax_twin_has_none():
    scores = np.random.default_rng(0).uniform(-1, 1, (30, 7))
    for eps, worst in ((0.05, 0.03), (0.5, 0.5)):
        objective = measure_plan(make_plan(scores, 200, eps))["objective"]
        assert objective["product"] < objective["layer"] <= objective["exact"] + 1e-6
        assert objective["exact"] - objective["layer"] < worst
    found = measure_plan(make_plan(scores, iterations=0))
    assert "objective" not in found and found["marginal_error"] > 0.1


def test_top_references_are_concentrated_and_no_two_alike():
    scores = np.zeros((12, 4))
    scores[0, 0] = scores[0, 1] = 3.0  # two alike on one token
    scores[:6, 2] = 1.0
    plan = make_plan(scores, iterations=0)
    assert plan.top[0] in (0, 1) and plan.top[1:] == [2, 3]
    assert plan.effective_tokens[3] == pytest.approx(12)


def test_collected_shares_are_mass_by_class():
    plan = make_plan(np.repeat(np.eye(4), 2, 0))
    labels = np.zeros((8, 3))
    labels[:4, 0], labels[4:6, 1], labels[6:, 2] = 1, 1, 1
    shares = collected_shares(plan, labels, {1: "a", 2: "b"})
    assert np.allclose(shares["background"], [1, 1, 0, 0], atol=1e-3) and np.allclose(shares["b"], [0, 0, 0, 1], atol=1e-3)


def test_perplexity():
    assert perplexity(np.array([0.25] * 4 + [0])) == pytest.approx(4) and perplexity(np.array([1.0, 0])) == pytest.approx(1)


def test_explain_is_what_forward_does():
    torch.manual_seed(0)
    block = L2GBlock(6, dim=8, num_codes=5, num_references=4).eval()
    torch.nn.init.normal_(block.project_out.weight)
    z = torch.randn(2, 6, 3, 4)
    found = block.explain(z)
    normed = torch.nn.functional.instance_norm(found["output"].transpose(1, 2)).transpose(1, 2)
    expected = z + (block.gamma * block.project_out(normed)).transpose(1, 2).reshape(z.shape)
    assert torch.allclose(block(z), expected, atol=1e-5)
    block.alignment.train()(found["tokens"])
    assert torch.equal(block.alignment.last.columns, found["columns"])
    assert torch.equal(block.quantizer.codebook[found["codes"]], found["tokens"])


CODES, PLAN = {"codes.nii.gz", "codes.png", "codes_usage.png"}, {"plan.png", "references.png", "references_classes.png"}
TWINS = {
    "nnUNetTrainerL2GNet": CODES | PLAN,
    "nnUNetTrainerL2GNetNoTransport": CODES,
    "nnUNetTrainerL2GNetNoCodebook": PLAN,
    "nnUNetTrainerL2GNetSoftmax_3epochs": CODES | PLAN,
}


@pytest.mark.parametrize("trainer", TWINS)
@pytest.mark.parametrize("dims", [2, 3])
def test_l2gnet_and_its_twins_show_what_they_have(tmp_path, trainer, dims):
    plans = make_plans((8, 32, 32)[-dims:], (4.0, 2.0, 2.0)[-dims:])
    model, (image, label) = write_model(tmp_path, trainer, plans), write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    names = {name for name in check_files(tmp_path / "out", image) if not name.startswith("reference_")}
    assert names == TWINS[trainer] | {"prediction.nii.gz", "errors.nii.gz", "segmentation.png", "summary.json"}
    found = read_summary(tmp_path / "out")["l2gnet"]["levels"]["-1"]
    if "codebook" in found:
        assert sum(found["codebook"]["shares"]) == pytest.approx(1, abs=1e-4)
        assert found["codebook"]["perplexity"] <= found["codebook"]["used"] <= found["codebook"]["codes"] == 64
    if "plan" in found:
        assert ("objective" in found["plan"]) == ("Softmax" not in trainer)
        assert len(found["references"]) == 64
        for reference in found["references"]:
            assert sum(reference["shares"].values()) == pytest.approx(1, abs=1e-4)
    else:
        assert not list((tmp_path / "out").glob("reference_*"))


def test_a_checkpoint_that_the_trainer_wrote(nnunet_folders, tmp_path):
    trainer = make(nnunet_folders, nnUNetTrainerL2GNet, configuration="2d")
    trainer.initialize()
    model = Path(trainer.output_folder_base)
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (model / f"{name}.json").write_text(json.dumps(content))
    trainer.logger.log("train_losses", np.float32(1), 0)
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    image = nnunet_folders.path("raw", PLAIN, "imagesTs", "phantom_ts000_0000.nii.gz")
    assert inspect(model, image, tmp_path / "out") == 0
    assert set(check_files(tmp_path / "out", image)) > CODES | PLAN


def test_codes_lie_where_their_tokens_are(tmp_path):
    model = write_model(tmp_path, "nnUNetTrainerL2GNet")
    image, _ = write_case(tmp_path / "in", WHOLE, (4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out") == 0
    opened = open_model(model)
    case = read_case(opened, [image], None)
    assert case.data.shape == (1, 8, 32, 32)
    explained = opened.network.explain(torch.from_numpy(case.data)[None])[-1]
    codes = explained["codes"].view(tuple(explained["grid"])).numpy()
    for axis, size in enumerate((8, 32, 32)):
        codes = codes.repeat(size // codes.shape[axis], axis)
    written = read_map(tmp_path / "out/codes.nii.gz").astype(int)
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    assert np.array_equal(written[inside], codes + 1) and (written > 0).sum() == codes.size
    shares = np.bincount(codes.ravel(), minlength=64) / codes.size
    assert read_summary(tmp_path / "out")["l2gnet"]["levels"]["-1"]["codebook"]["shares"] == pytest.approx(shares, abs=1e-5)
    (first, *_) = (tmp_path / "out").glob("reference_*.nii.gz")
    column = explained["columns"][0, :, int(first.name.split("_")[1].split(".")[0])].numpy()  # (n,)
    assert read_map(first)[inside].max() == pytest.approx(column.max() * column.size, rel=1e-4)


# ---- GRCSF ----

RECONSTRUCTIONS, RESIDUALS = {"reconstruction_50", "reconstruction_75"}, {"residual_50", "residual_75"}


@pytest.mark.parametrize(
    ("trainer", "maps"),
    [
        ("nnUNetTrainerGRCSF", RECONSTRUCTIONS | RESIDUALS | {"compensation", "importance"}),
        ("nnUNetTrainerGRCSFNoGCU", RECONSTRUCTIONS | RESIDUALS | {"importance"}),
        ("nnUNetTrainerGRCSFNoRCU", {"compensation"}),
        ("nnUNetTrainerGRCSFDoGResidual", RESIDUALS | {"compensation", "importance"}),
        ("nnUNetTrainerDiceFocal", set()),
    ],
)
def test_grcsf_and_its_twins_show_what_they_have(tmp_path, trainer, maps):
    model = write_model(tmp_path, trainer, make_plans((32, 32), (2.0, 2.0)))
    image, label = write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    files = check_files(tmp_path / "out", image)
    written = {name.removesuffix(".nii.gz") for name in files if name.endswith(".nii.gz")}
    assert written == maps | {"prediction", "errors"}
    assert ("compensation.png" in files) == bool(maps)
    found = read_summary(tmp_path / "out")["grcsf"]
    assert ("inside_around" in found) == ("residual_50" in maps) == ("residual_inside_around.png" in files)
    assert ("note" in found) == (not maps)


def test_grcsf_maps_are_the_networks(tmp_path):
    model = write_model(tmp_path, "nnUNetTrainerGRCSF")
    image, _ = write_case(tmp_path / "in", WHOLE, (4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out") == 0
    opened = open_model(model)
    case = read_case(opened, [image], None)
    explained = opened.network.explain(torch.from_numpy(case.data)[None])
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    for name, expected in (("residual_75", explained["map_75"][0, 1]), ("reconstruction_50", explained["mean_50"][0, 0])):
        assert np.allclose(read_map(tmp_path / f"out/{name}.nii.gz")[inside], expected, atol=1e-4), name


def test_inside_and_around(tmp_path):
    """Spacing 4 x 1 mm: the shell of 10 mm reaches two rows or ten columns."""
    labels = read_labels(write_model(tmp_path) / "dataset.json")
    reference = np.zeros((9, 31), np.int16)
    reference[4, 15] = 2
    residual = np.full((9, 31), 7.0)
    residual[4, 15] = 3.0
    residual[2:7, 5:26][np.add.outer(np.arange(-2, 3) ** 2 * 16, np.arange(-10, 11) ** 2) <= 100] = 1.5
    residual[4, 15] = 3.0
    found = inside_and_around({"r": residual}, reference, labels, (4.0, 1.0))
    assert found["lesion"] == {"voxels": 1, "r": {"inside": 3.0, "around": 1.5, "ratio": 2.0}}
    assert found["organ"] == {"voxels": 0, "r": {"inside": None, "around": None, "ratio": None}}


def test_the_trainers_picture_of_a_patch(tmp_path):
    shape = (4, 16, 16)
    reference = np.zeros(shape, np.int16)
    reference[2, 4:8, 4:8] = 1
    image = np.random.default_rng(0).random((1, *shape))
    explained = {"map_50": np.zeros((3, *shape)), "importance_0": np.ones((1, 1, 2, 2)), "mean_50": image}
    draw_compensation(image, reference, reference, explained, {1: "lesion"}, "a case", f"{tmp_path}/out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]

"""Runs in a comparison: what the report says of them, ensembles, and what is refused."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from scipy import stats

from nnunet_l2g.cli import main
from nnunet_l2g.compare.fairness import _other_settings, model_warnings
from nnunet_l2g.compare.models import Model
from nnunet_l2g.compare.results import Run, read_folders
from nnunet_l2g.compare.tables import compare as compute
from nnunet_l2g.compare.tables import paired_tables
from nnunet_l2g.compare.text import make_tables
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Options
from nnunet_l2g.evaluation.scores import SCORES

SHAPE = (4, 8, 8)


def write(folder, name, array):
    folder.mkdir(exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(np.asarray(array, np.uint8)), str(folder / f"{name}.nii.gz"))


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture
def folders(tmp_path):
    """References of four cases with labels 1 and 2, three runs of A and two of B: the references with voxels flipped."""
    generator = np.random.default_rng(0)
    (tmp_path / "ref").mkdir()
    content = {"labels": {"background": 0, "left": 1, "right": 2}, "file_ending": ".nii.gz", "channel_names": {"0": "x"}}
    (tmp_path / "ref" / "dataset.json").write_text(json.dumps(content))
    for case in "pqrs":
        reference = np.zeros(SHAPE)
        reference[1:3, 2:6, 1:4], reference[1:3, 2:6, 4:7] = 1, 2
        write(tmp_path / "ref", case, reference)
        for name, share in {"A1": 0.2, "A2": 0.25, "A3": 0.3, "B1": 0.1, "B2": 0.15}.items():
            wrong = generator.random(SHAPE) < share * generator.uniform(0.5, 1.5)
            write(tmp_path / name, case, np.where(wrong, generator.integers(0, 3, SHAPE), reference))
    return tmp_path


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    if request.function is not test_runs_in_the_report:
        monkeypatch.setattr("nnunet_l2g.compare.report.draw_all", lambda comparison: [])


def compare(folder, names, *more):
    named = [f"{name[0]}={folder / name}" for name in names]
    arguments = ["--predictions", *named, "--reference", str(folder / "ref"), "-o", str(folder / "out"), "-np", "1"]
    return main(["compare", *arguments, *more])


def report(folder):
    content = json.loads((folder / "out" / "report.json").read_text())
    return content, {(row["method"], row["structure"], row["score"]): row for row in content["paired"]}


def test_runs_in_the_report(folders, capsys):
    assert compare(folders, ["A1", "A2", "A3", "B1", "B2"]) == 0
    printed = capsys.readouterr().out
    content, paired = report(folders)
    assert content["runs"] == {"A": 3, "B": 2} and {row["run"] for row in content["cases"]} == {1, 2, 3}
    row = paired["B", "mean", "dice"]
    assert (row["n"], row["runs"], row["baseline_runs"], row["folds"]) == (4, 2, 3, 1)
    assert 0 < row["p"] <= 1 and row["low"] < row["difference"] < row["high"] and row["detectable"] > 0
    assert row["sd_between_runs"] >= 0 and row["baseline_sd_between_runs"] >= 0
    means = [values["mean"] for values in content["run_means"] if values["of"] == "A" and values["score"] == "dice"][-3:]
    assert np.mean(means) == pytest.approx(row["baseline_mean"])
    assert "3 runs of A and 2 runs of B, 4 cases" in printed and "80 % power" in content["findings"][0]
    assert "Unequal numbers of runs: A 3, B 2" in printed and "SD between runs" in (folders / "out" / "report.html").read_text()
    assert (folders / "out" / "plots" / "differences.png").stat().st_size > 1000
    assert len((folders / "out" / "runs.csv").read_text().splitlines()) > 10


def test_one_run_of_each_is_two_models(folders, capsys):
    for names in (["A1", "B1"], ["A1", "B1", "B2"]):
        assert compare(folders, names) == 0
        printed = capsys.readouterr().out
        content, paired = report(folders)
        assert all(row["p"] is row["low"] is row["high"] is row["detectable"] is None for row in content["paired"])
        assert "these two models" in printed and "one run of A" in printed and "95 %" not in printed
        assert "these two models" in (folders / "out" / "report.md").read_text()
    assert paired["B", "mean", "dice"]["sd_between_runs"] is not None and "Standard deviation between runs" in printed


def test_one_case_only(folders, capsys):
    for name in ("A1", "A2", "B1", "B2"):
        for case in "qrs":
            (folders / name / f"{case}.nii.gz").unlink()
    assert compare(folders, ["A1", "A2", "B1", "B2"]) == 0
    printed = capsys.readouterr().out
    assert "in 1 case: too few for p and interval" in printed and "WARNING: 1 case only" in printed
    assert all(row["p"] is None for row in report(folders)[0]["paired"])


def test_runs_with_other_cases_and_a_folder_twice(folders, capsys):
    (folders / "B2" / "s.nii.gz").unlink()
    assert compare(folders, ["A1", "B1", "B2"]) == 1
    assert "A and B run 2 have other cases: only A has s" in capsys.readouterr().err
    assert compare(folders, ["A1", "B1", "B1"]) == 1
    assert "named twice; each run of B has its own folder" in capsys.readouterr().err
    for path in (folders / "A1").iterdir():
        (folders / "A2" / path.name).write_bytes(path.read_bytes())
    assert compare(folders, ["A1", "A2", "B1"]) == 0
    assert "A run 2 and A have the same scores in every case" in capsys.readouterr().out


def model(folder, name, run=1, size=8, channel="CT"):
    """A model's folder with plans of this patch size, and a dataset.json with this channel."""
    (folder / name).mkdir()
    plans = {"plans_name": "P", "configurations": {"2d": {"patch_size": [size, size]}}}
    (folder / name / "plans.json").write_text(json.dumps(plans))
    (folder / name / "dataset.json").write_text(json.dumps({"labels": {"a": 1}, "channel_names": {"0": channel}}))
    return Model(name, name, "P", "2d", folder / name, run)


@pytest.mark.parametrize(
    ("change", "epochs", "found"),
    [
        ({"size": 16}, 20, r"patch_size \[8, 8\] / \[16, 16\]"),
        ({"channel": "MR"}, 20, r'channel_names {"0": "CT"} / {"0": "MR"}'),
        ({}, 30, r"epochs \[20\] / \[30\]"),
    ],
)
def test_runs_of_one_method_must_not_differ_and_methods_are_warned_of(tmp_path, change, epochs, found):
    models = [model(tmp_path, "T"), model(tmp_path, "T_run2", 2, **change)]
    runs = [Run("T", {}, epochs={"0": 20}), Run("T_run2", {}, epochs={"0": epochs})]
    with pytest.raises(UserError, match=f"T_run2 is no further run of .*T: {found}. Runs differ"):
        model_warnings(models, ["0"], runs, "D")
    if change:
        (warning,) = _other_settings(models)
        assert re.search(f"T and T_run2 were trained with other settings: {found}", warning)


def made_up(values, folds):
    """The case table of methods A and B from dice (method, run, case, structure)."""
    index = np.indices(values.shape).reshape(4, -1)
    table = pd.DataFrame(
        {"method": np.array(["A", "B"])[index[0]], "run": index[1] + 1, "case": index[2], "dice": values.ravel()}
    )
    return table.assign(structure=np.array(["s", "t"])[index[3]], fold=np.array(folds)[index[2]])


def test_a_case_counts_where_every_run_of_both_defines_it():
    values = np.random.default_rng(1).random((2, 2, 6, 2))
    values[0, 1, 0, 0] = values[:, :, 1, 0] = values[:, :, :, 1][..., 2] = np.nan  # some runs; all; all of the other structure
    paired, runs = paired_tables(made_up(values, ["0"] * 6), {"dice": SCORES["dice"]})
    rows = paired.set_index("structure")
    assert rows["n"].to_dict() == {"s": 4, "t": 5, "mean": 6} and rows["dropped"].to_dict() == {"s": 1, "t": 0, "mean": 0}
    kept = values[:, :, 2:, 0]
    assert rows.loc["s", "difference"] == pytest.approx(kept[1].mean() - kept[0].mean())
    # of cases 0 and 1 only t counts, of case 2 only s
    counted = np.array([[0, 1], [0, 1], [1, 0], [1, 1], [1, 1], [1, 1]])
    means = (np.nan_to_num(values) * counted).sum(-1) / counted.sum(-1)  # (method, run, case)
    assert rows.loc["mean", "difference"] == pytest.approx(means[1].mean() - means[0].mean())
    of_runs = runs[(runs["structure"] == "mean") & (runs["of"] == "B")]["mean"]
    assert of_runs.to_numpy() == pytest.approx(means[1].mean(-1))
    nothing = paired_tables(made_up(np.full((2, 2, 3, 2), np.nan), ["0"] * 3), {"dice": SCORES["dice"]})[0]
    assert (nothing["n"] == 0).all() and nothing["p"].isna().all()


def test_folds_with_one_run():
    values = np.random.default_rng(2).random((2, 1, 9, 2))
    row = paired_tables(made_up(values, ["0", "1", "2"] * 3), {"dice": SCORES["dice"]})[0].set_index("structure").loc["s"]
    of_folds = (values[1, 0, :, 0] - values[0, 0, :, 0]).reshape(3, 3).mean(0)
    assert row["p"] == pytest.approx(stats.ttest_1samp(of_folds, 0).pvalue) and row["folds"] == 3
    assert np.isnan(row["sd_between_runs"]) and np.isnan(row["runs_needed"])


def test_tables_of_what_is_measured_and_predicted_again(folders):
    inputs = read_folders([("A", folders / "A1"), ("B", folders / "B1")], folders / "ref", None)
    comparison = compute(inputs, Options(), 1, "command", "more")
    comparison.cost = comparison.cost.assign(parameters=[2_500_000, None], gflops=[1.23456, 2.0])
    rows = [("A", "noise", 0.05, 0.5), ("B", "noise", 0.05, 0.6), ("A", "noise", 0.2, 0.3), ("B", "noise", 0.2, np.nan)]
    comparison.extra["shift"] = pd.DataFrame(rows, columns=["method", "kind", "strength", "dice"])
    rows, names = [("B", 1, "mean", 4, 0.01234567, -0.5, np.nan)], "method run structure cases lost low high"
    comparison.extra["without"] = pd.DataFrame(rows, columns=names.split())
    text = {table.title: table.markdown().replace(" ", "") for table in make_tables(comparison)}
    assert text["Cost"].splitlines()[2:] == ["|A|2.5|1.235|", "|B|-|2|"]
    none, weak, strong = text["Dice on perturbed images"].splitlines()[2:]
    assert none.startswith("|none|0|0.") and weak.endswith("|0.05|0.5|0.6|") and strong.endswith("|0.2|0.3|-|")
    assert text["Dice without the method"].splitlines()[-1] == "|B|1|meanforeground|4|0.01235|-0.5|-|"


# ensembles


def test_majority_and_disagreement(folders, capsys):
    assert compare(folders, ["A1", "A2", "A3", "B1", "B2"], "--ensemble") == 0
    printed = capsys.readouterr().out
    content, paired = report(folders)
    assert content["methods"] == ["A", "B", "A ensemble", "B ensemble"] and len(content["findings"]) == 1
    assert "Where runs disagree" in printed
    folder = folders / "out" / "ensemble" / "1_A"
    runs = np.stack([read(folders / f"A{run}" / "p.nii.gz") for run in (1, 2, 3)])
    expected = stats.mode(runs, axis=0).mode
    assert np.array_equal(read(folder / "p.nii.gz"), expected)
    percent = read(folder / "disagreement" / "p.nii.gz")
    assert np.array_equal(percent, np.rint(100 * (runs != expected).mean(0))) and set(np.unique(percent)) <= {0, 33, 67}
    dice = {(row["method"], row["case"], row["structure"]): row["dice"] for row in content["cases"] if "ens" in row["method"]}
    found = {(row["method"], row["case"]): row for row in content["failures"]}["A", "p"]
    assert found["dice"] == pytest.approx(np.mean([dice["A ensemble", "p", side] for side in ("left", "right")]))
    pairs = [
        2 * np.sum((runs[i] == label) & (runs[j] == label)) / (np.sum(runs[i] == label) + np.sum(runs[j] == label))
        for i, j in ((0, 1), (0, 2), (1, 2))
        for label in (1, 2)
    ]
    assert found["disagreement"] == pytest.approx(1 - np.mean(pairs))
    assert paired["A ensemble", "mean", "dice"]["difference"] > 0  # three of five voxels are right by themselves
    assert paired["A ensemble", "mean", "dice"]["p"] is None
    assert compare(folders, ["A1", "B1"], "--ensemble") == 1
    assert "--ensemble: no method has several runs" in capsys.readouterr().err

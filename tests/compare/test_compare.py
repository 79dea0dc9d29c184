"""`nnunet_l2g compare`: results as nnU-Net leaves them, folders of predictions, the report, and everything that is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_l2g.cli import main
from nnunet_l2g.evaluation.shifts import STRENGTHS
from nnunet_l2g.phantom import write_dataset

DATASET, SIZE, SPACING = "Dataset991_Compared", (32, 32, 6), (3.5, 3.5, 10.0)
BASELINE, OTHER = "nnUNetTrainer", "nnUNetTrainerL2GNet"
PLANS = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": {"patch_size": [8, 32, 32], "batch_size": 2}}}


def predict(reference, path, rng, shift):
    """The reference with a blurred-in error: some voxels of the outline flipped to a neighbour's label, then moved."""
    image = sitk.ReadImage(str(reference))
    array = sitk.GetArrayFromImage(image)
    moved = np.roll(array, shift, axis=-1)
    array = np.where(rng.random(array.shape) < 0.5, array, moved).astype(array.dtype)
    array[array > 3] = 0  # nnU-Net never predicts the ignore label
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(changed, str(path))


def logging(epochs, level):
    """As nnU-Net's logger leaves it: numpy scalars among Python's numbers."""
    ramp = [np.float64(level * (1 - 0.8 ** (epoch + 1))) for epoch in range(epochs)]
    return {
        "mean_fg_dice": ramp,
        "ema_fg_dice": ramp,
        "dice_per_class_or_region": [[value] * 3 for value in ramp],
        "train_losses": [-value for value in ramp],
        "val_losses": [np.float32(0.05 - value) for value in ramp],
        "lrs": [0.01] * epochs,
        "epoch_start_timestamps": [100.0 * epoch for epoch in range(epochs)],
        "epoch_end_timestamps": [100.0 * epoch + 20 + level for epoch in range(epochs)],
    }


def write_checkpoint(path, epochs, level):
    weight = torch.zeros(10, 4)
    weights = {"encoder.weight": weight, "decoder.encoder.weight": weight, "settings": torch.zeros(9, dtype=torch.uint8)}
    torch.save(
        {
            "network_weights": weights,
            "logging": logging(epochs, level),
            "current_epoch": epochs,
            "_best_ema": np.float64(level),
            "optimizer_state": {},
            "init_args": {"configuration": "3d_fullres"},
            "trainer_name": "any",
        },
        path,
    )


def write_summary(validation, references, regions=(1, 2, 3)):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.json_export import recursive_fix_for_json_export

    cases = [
        compute_metrics(str(references / file.name), str(file), SimpleITKIO(), list(regions), 4)
        for file in validation.glob("*.nii.gz")
    ]
    for case in cases:
        recursive_fix_for_json_export(case)
    save_summary_json({"metric_per_case": cases, "mean": {}, "foreground_mean": {}}, str(validation / "summary.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """nnU-Net's folders with two trainers, folds 0 and 1, of 10 cases."""
    root = tmp_path_factory.mktemp("nnunet")
    raw = write_dataset(root / "raw", 10, 2, dataset_id=991, name="Compared", size=SIZE, spacing=SPACING)
    preprocessed = root / "preprocessed" / DATASET
    shutil.copytree(raw / "labelsTr", preprocessed / "gt_segmentations")
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").iterdir())
    splits = [{"train": [], "val": cases[fold::5]} for fold in range(5)]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    for trainer, shift, level in ((BASELINE, 3, 0.6), (OTHER, 2, 0.8)):
        model = root / "results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres"
        rng = np.random.default_rng(shift)
        for fold in range(5):
            folder = model / f"fold_{fold}"
            for case in cases[fold::5]:
                predict(
                    preprocessed / "gt_segmentations" / f"{case}.nii.gz", folder / "validation" / f"{case}.nii.gz", rng, shift
                )
            write_checkpoint(folder / "checkpoint_final.pth", 20, level)
            write_summary(folder / "validation", preprocessed / "gt_segmentations")
        (model / "plans.json").write_text(json.dumps(PLANS))
        shutil.copy(raw / "dataset.json", model)
    return root


@pytest.fixture
def folders(finished, tmp_path, monkeypatch):
    """A copy that a test may spoil; nnU-Net's variables point to it."""
    root = tmp_path / "nnunet"
    shutil.copytree(finished, root, copy_function=shutil.copy2)
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(root / kind))
    return root


def model(folders, trainer) -> Path:
    return folders / "results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres"


def compare(output, *more, folds="0 1 2 3 4", trainers=(BASELINE, OTHER)):
    arguments = ["-d", "991", "-c", "3d_fullres", "-f", *folds.split(), "-tr", *trainers, "-o", str(output), "-np", "1"]
    return main(["compare", *arguments, *map(str, more)])


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# the whole way


def test_trainings(folders, tmp_path, capsys):
    output = tmp_path / "report"
    assert compare(output) == 0
    printed = capsys.readouterr().out
    assert "mean foreground" in printed and "WARNING" not in printed and str(output / "report.html") in printed
    report = json.loads((output / "report.json").read_text())
    assert report["methods"] == [BASELINE, OTHER] and report["warnings"] == [] and len(report["cases"]) == 2 * 10 * 3
    summaries = [
        json.loads(path.read_text()) for path in sorted(model(folders, BASELINE).glob("fold_*/validation/summary.json"))
    ]
    theirs = {
        Path(case["prediction_file"]).name.removesuffix(".nii.gz"): case["metrics"]["2"]
        for summary in summaries
        for case in summary["metric_per_case"]
    }
    for row in report["cases"]:
        if row["method"] == BASELINE and row["structure"] == "myocardium":
            mine = (row["dice"], row["iou"], row["TP"], row["FP"], row["FN"])
            assert mine == pytest.approx(tuple(theirs[row["case"]][key] for key in ("Dice", "IoU", "TP", "FP", "FN")))
    paired = {(row["structure"], row["score"]): row for row in report["paired"]}
    row = paired["mean", "dice"]
    assert row["n"] == 10 and row["low"] < row["difference"] < row["high"] and row["p"] == row["p_holm"]
    assert (row["runs"], row["folds"], row["sd_between_runs"]) == (1, 5, None) and row["detectable"] > 0
    assert paired["myocardium", "dice"]["p_holm"] >= paired["myocardium", "dice"]["p"]
    cost = {row["method"]: row for row in report["cost"]}[OTHER]
    assert (cost["parameters"], cost["epochs"], cost["seconds_per_epoch"]) == (40, 20, pytest.approx(20.8))
    for name in (
        "report.md",
        "cases.csv",
        "summary.csv",
        "paired.csv",
        "cost.csv",
        *(f"plots/{p}.png" for p in ("differences", "scatter", "curves", "cost")),
    ):
        assert (output / name).stat().st_size > 100, name
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4 and 'src="http' not in page and "href" not in page
    for line in (output / "report.md").read_text().splitlines():
        assert not line.startswith("|") or line.count("|") in (5, 10), line


def test_a_second_run_says_the_same_and_a_changed_prediction_is_scored_again(folders, tmp_path, capsys):
    output = tmp_path / "report"
    assert compare(output) == 0
    first = (output / "paired.csv").read_text()
    assert compare(output) == 0
    assert (output / "paired.csv").read_text() == first
    validation = model(folders, OTHER) / "fold_0" / "validation"
    changed = sorted(validation.glob("*.nii.gz"))[0]
    predict(folders / "preprocessed" / DATASET / "gt_segmentations" / changed.name, changed, np.random.default_rng(9), 5)
    assert compare(output) == 0 and (output / "paired.csv").read_text() != first
    warning = capsys.readouterr().out.split("WARNING")[-1]
    assert changed.name.removesuffix(".nii.gz") in warning and "Validate again" in warning


def test_two_runs_in_five_folds(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nnunet_l2g.compare.report.draw_all", lambda comparison: [])
    references = folders / "preprocessed" / DATASET / "gt_segmentations"
    for trainer, shift in ((BASELINE, 3), (OTHER, 2)):
        again = model(folders, f"{trainer}_run2")
        shutil.copytree(model(folders, trainer), again, copy_function=shutil.copy2)
        for path in sorted(again.glob("fold_*/validation/*.nii.gz")):
            predict(references / path.name, path, np.random.default_rng(len(path.name) + shift), shift)
        for fold in range(5):
            write_summary(again / f"fold_{fold}" / "validation", references)
    assert compare(tmp_path / "report", "--runs", 2) == 0
    printed = capsys.readouterr().out
    assert "2 runs of each, 10 cases, validation cases of folds 0, 1, 2, 3, 4" in printed and "WARNING" not in printed
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    row = next(row for row in report["paired"] if (row["structure"], row["score"]) == ("mean", "dice"))
    assert (row["runs"], row["folds"], row["n"]) == (2, 5, 10) and row["p"] is not None and row["sd_between_runs"] is not None
    write_checkpoint(model(folders, f"{OTHER}_run2") / "fold_4" / "checkpoint_final.pth", 30, 0.8)
    assert compare(tmp_path / "report", "--runs", 2) == 1
    assert f"{OTHER}_run2__nnUNetPlans__3d_fullres is no further run of" in capsys.readouterr().err


def test_parallel_scoring_equals_serial(folders, tmp_path):
    assert compare(tmp_path / "serial") == 0
    assert compare(tmp_path / "parallel", "-np", 2) == 0
    assert (tmp_path / "serial" / "cases.csv").read_text() == (tmp_path / "parallel" / "cases.csv").read_text()


def test_folders_of_predictions_three_methods_and_lesions(folders, tmp_path, capsys):
    reference = folders / "raw" / DATASET / "labelsTs"
    for name, shift in (("a", 1), ("b", 2), ("c", 3)):
        for file in reference.iterdir():
            predict(file, tmp_path / name / file.name, np.random.default_rng(shift), shift)
    named = [f"{name}={tmp_path / name}" for name in "abc"]
    output = tmp_path / "report"
    arguments = [
        "compare",
        "--predictions",
        *named,
        "--reference",
        str(reference),
        "--lesions",
        "-o",
        str(output),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "lesion F1" in printed
        and "lesion recall by size" in printed
        and "2 cases only" in printed
        and "these two models" in printed
    )
    report = json.loads((output / "report.json").read_text())
    assert report["methods"] == ["a", "b", "c"] and {row["baseline"] for row in report["paired"]} == {"a"}
    assert report["lesion_recall_by_size"] and report["summary"][0].keys() == {
        "method",
        "structure",
        "score",
        "n",
        "mean",
        "sd",
        "median",
    }
    assert not (output / "plots" / "curves.png").exists() and not (output / "plots" / "cost.png").exists()


def test_regions_and_ignore_label(tmp_path):
    raw = write_dataset(
        tmp_path, 5, 0, scar=True, regions=True, ignore_label=True, dataset_id=992, name="Rich", size=SIZE, spacing=SPACING
    )
    files = sorted((raw / "labelsTr").iterdir())
    for file in files:
        predict(file, tmp_path / "same" / file.name, np.random.default_rng(0), 0)
        predict(file, tmp_path / "b" / file.name, np.random.default_rng(0), 2)
    named = [f"same={tmp_path / 'same'}", f"b={tmp_path / 'b'}"]
    output = tmp_path / "report"
    assert main(["compare", "--predictions", *named, "--reference", str(raw / "labelsTr"), "-o", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["structures"] == {"heart": [1, 2, 3, 4], "left_heart": [1, 2, 4], "scar": [4], "left_ventricle": [1]}
    assert report["ignore_label"] == 5
    values = {(row["structure"], row["score"]): row["mean"] for row in report["summary"] if row["method"] == "same"}
    # predict() drops label 4 (scar): the cavity is untouched, the scar is missed altogether
    assert values["left_ventricle", "dice"] == values["left_ventricle", "nsd"] == 1 and values["left_ventricle", "hd95"] == 0
    assert values["scar", "dice"] == 0 and values["scar", "hd95"] > 50
    missed = [row for row in report["empty"] if row["structure"] == "scar"]
    assert [row["missed"] for row in missed] == [5 - row["absent"] for row in missed]


def test_two_dimensional_png(tmp_path, capsys):
    from skimage import io

    raw = write_dataset(tmp_path, 5, 3, dataset_id=993, name="Flat", size=(40, 36), spacing=(2.0, 2.0))
    for file in (raw / "labelsTs").iterdir():
        label = io.imread(file)
        for name, shift in (("a", 1), ("b", 2)):
            (tmp_path / name).mkdir(exist_ok=True)
            io.imsave(tmp_path / name / file.name, np.roll(label, shift, axis=0), check_contrast=False)
    named = [f"{name}={tmp_path / name}" for name in "ab"]
    output = tmp_path / "report"
    assert main(["compare", "--predictions", *named, "--reference", str(raw / "labelsTs"), "-o", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["settings"]["distance_unit"] == "px" and "HD95 [px]" in capsys.readouterr().out
    values = {(row["method"], row["structure"], row["score"]): row["mean"] for row in report["summary"]}
    assert values["a", "left_ventricle", "hd95"] == 1 and values["b", "left_ventricle", "hd95"] == 2


def test_the_page_in_a_browser(folders, tmp_path):
    """Rendered headless: every picture has its size, nothing is wider than the window, no error on the console."""
    import re
    import subprocess

    browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium")
    (folders / "raw").rename(folders / "a & <b>")  # names are escaped
    assert compare(tmp_path / "report") == 0
    page = tmp_path / "report" / "report.html"
    probe = page.read_text().replace(
        "</body>",
        """<script>
        const images = [...document.images].map(i => i.complete && i.naturalWidth > 300);
        document.body.dataset.probe = JSON.stringify({images, wide: document.documentElement.scrollWidth > innerWidth,
            tables: document.querySelectorAll('table').length, errors: window.failed || 0});</script></body>""",
    )
    (tmp_path / "probe.html").write_text(probe)
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,800",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    assert json.loads(found[1].replace("&quot;", '"')) == {"images": [True] * 4, "wide": False, "tables": 8, "errors": 0}


# unfair, but compared: said loudly


def warnings_of(output):
    return json.loads((output / "report.json").read_text())["warnings"]


def test_unfair_comparisons_are_said_loudly(folders, tmp_path, capsys):
    other = model(folders, OTHER)
    edit_json(other / "plans.json", lambda plans: plans["configurations"]["3d_fullres"].update(patch_size=[8, 64, 64]))
    for fold in range(2):
        write_checkpoint(other / f"fold_{fold}" / "checkpoint_final.pth", 30, 0.8)
    edit_json(folders / "preprocessed" / DATASET / "splits_final.json", lambda splits: splits[1]["val"].pop())
    (model(folders, BASELINE) / "fold_1" / "checkpoint_latest.pth").touch()
    assert compare(tmp_path / "report", folds="0 1") == 0
    text = "\n".join(warnings_of(tmp_path / "report"))
    assert "patch_size [8, 32, 32] / [8, 64, 64]" in text
    assert f"other numbers of epochs: {BASELINE} 20, {OTHER} 30" in text
    assert "Folds 0, 1 only" in text and "newer than validation/summary.json" in text and "4 cases only" in text
    assert "splits_final.json has another fold 1" in text and "another training began" in text
    assert "WARNING" in capsys.readouterr().out
    assert "Read this first" in (tmp_path / "report" / "report.html").read_text()


def test_a_checkpoint_that_would_run_code_is_not_unpickled_and_the_text_log_serves(folders, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for fold in range(5):
        folder = model(folders, OTHER) / f"fold_{fold}"
        torch.save({"network_weights": {}, "logging": Evil(), "current_epoch": 3}, folder / "checkpoint_final.pth")
        (folder / "training_log_2026_1_1_00_00_00.txt").write_text(
            "2026-01-01 00:00:00.1: Epoch 0\n2026-01-01 00:00:09.1: train_loss -0.1\n: val_loss -0.2\n"
            ": Pseudo dice [np.float32(0.5), nan, np.float32(0.7)]\n: Epoch time: 9.5 s\n: Epoch 1\n: train_loss -0.2\n"
        )
        (folder / "training_log_2026_1_2_00_00_00.txt").write_text(
            ": Epoch 1\n: train_loss -0.3\n: val_loss 1e-3\n: Pseudo dice [0.6, 0.8]\n: Epoch time: 10.5 s\n"
        )
    assert compare(tmp_path / "report") == 0
    assert not (tmp_path / "executed").exists()
    cost = {row["method"]: row for row in json.loads((tmp_path / "report" / "report.json").read_text())["cost"]}[OTHER]
    assert (cost["epochs"], cost["parameters"], cost["seconds_per_epoch"]) == (2, None, 10)


def test_the_text_log_of_a_killed_and_continued_training(tmp_path):
    from nnunet_l2g.compare.curves import read_logs

    (tmp_path / "training_log_2026_1_9_01_00_00.txt").write_text(
        ": Epoch 0\n: train_loss -0.1\n: val_loss -0.2\n: Pseudo dice [0.5, nan]\n: Epoch time: 9.5 s\n"
        ": Epoch 1\n: train_loss -9\n: Epoch time: 99 s\n"
    )
    (tmp_path / "training_log_2026_1_10_01_00_00.txt").write_text(
        ": Epoch 1\n: train_loss -0.3\n: val_loss 1e-3\n: Pseudo dice [0.6, 0.8]\n: Epoch time: 10 s\n"
    )
    curves = read_logs(tmp_path)
    assert curves.train_loss == [-0.1, -0.3] and curves.val_loss == [-0.2, 1e-3] and curves.seconds == [9.5, 10]
    assert curves.pseudo_dice == pytest.approx([0.5, 0.7]) and curves.seconds_per_epoch == 9.75
    assert read_logs(tmp_path / "nowhere").epochs == 0


# refused, before anything is computed


def refuse(folders, remove=(), json_change=None):
    for path in remove:
        target = model(folders, OTHER) / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    if json_change:
        edit_json(model(folders, OTHER) / json_change[0], json_change[1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            dict(remove=["fold_3"]),
            r"fold_3: missing; nnUNetv2_train Dataset991_Compared 3d_fullres 3 -tr nnUNetTrainerL2GNet -p nnUNetPlans$",
        ),
        (dict(remove=["fold_3/validation"]), r"fold_3: not validated; .* --val$"),
        (dict(remove=["fold_3/checkpoint_final.pth"]), r"fold_3: missing"),
        (dict(remove=["plans.json"]), r"plans.json: cannot be used \(FileNotFoundError"),
        (dict(remove=["dataset.json"]), r"dataset.json: cannot be read"),
        (dict(json_change=("dataset.json", lambda d: d["labels"].update(scar=4))), "declares other labels than"),
        (
            dict(json_change=("plans.json", lambda p: p.pop("configurations"))),
            r"plans.json: cannot be used \(KeyError: 'configurations'",
        ),
        (
            dict(json_change=("fold_2/validation/summary.json", lambda s: s.pop("metric_per_case"))),
            r"fold_2/validation/summary.json: not a summary",
        ),
        (
            dict(json_change=("fold_2/validation/summary.json", lambda s: s["metric_per_case"].pop())),
            r"fold_2/validation: holds 2 segmentations, its summary.json 1; they differ in phantom_tr007",
        ),
    ],
)
def test_results_that_cannot_be_compared_are_refused(folders, tmp_path, capsys, spoil, message):
    import re

    refuse(folders, **spoil)
    assert compare(tmp_path / "report") == 1
    error = capsys.readouterr().err
    assert re.search(message, error, re.M), error
    assert not (tmp_path / "report").exists()


def test_unequal_cases_and_corrupt_files_are_refused(folders, tmp_path, capsys):
    validation = model(folders, OTHER) / "fold_1" / "validation"
    summary = (validation / "summary.json").read_text()
    (validation / "summary.json").write_text(summary[:100])
    assert compare(tmp_path / "report") == 1
    assert "fold_1/validation/summary.json: not a summary of nnU-Net (JSONDecodeError" in capsys.readouterr().err
    (validation / "phantom_tr001.nii.gz").unlink()
    edit = json.loads(summary)
    edit["metric_per_case"] = [case for case in edit["metric_per_case"] if "tr001" not in case["prediction_file"]]
    (validation / "summary.json").write_text(json.dumps(edit))
    assert compare(tmp_path / "report") == 1
    assert f"{BASELINE} and {OTHER} have other cases: only {BASELINE} has phantom_tr001" in capsys.readouterr().err


def test_files_that_do_not_fit_their_reference_are_named(folders, tmp_path, capsys):
    file = model(folders, OTHER) / "fold_0" / "validation" / "phantom_tr000.nii.gz"
    good = sitk.ReadImage(str(file))
    size, spacing = good.GetSize(), good.GetSpacing()

    def changed(change):
        image = sitk.Image(good)
        change(image)
        return image

    out_of_range = sitk.GetImageFromArray(np.full(size[::-1], 7, np.uint8))
    out_of_range.CopyInformation(good)
    for image, message in (
        (good[:, :, 1:], "shape"),
        (changed(lambda i: i.SetSpacing([s * 1.1 for s in spacing])), "spacing ("),
        (out_of_range, "holds the values [7.0]; dataset.json declares [0, 1, 2, 3]"),
    ):
        sitk.WriteImage(image, str(file))
        assert compare(tmp_path / "report") == 1
        error = capsys.readouterr().err
        assert message in error and str(file) in error
    file.write_bytes(b"no image")
    assert compare(tmp_path / "report") == 1
    assert f"{file}: SimpleITKIO cannot read it" in capsys.readouterr().err


def test_output_folder(folders, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert compare(tmp_path / "mine") == 1 and "not empty, and not made by" in capsys.readouterr().err
    assert compare(tmp_path / "mine" / "notes.txt") == 1 and "this is a file" in capsys.readouterr().err
    assert compare("/proc/report") == 1 and "/proc/report: cannot be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-d 991 -c 3d_fullres -tr nnUNetTrainer", "nothing to compare it with"),
        ("-d 991 -c 3d_fullres -tr nnUNetTrainer nnUNetTrainer", "nnUNetTrainer nnUNetPlans 3d_fullres is named twice"),
        (
            "-d 991 -c 3d_fullres -tr nnUNetTrainer nnUNetTrainerL2Gnet",
            "holds nnUNetTrainerL2GNet__nnUNetPlans__3d_fullres",
        ),
        ("-d 991 -c 3d_fullres 2d 2d -tr a b", "-tr a b: 3 methods are compared; give one value for all"),
        ("-d 990 -c 2d -tr a b", "-d 990: no such dataset; nnU-Net's folders hold Dataset991_Compared"),
        ("-d Dataset001_X -c 2d -tr a b", "no such dataset"),
        ("-d 991 -tr a b", "nothing to compare: name trainings"),
        ("-d 991 -c 2d -tr a b -f 0 x", "-f x: expected fold numbers, or all"),
        ("-d 991 -c 2d -tr a b -f 0 00", "name each fold once"),
        ("-d 991 -c 2d -tr a b --surface-tolerance nan", "--surface-tolerance nan"),
        ("-d 991 -c 2d -tr a b --lesion-overlap 50", "--lesion-overlap 50: expected a fraction"),
        ("-d 991 -c 2d -tr a b -np 0", "-np 0: expected 1 or more"),
        ("--predictions a=x b=y", "--predictions needs --reference"),
        ("--predictions a=x -d 991 --reference .", "compare either"),
        ("--predictions a=x --reference .", "use at least two names"),
        ("--predictions a b=x --reference .", "--predictions a: expected NAME=FOLDER"),
        ("--predictions a=x a=y --reference .", "use at least two names"),
        ("--predictions a=. b=. b=. --reference .", "--predictions b=.: named twice; each run of b has its own folder"),
        ("--predictions a=nowhere b=nowhere --reference .", "--predictions a=nowhere: no such folder"),
    ],
)
def test_bad_arguments(folders, tmp_path, capsys, arguments, message):
    assert main(["compare", *arguments.split(), "-o", str(tmp_path / "report")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_prediction_folders_that_cannot_be_compared(folders, tmp_path, capsys, monkeypatch):
    reference = folders / "raw" / DATASET / "labelsTs"
    shutil.copytree(reference, tmp_path / "a")
    shutil.copytree(reference, tmp_path / "b")

    def attempt(*more):
        named = [f"{name}={tmp_path / name}" for name in "ab"]
        assert (
            main(["compare", "--predictions", *named, "--reference", str(reference), "-o", str(tmp_path / "report"), *more])
            == 1
        )
        return capsys.readouterr().err

    (tmp_path / "b" / "phantom_ts001.nii.gz").unlink()
    assert "a and b have other cases: only a has phantom_ts001" in attempt()
    (tmp_path / "b" / "phantom_ts000.nii.gz").rename(tmp_path / "b" / "phantom_ts000.nrrd")
    assert "b: no .nii.gz file in it, but .nrrd" in attempt()
    (tmp_path / "labels.json").write_text("[]")
    assert 'labels.json: has no "labels"' in attempt("--dataset-json", str(tmp_path / "labels.json"))
    (tmp_path / "labels.json").write_text('{"labels": {"a": 1}, "file_ending": ".nii.gz"}')
    assert "labels.json: not a dataset.json that nnU-Net can use" in attempt("--dataset-json", str(tmp_path / "labels.json"))
    monkeypatch.delenv("nnUNet_results")
    assert compare(tmp_path / "report") == 1 and "nnUNet_results is not set" in capsys.readouterr().err


# nnU-Net itself


@pytest.mark.long
def test_train_fills_in_what_is_missing(planned, tmp_path, monkeypatch, capsys):
    for name, value in planned.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    trainers = [
        "nnUNetTrainerL2GNetNearestReference_2epochs_2iterations",
        "nnUNetTrainerL2GNetOneReference_2epochs_2iterations",
    ]
    output = tmp_path / "report"

    def run(*more):
        command = ["compare", "-d", "981", "-c", "3d_fullres", "-f", "0", "-tr", *trainers, "-o", str(output), "-np", "1"]
        return main([*command, "--device", "cpu", *more]), capsys.readouterr()

    status, printed = run("-p", "nnUNetOtherPlans", "--train")
    assert status == 1 and "nnUNetOtherPlans.json: no such plans" in printed.err
    status, printed = run()
    assert status == 1 and "run them, or let --train do it" in printed.err and not output.exists()

    status, printed = run("--train")
    assert status == 0 and printed.out.count("nnUNetv2_train") == 2 and printed.out.count("Epoch 1, train_loss") == 2
    report = json.loads((output / "report.json").read_text())
    assert len(report["cases"]) == 2 * 2 * 3  # two validation cases, three structures
    assert all("Validate again" not in warning for warning in report["warnings"])  # our Dice is nnU-Net's
    assert all(row["epochs"] == 2 and row["parameters"] > 1e4 and row["seconds_per_epoch"] > 0 for row in report["cost"])

    folder = tmp_path / "results" / "Dataset981_PhantomPlain"
    folds = [folder / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0" for trainer in trainers]
    shutil.rmtree(folds[0] / "validation")
    (folds[1] / "checkpoint_final.pth").unlink()  # checkpoint_best is left
    for kind, strengths in list(STRENGTHS.items()):  # two are enough here
        monkeypatch.delitem(STRENGTHS, kind)
        if kind in ("noise", "resolution"):
            monkeypatch.setitem(STRENGTHS, kind, strengths[-1:])
    status, printed = run("--train", "--measure", "--shift")
    commands = [line for line in printed.out.splitlines() if "nnUNetv2_train" in line]
    assert status == 0 and commands[0].endswith("--val") and commands[1].endswith("--c")
    report = json.loads((output / "report.json").read_text())
    assert all(row["gflops"] > 0.1 and row["seconds_per_case"] > 0 for row in report["cost"])
    assert len(report["shift"]) == 2 * 2 and all(0 <= row["dice"] <= 1 for row in report["shift"])
    assert (output / "plots" / "shift.png").stat().st_size > 10_000 and "Perturbed images" in (output / "report.md").read_text()
    again = run("--train", "--shift")[1].out
    assert "nnUNetv2_train" not in again and "writing the images" not in again and "Predicting" not in again
    assert json.loads((output / "report.json").read_text())["shift"] == report["shift"]

    trainers[1] = "nnUNetTrainerL2GNetOneReferencex"
    status, printed = run("--train")
    assert status == 1 and "-tr nnUNetTrainerL2GNetOneReferencex: nnU-Net finds no trainer of this name" in printed.err


def test_shift_asks_for_raw_images_of_the_source(folders, tmp_path, capsys):
    plain = folders / "raw" / DATASET / "imagesTr"
    gone = sorted(plain.glob("*_0000.nii.gz"))[3]
    gone.unlink()
    assert compare(tmp_path / "report", "--shift", "--device", "cpu") == 1
    assert "--shift: " in capsys.readouterr().err and not (tmp_path / "report").exists()
    edit_json(model(folders, OTHER) / "plans.json", lambda p: p.update(nnunet_l2g_target={}))
    assert compare(tmp_path / "report", "--shift", "--device", "cpu") == 1
    assert "are adapted to a target" in capsys.readouterr().err and not (tmp_path / "report").exists()


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32"])
def test_a_perturbed_file_keeps_grid_and_pixel_type(tmp_path, kind):
    from nnunet_l2g.evaluation.shifts import perturb_file

    array = np.random.default_rng(0).integers(0, 250, (4, 9, 8)).astype(kind)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.5, 1.5, 6.0))
    image.SetOrigin((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    perturb_file(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", "noise", 0.2)
    changed = sitk.ReadImage(str(tmp_path / "b.nii.gz"))
    assert (changed.GetSpacing(), changed.GetOrigin()) == (image.GetSpacing(), image.GetOrigin())
    assert changed.GetPixelID() == image.GetPixelID()
    result = sitk.GetArrayFromImage(changed).astype(float)
    assert 20 < (result - array).std() < 60 and (kind != "uint8" or result.max() <= 255)


def test_a_perturbed_colour_png(tmp_path):
    from skimage import io

    from nnunet_l2g.evaluation.shifts import perturb_file

    array = np.random.default_rng(0).integers(0, 255, (9, 8, 3)).astype(np.uint8)
    io.imsave(tmp_path / "a.png", array, check_contrast=False)
    perturb_file(tmp_path / "a.png", tmp_path / "b.png", "blur", 1.0)
    changed = io.imread(tmp_path / "b.png")
    assert changed.shape == array.shape and changed.dtype == np.uint8 and changed.std() < array.std()


def test_flops_of_a_convolution():
    from nnunet_l2g.compare.measure import count_flops

    network = torch.nn.Conv3d(2, 4, 3, padding=1, bias=False)
    assert count_flops(network, torch.zeros(1, 2, 5, 6, 7)) == 2 * 4 * 2 * 27 * 5 * 6 * 7

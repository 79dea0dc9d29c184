"""The benchmark scripts: results_table on handmade results, and that residual_cost counts (more in test_performance)."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from planned import finish

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATASET = "Dataset981_Handmade"
VANILLA, OURS = "nnUNetTrainer_3epochs", "nnUNetTrainerL2GNet_3epochs"
LOG = """
Configuration name: 3d_fullres
 {'batch_size': 2}
2026-01-02 03:04:05.678901: Epoch 0
2026-01-02 03:04:05.678901: Epoch time: 100.0 s
2026-01-02 03:04:05.678901: Epoch 1
2026-01-02 03:04:05.678901: %s
2026-01-02 03:04:05.678901: Epoch time: 5.0 s
2026-01-02 03:04:05.678901: Epoch 2
2026-01-02 03:04:05.678901: %s
2026-01-02 03:04:05.678901: Epoch time: 7.0 s
"""
VALIDATED = "2026-01-02 03:04:05.678901: Mean Validation Dice:  0.5 \n"
EARLY = "perplexity 3 codes_used 4 kept_variance 0.1 marginal_error 1e-2"
LATE = "perplexity 31.1 codes_used 45 kept_variance 0.34 marginal_error 1.5e-03"


def script(name, *args, fails=False, cwd=None, timeout=600):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, args)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
    )
    done = subprocess.CompletedProcess(command, None, *finish(child, timeout))
    done.returncode = child.returncode
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def metrics(dice, tp, fn):
    return {"Dice": dice, "TP": tp, "FN": fn}


def write_fold(root, trainer, cases, fold=0, log=LOG % ("train_loss 1", "train_loss 1") + VALIDATED):
    """A fold as nnU-Net leaves it; cases: name -> (metrics of label 1, metrics of label 2)."""
    model = root / DATASET / f"{trainer}__nnUNetPlans__3d_fullres"
    folder = model / f"fold_{fold}"
    (folder / "validation").mkdir(parents=True)
    labels = {"background": 0, "liver": 1, "lesion": 2}
    (model / "dataset.json").write_text(json.dumps({"labels": labels}))
    per_case = [
        {"prediction_file": f"validation/{name}.nii.gz", "metrics": {"1": one, "2": two}} for name, (one, two) in cases.items()
    ]
    (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": per_case}))
    (folder / "training_log_2026_1_2_03_04_05.txt").write_text(log)
    return folder


CASES = {
    "a": (metrics(0.8, 90, 10), metrics(0.5, 1, 3)),
    "b": (metrics(0.6, 30, 10), metrics(math.nan, 0, 0)),  # no lesion, none found
    "c": (metrics(0.4, 20, 20), metrics(0.0, 0, 0)),  # no lesion, one found: Dice 0, no recall
}


@pytest.fixture
def results(tmp_path):
    """Vanilla and ours, fold 0, one repeat."""
    write_fold(tmp_path / "one", VANILLA, CASES)
    write_fold(tmp_path / "one", OURS, CASES, log=LOG % (EARLY, LATE) + VALIDATED)
    return tmp_path / "one"


def table(results, *args, trainers=(VANILLA, OURS), **keywords):
    output = results.parent / "table.json"
    roots = () if "--results" in args else ("--results", results)
    child = script("results_table.py", "-d", 981, "-c", "3d_fullres", "-tr", *trainers, *roots, "-o", output, *args, **keywords)
    return child, json.loads(output.read_text()) if output.exists() else None


def test_numbers_of_the_table_are_those_of_the_folders(results):
    child, result = table(results)
    vanilla, ours = result["rows"]
    assert (result["dataset"], vanilla["trainer"], ours["trainer"]) == (DATASET, VANILLA, OURS)
    assert ours["dice"] == {"liver": pytest.approx(0.6), "lesion": 0.25}
    assert ours["recall"] == {"liver": pytest.approx((0.9 + 0.75 + 0.5) / 3), "lesion": 0.25}
    assert ours["mean_dice"] == pytest.approx(0.425)
    assert ours["mean_recall"] == pytest.approx((0.716666667 + 0.25) / 2)
    assert ours["num_cases"] == 3 and ours["cases"]["b"]["dice"]["lesion"] is None
    assert ours["seconds_per_epoch"] == 6.0  # of 5 and 7: the first epoch compiles
    assert ours["diagnostics"] == {"perplexity": 31.1, "codes_used": 45, "kept_variance": 0.34, "marginal_error": 0.0015}
    assert vanilla["diagnostics"] == {}
    lines = child.stdout.splitlines()
    assert f"| {VANILLA} | 1 | 0.4250 | 0.4833 | 3 | 6.0 | n/a | n/a | n/a | n/a |" in lines
    assert f"| {OURS} | 1 | 0.4250 | 0.4833 | 3 | 6.0 | 31.1 | 45 | 0.34 | 0.0015 |" in lines
    assert "| lesion | 0.2500 | 0.2500 |" in lines


def test_folds_are_pooled_by_case_and_repeats_have_rows_of_their_own(results, tmp_path):
    more = {"d": (metrics(0.2, 1, 1), metrics(math.nan, 0, 0))}
    for root in (results, tmp_path / "two"):
        if root != results:
            write_fold(root, OURS, CASES)
        write_fold(root, OURS, more, fold=1)
    _, result = table(results, "-f", 0, 1, "--results", results, tmp_path / "two", trainers=[OURS])
    assert [(row["repeat"], row["num_cases"]) for row in result["rows"]] == [(1, 4), (2, 4)]
    assert result["rows"][0]["dice"] == {"liver": pytest.approx(0.5), "lesion": 0.25}


def test_a_class_in_no_case_is_not_available(results, tmp_path):
    write_fold(tmp_path / "two", OURS, {"b": CASES["b"]})
    child, result = table(tmp_path / "two", trainers=[OURS])
    assert result["rows"][0]["mean_dice"] is None and result["rows"][0]["dice"]["liver"] == 0.6
    assert "| lesion | n/a |" in child.stdout


def test_a_resumed_run_is_read_whole_and_an_earlier_one_not_at_all(results):
    fold = results / DATASET / f"{OURS}__nnUNetPlans__3d_fullres" / "fold_0"
    (fold / "training_log_2026_1_2_03_04_05.txt").write_text(LOG % (EARLY, EARLY) + VALIDATED)  # an earlier run
    (fold / "training_log_2026_1_10_03_04_05.txt").write_text(
        "Epoch 0 \nEpoch time: 90 s\nEpoch 1\nEpoch time: 3.0 s\nEpoch 2\nEpoch time: 1.0 s\n"
    )
    error = table(results, trainers=[OURS], fails=True)[0].stderr
    assert "Mean Validation Dice" in error and "fold_0" in error
    (fold / "training_log_2026_1_11_03_04_05.txt").write_text(  # continued from a checkpoint before epoch 2
        f"Epoch 2\nEpoch time: 80 s\nEpoch 3\n{LATE}\nEpoch time: 5.0 s\n{VALIDATED}"
    )
    row = table(results, trainers=[OURS])[1]["rows"][0]
    assert row["seconds_per_epoch"] == 4.0 and row["diagnostics"]["codes_used"] == 45  # of 3 and 5


@pytest.mark.parametrize("missing", ["validation/summary.json", "training_log_2026_1_2_03_04_05.txt"])
def test_missing_files_are_named(results, missing):
    (results / DATASET / f"{OURS}__nnUNetPlans__3d_fullres" / "fold_0" / missing).unlink()
    child, _ = table(results, fails=True)
    assert missing.partition("2026")[0] in child.stderr and OURS in child.stderr and "Traceback" not in child.stderr


def test_a_trainer_that_was_not_trained_and_other_cases_are_refused(results):
    assert "nnUNetTrainer_9epochs" in table(results, trainers=["nnUNetTrainer_9epochs"], fails=True)[0].stderr
    write_fold(results, "nnUNetTrainer_4epochs", {"a": CASES["a"]})
    child, _ = table(results, trainers=[VANILLA, "nnUNetTrainer_4epochs"], fails=True)
    assert "b, c" in child.stderr and "splits_final.json" in child.stderr


def test_residual_cost_counts_and_times_both_ways(tmp_path):
    output = tmp_path / "cost.json"
    script("residual_cost.py", "--plan", "tiny", "--calls", 1, "--device", "cpu", "-o", output, cwd=tmp_path)
    result = json.loads(output.read_text())
    gflop = result["gflop"]
    assert 0 < gflop["plain network"] < gflop["whole network"] and gflop["maps, complementary"] < gflop["whole network"]
    assert gflop["maps, five random masks"] > 1.5 * gflop["maps, complementary"]
    assert all(value > 0 for value in result["median_seconds"].values())

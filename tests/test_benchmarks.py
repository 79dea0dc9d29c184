"""The benchmark scripts run, and the results table computes what it says."""

import json

import pytest
import results_table
import step_time


@pytest.fixture
def finished(tmp_path):
    """A fold as nnU-Net leaves it; one case has no reference for class 2."""
    fold = tmp_path / "Dataset004_X" / "T__nnUNetPlans__2d" / "fold_0"
    (fold / "validation").mkdir(parents=True)
    cases = [
        {"1": {"Dice": 0.8, "TP": 6, "FN": 2}, "2": {"Dice": 0.5, "TP": 1, "FN": 3}},
        {"1": {"Dice": 0.6, "TP": 5, "FN": 5}, "2": {"Dice": float("nan"), "TP": 0, "FN": 0}},
    ]
    (fold / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": [{"metrics": c} for c in cases]}))
    lines = ["Epoch time: 60.0 s", "perplexity 31.1 codes_used 45 kept_variance 0.3", "Epoch time: 5.0 s", "Epoch time: 7.0 s"]
    (fold / "training_log_1.txt").write_text("\n".join([*lines, "perplexity 20 codes_used 40 kept_variance 0.4"]))
    return tmp_path


def test_results_table_computes_means_over_cases(finished, capsys):
    row = results_table.read_fold(finished / "Dataset004_X" / "T__nnUNetPlans__2d" / "fold_0")
    assert row["dice"] == pytest.approx({"1": 0.7, "2": 0.5}) and row["recall"] == pytest.approx({"1": 0.625, "2": 0.25})
    assert row["epoch_seconds"] == 6 and row["diagnostics"] == {"perplexity": 20, "codes_used": 40, "kept_variance": 0.4}
    assert results_table.main(["-d", "4", "-c", "2d", "-f", "0", "-tr", "T", "--results", str(finished)]) == 0
    assert "| T | 1 | 0 | 2 | 0.6000 | 0.7000 | 0.5000 | 0.4375 |" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "named"), [(["-f", "1"], "fold_1"), (["-d", "5"], "0 folders of dataset 5")])
def test_results_table_names_what_is_missing(finished, capsys, arguments, named):
    base = {"-d": "4", "-c": "2d", "-f": "0", "-tr": "T"} | dict([arguments])
    assert results_table.main([x for pair in base.items() for x in pair] + ["--results", str(finished)]) == 1
    assert named in capsys.readouterr().err


def test_results_table_refuses_a_broken_summary(finished):
    fold = finished / "Dataset004_X" / "T__nnUNetPlans__2d" / "fold_0"
    (fold / "validation" / "summary.json").write_text('{"metric_per')
    with pytest.raises(ValueError, match=r"summary\.json is not a summary"):
        results_table.read_fold(fold)


def test_step_time_times_every_network(tmp_path):
    arguments = "--plan tiny --rounds 1 --warmup 1 --device cpu -o"
    report = step_time.main([*arguments.split(), str(tmp_path / "x.json")])
    assert set(report["networks"]) == set(step_time.NETWORKS) and report["networks"]["vanilla"]["ratio"] == 1
    assert json.loads((tmp_path / "x.json").read_text()) == report
    plain, ours = (report["networks"][name]["parameters"] for name in ("vanilla", "nnUNetTrainerL2GNet"))
    assert plain < ours

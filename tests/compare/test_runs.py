"""`compare --runs`: which models it takes, what it says is missing, in which order it trains, what it refuses."""

import pytest

from nnunet_l2g.cli import main
from nnunet_l2g.compare import local_runs, training
from nnunet_l2g.compare.models import check_folds, choose_models
from nnunet_l2g.errors import UserError

DATASET, ENDING = "Dataset994_Runs", "__nnUNetPlans__2d"
VANILLA, OURS = "nnUNetTrainer_6epochs", "nnUNetTrainerL2GNet_6epochs"


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "nnUNet_results"
    (folder / DATASET).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_results", str(folder))
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    return folder / DATASET


def choose(runs, trainers=(VANILLA, OURS)):
    return choose_models(DATASET, list(trainers), ["nnUNetPlans"], ["2d"], runs)


def finish(results, trainer, fold=0, *files):
    folder = results / f"{trainer}{ENDING}" / f"fold_{fold}"
    (folder / "validation").mkdir(parents=True)
    for file in files or ("checkpoint_final.pth", "validation/summary.json"):
        (folder / file).touch()


def test_runs_of_each_trainer_are_its_names_with_and_without_a_run(results):
    one, two = choose([3, 2])
    assert [model.trainer for model in one] == [VANILLA, f"{VANILLA}_run2", f"{VANILLA}_run3"]
    assert [model.name for model in two] == [OURS, f"{OURS} run 2"] and [model.run for model in one] == [1, 2, 3]
    assert one[2].folder == results / f"{VANILLA}_run3{ENDING}"
    assert [[model.trainer for model in method] for method in choose([1])] == [[VANILLA], [OURS]]
    assert choose([1], [VANILLA, f"{VANILLA}_run2"])[1][0].name == f"{VANILLA}_run2"  # two models, if somebody wants that


def test_what_is_missing_is_named_with_its_command(results):
    finish(results, VANILLA)
    finish(results, f"{VANILLA}_run2", 0, "checkpoint_latest.pth")  # half trained
    finish(results, OURS, 0, "checkpoint_final.pth")
    with pytest.raises(UserError) as error:
        check_folds([model for method in choose([2]) for model in method], ["0"], DATASET)
    text = str(error.value)
    assert "3 of the trainings to compare are not there" in text
    for state, trainer, extra in (
        ("unfinished", f"{VANILLA}_run2", " --c"), ("not validated", OURS, " --val"), ("missing", f"{OURS}_run2", ""),
    ):  # fmt: skip
        fold = results / f"{trainer}{ENDING}" / "fold_0"
        assert f"  {fold}: {state}; nnUNetv2_train {DATASET} 2d 0 -tr {trainer} -p nnUNetPlans{extra}" in text.splitlines()
    assert "no such model" not in text


@pytest.mark.parametrize(
    ("trainers", "options", "message"),
    [
        ("a b", "--runs 0", "--runs 0: expected 1 to 100"),
        ("a b", "--runs 3 0", "--runs 0: expected 1 to 100"),
        ("a b", "--runs 1000000000", "--runs 1000000000: expected 1 to 100"),
        ("a b", "--runs 2 2 2", "--runs 2 2 2: 2 methods are compared; give one number for all, or 2"),
        ("a b_run2", "--runs 3", "-tr b_run2 --runs 3: the name says a run; name the trainer without it"),
        ("a b", "--jobs 2", "--jobs 2: belongs to --train on this machine"),
        ("a b", "--train --executor slurm --jobs 2", "--jobs 2: belongs to --train on this machine"),
        ("a b", "--train --jobs 0", "--jobs 0: expected 1 or more"),
        ("a b", "--train --device cpu --jobs 4096", "--jobs 4096: this process may use "),
    ],
)
def test_refused(results, tmp_path, capsys, trainers, options, message):
    command = f"compare -d 994 -c 2d -f 0 -tr {trainers} {options} -o {tmp_path / 'report'}"
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_predictions_have_no_runs_option(tmp_path, capsys):
    assert main(["compare", "--predictions", "a=x", "b=y", "--reference", "r", "--runs", "2", "-o", str(tmp_path / "o")]) == 1
    assert "compare either folders of predictions or trainings" in capsys.readouterr().err


def test_first_runs_are_trained_first_and_only_what_is_missing(results, tmp_path, monkeypatch):
    finish(results, OURS)
    seen = []
    monkeypatch.setattr(training, "check_trainable", lambda models, folds, dataset: None)
    monkeypatch.setattr(local_runs, "train_locally", lambda trainings, places: seen.extend([*trainings, places]))
    monkeypatch.setattr(local_runs, "available_cores", lambda: 2)
    options = f"--runs 2 1 --train --device cpu --jobs 2 -o {tmp_path / 'report'}"
    assert main(f"compare -d 994 -c 2d -f 0 1 -tr {VANILLA} {OURS} {options}".split()) == 1  # nothing was trained
    *trainings, places = seen
    assert [(t.model.trainer, t.fold) for t in trainings] == [
        (VANILLA, "0"), (VANILLA, "1"), (OURS, "1"), (f"{VANILLA}_run2", "0"), (f"{VANILLA}_run2", "1"),
    ]  # fmt: skip
    assert len(places) == 2 and trainings[-1].name == f"{VANILLA} run 2, fold 1"


def test_a_wrong_run_is_said_before_anything_is_trained(results, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (tmp_path / DATASET).mkdir()
    (tmp_path / DATASET / "nnUNetPlans.json").touch()
    models = [method[0] for method in choose([1], [OURS, f"{OURS}_run1"])]
    with pytest.raises(UserError, match=f"^-tr: trainer {OURS}_run1: runs are counted from 2 on; run 1 is {OURS}$"):
        training.check_trainable(models, ["0"], DATASET)

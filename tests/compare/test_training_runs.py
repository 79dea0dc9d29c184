"""`compare --train`: what is trained, in which order and where, what is refused, failures and Ctrl-C. nnU-Net is a stub."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import train_stub
from tiny_model import make_plans
from train_stub import calls, wait_for, write_checkpoint

from nnunet_l2g import nnunet
from nnunet_l2g.cli import main
from nnunet_l2g.compare import local_executor, training
from nnunet_l2g.compare.local_executor import Place, cuda_devices, places, train_locally
from nnunet_l2g.compare.models import Model, choose_models
from nnunet_l2g.compare.training import FINISHED, Training, case_names, check_folds, check_trainable, missing_trainings
from nnunet_l2g.errors import UserError

DATASET, ENDING = "Dataset993_Runs", "__nnUNetPlans__2d"
VANILLA, OURS = "nnUNetTrainer_6epochs", "nnUNetTrainerL2GNet_6epochs"
DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_training_runs as here
from nnunet_l2g import nnunet
nnunet.GRACE = 0.3
try:
    here.train(Path(sys.argv[1]), "01", [here.Place("a"), here.Place("b")])
except nnunet.Interrupted:
    sys.exit(130)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The stub's folder; nnUNetv2_train is the stub, results are in nnUNet_results beside it."""
    folder = tmp_path / "stub"
    for name, value in train_stub.install(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "nnUNet_results" / DATASET).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    for name in ("CUDA_VISIBLE_DEVICES", "nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nnunet, "POLL", 0.02)
    (tmp_path / "report").mkdir()
    return folder


def trainings(folder, folds):
    """Of one model, below the test's folder."""
    results = folder / "nnUNet_results" / DATASET / f"nnUNetTrainerAny{ENDING}"
    return missing_trainings([Model("Any", "nnUNetTrainerAny", "nnUNetPlans", "2d", results)], list(folds), DATASET)


def train(folder, folds, places, device="cpu"):
    train_locally(trainings(folder, folds), device, places, folder / "report")


def mode(stub, fold, text):
    (stub / f"nnUNetTrainerAny_{fold}.mode").write_text(text)


def alive(pid):
    """Zombies are dead: a container's first process may not collect them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# which trainings


def choose(runs, trainers=(VANILLA, OURS)):
    return choose_models(DATASET, list(trainers), ["nnUNetPlans"], ["2d"], runs)


def finish(results, trainer, *files):
    folder = results / f"{trainer}{ENDING}" / "fold_0"
    (folder / "validation").mkdir(parents=True)
    for file in files or ("checkpoint_final.pth", "validation/summary.json"):
        (folder / file).touch()


def test_runs_of_each_trainer_are_its_names_with_and_without_a_run(stub, tmp_path):
    one, two = choose([3, 2])
    assert [model.trainer for model in one] == [VANILLA, f"{VANILLA}_run2", f"{VANILLA}_run3"]
    assert [model.name for model in two] == [OURS, f"{OURS} run 2"] and [model.run for model in one] == [1, 2, 3]
    assert one[2].folder == tmp_path / "nnUNet_results" / DATASET / f"{VANILLA}_run3{ENDING}"
    assert [[model.trainer for model in method] for method in choose([1])] == [[VANILLA], [OURS]]
    assert choose([1], [VANILLA, f"{VANILLA}_run2"])[1][0].name == f"{VANILLA}_run2"  # two models, if somebody wants that


def test_what_is_missing_is_named_with_its_command(stub, tmp_path):
    results = tmp_path / "nnUNet_results" / DATASET
    finish(results, VANILLA)
    finish(results, f"{VANILLA}_run2", "checkpoint_latest.pth")
    finish(results, OURS, "checkpoint_final.pth")
    with pytest.raises(UserError) as error:
        check_folds([model for method in choose([2]) for model in method], ["0"], DATASET)
    text = str(error.value)
    assert "3 of the trainings to compare are not finished" in text and f", {VANILLA}{ENDING}, {VANILLA}_run2" in text
    for state, trainer, extra in (
        ("unfinished", f"{VANILLA}_run2", " --c"), ("not validated", OURS, " --val"), ("missing", f"{OURS}_run2", ""),
    ):  # fmt: skip
        fold = results / f"{trainer}{ENDING}" / "fold_0"
        assert f"  {fold}: {state}; nnUNetv2_train {DATASET} 2d 0 -tr {trainer} -p nnUNetPlans{extra}" in text.splitlines()
    stage = Training(choose([2])[1][1], "0", DATASET)
    finish(results, stage.model.trainer, "stage_autoencoder.pth")  # stopped in a pretraining stage
    assert stage.arguments()[-1] == "--c"


@pytest.mark.parametrize(
    ("trainers", "options", "message"),
    [
        ("a b", "--runs 3 0", "--runs 0: expected 1 to 100"),
        ("a b", "--runs 1000000000", "--runs 1000000000: expected 1 to 100"),
        ("a b", "--runs 2 2 2", "--runs 2 2 2: 2 methods are compared; give one value for all, or one for each"),
        ("a b_run2", "--runs 3", "-tr b_run2 --runs 3: the name says a run; name the trainer without it"),
        ("a b", "--jobs 2", "--jobs 2: belongs to --train on this machine"),
        ("a b", "--train --executor slurm --jobs 2", "--jobs 2: belongs to --train on this machine"),
        ("a b", "--train --jobs 0", "--jobs 0: expected 1 or more"),
        ("a b", "--train --device cpu --jobs 4096", "--jobs 4096: this process may use "),
    ],
)
def test_refused(stub, tmp_path, capsys, trainers, options, message):
    command = f"compare -d 993 -c 2d -f 0 -tr {trainers} {options} -o {tmp_path / 'new'}"
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_first_runs_are_trained_first_and_only_what_is_missing(stub, tmp_path, monkeypatch):
    finish(tmp_path / "nnUNet_results" / DATASET, OURS)
    seen = []
    monkeypatch.setattr(training, "check_trainable", lambda trainings: None)
    monkeypatch.setattr(local_executor, "train_locally", lambda trainings, *_: seen.extend(trainings))
    options = f"--runs 2 1 --train --device cpu -o {tmp_path / 'new'}"
    assert main(f"compare -d 993 -c 2d -f 0 1 -tr {VANILLA} {OURS} {options}".split()) == 1  # nothing was trained
    assert [(one.model.trainer, one.fold) for one in seen] == [
        (VANILLA, "0"), (VANILLA, "1"), (OURS, "1"), (f"{VANILLA}_run2", "0"), (f"{VANILLA}_run2", "1"),
    ]  # fmt: skip
    assert seen[-1].name == f"{VANILLA} run 2, fold 1"


# what has to be there


@pytest.fixture
def preprocessed(stub, tmp_path, monkeypatch):
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    (folder / "tiny").mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans((32, 32), (1.5, 2.5))))
    for number in range(7):
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (folder / "tiny" / f"case_{number}{ending}").touch()
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder


def test_the_splits_are_written_once_as_nnunet_would(preprocessed, tmp_path, monkeypatch):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    monkeypatch.setattr("nnunet_l2g.lookup.find_trainer", lambda name: object)
    check_trainable(trainings(tmp_path, "01"))
    splits = preprocessed / "splits_final.json"
    assert json.loads(splits.read_text()) == generate_crossval_split([f"case_{i}" for i in range(7)], seed=12345, n_splits=5)
    splits.write_text("mine")
    check_trainable(trainings(tmp_path, "01"))
    assert splits.read_text() == "mine"
    splits.unlink()
    for number in range(3):
        for path in (preprocessed / "tiny").glob(f"case_{number}*"):
            path.unlink()
    with pytest.raises(UserError, match="nnU-Net splits 5 cases or more, found 4"):
        check_trainable(trainings(tmp_path, "0"))
    check_trainable(trainings(tmp_path, ["all"]))  # is not split
    assert not splits.exists()


def test_what_cannot_be_trained_is_refused(preprocessed):
    with pytest.raises(UserError, match=r"Other\.json: no such plans"):
        case_names(preprocessed, "Other", "2d")
    with pytest.raises(UserError, match="-c 4d: nnUNetPlans has 2d"):
        case_names(preprocessed, "nnUNetPlans", "4d")
    for path in (preprocessed / "tiny").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"tiny: no data that nnU-Net can train on .* run nnUNetv2_preprocess"):
        case_names(preprocessed, "nnUNetPlans", "2d")
    models = [method[0] for method in choose([1], [OURS, f"{OURS}_run1"])]
    with pytest.raises(UserError, match=f"^-tr: trainer {OURS}_run1: runs are counted from 2 on; run 1 is {OURS}$"):
        check_trainable(missing_trainings(models, ["0"], DATASET))


# on one machine


def test_trainings_spread_over_the_gpus_each_seeing_its_own(stub, tmp_path, monkeypatch, capsys):
    for fold in "01":
        mode(stub, fold, "meet")
    monkeypatch.setattr(local_executor, "cuda_devices", lambda: ["3", "GPU-5c1f"])
    train(tmp_path, "0123", places("cuda", None), "cuda")
    records = calls(stub)
    assert len(records) == 4 and {record["cuda"] for record in records[:2]} == {"3", "GPU-5c1f"}
    for device in ("3", "GPU-5c1f"):  # never two at once on one
        spans = sorted((record["begin"], record["end"]) for record in records if record["cuda"] == device)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert not trainings(tmp_path, "0123")  # all finished
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"[1/4] on GPU 3: nnUNetv2_train {DATASET} 2d 0") for line in printed)
    expected = "      Any, fold 3: Epoch 5, train_loss -0.5, val_loss -0.4, Pseudo dice [0.5, 0.6], Epoch time: 1.0 s"
    assert printed.count(expected) == 1


def test_on_a_cpu_one_after_the_other_or_jobs_of_one_thread(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(stub))  # without the tests' own way to one thread
    train(tmp_path, "01", places("cpu", None))
    first, second = calls(stub)
    assert (
        first["cuda"] is None and first["end"] <= second["begin"] and first["threads"][0] == os.sysconf("SC_NPROCESSORS_ONLN")
    )
    monkeypatch.setattr(local_executor, "available_cores", lambda: 2)
    for fold in "23":
        mode(stub, fold, "meet")
    train(tmp_path, "23", places("cpu", 2))
    assert all(record["threads"] == [1, "1", "0"] for record in calls(stub)[2:]) and not trainings(tmp_path, "0123")
    with pytest.raises(UserError, match="--jobs 3: this process may use 2 cores; expected 1 to 2"):
        places("cpu", 3)
    with pytest.raises(UserError, match="--jobs 2: is for trainings on a CPU"):
        places("cuda", 2)


def test_failed_trainings_are_named_and_the_others_go_on(stub, tmp_path, monkeypatch, capsys):
    for fold in "02":
        mode(stub, fold, "fail")
    with pytest.raises(UserError) as error:
        train(tmp_path, "0123", [Place("a"), Place("b")])
    assert [one.fold for one in trainings(tmp_path, "0123")] == ["0", "2"]
    text = str(error.value)
    assert text.count("failed (exit status 1)") == text.count("    RuntimeError: the stub broke") == 2
    assert "training Any, fold 0 failed" in text and "training Any, fold 2 failed" in text and "same command again" in text
    log = tmp_path / "report" / "logs" / f"nnUNetTrainerAny{ENDING}_fold_0.log"
    assert str(log) in text and f"Any, fold 0: failed; see {log}" in capsys.readouterr().out
    monkeypatch.setattr(Training, "state", "missing")
    with pytest.raises(UserError, match=r"ended without an error, but .*fold_4 is missing; see .*log"):
        train(tmp_path, "4", [Place("a")])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_ends_all_trainings_and_their_workers_and_a_second_call_goes_on(stub, tmp_path):
    for fold in "01":
        mode(stub, fold, "hang")
    argv = [sys.executable, "-c", DRIVER, tmp_path, Path(__file__).parent, Path(__file__).parents[1]]
    process = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: sum("worker" in record for record in calls(stub)) == 2 or process.poll())
    pids = [record[key] for record in calls(stub) for key in ("pid", "worker")]
    assert len(pids) == 4 and all(alive(pid) for pid in pids)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, process.stderr.read()
    wait_for(lambda: not any(alive(pid) for pid in pids), 5)
    for fold in "01":
        mode(stub, fold, "")
    train(tmp_path, "01", [Place("a")])
    assert not trainings(tmp_path, "01")


@pytest.mark.parametrize(
    ("visible", "expected"), [("", ["0", "1"]), ("5, 2", ["5", "2"]), ("MIG-a,MIG-b,-1", ["MIG-a", "MIG-b"])]
)
def test_the_devices_are_those_that_torch_sees(monkeypatch, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_devices() == expected


@pytest.mark.parametrize("before", [True, False])
def test_a_half_written_checkpoint_is_set_aside_and_the_one_before_continued(stub, tmp_path, before):
    (one,) = trainings(tmp_path, "0")
    one.folder.mkdir(parents=True)
    latest = one.folder / "checkpoint_latest.pth"
    write_checkpoint(latest, 5)
    latest.write_bytes(latest.read_bytes()[:-10])
    if before:
        write_checkpoint(one.folder / "checkpoint_best.pth", 4)
    train(tmp_path, "0", [Place("a")])
    assert ("--c" in calls(stub)[0]["argv"]) == before and one.state == FINISHED
    log = (tmp_path / "report" / "logs" / f"nnUNetTrainerAny{ENDING}_fold_0.log").read_text()
    assert ("Epoch 3\n" in log) == (not before) and "Epoch 4\n" in log
    assert (one.folder / "checkpoint_latest.broken").exists()

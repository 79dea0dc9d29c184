"""One function for each parser of ours. Returns, or raises what the parser documents; anything else is a finding."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import importlib
import io
import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from tiny_model import make_plans

from fuzz.mutation import HOSTILE, Choices, spoilt, spoilt_bytes, spoilt_json
from fuzz.project import CASES, DATASET_JSON, FOLDER, SOURCE, SUMMARY, TARGET, adapted, image, place, planned, write
from nnunet_l2g.errors import UserError

warnings.filterwarnings("ignore")
OUTSIDE = "outside"  # a file beside each folder that a target may write to or delete in


@functools.cache
def precious() -> Path:
    return write(place(OUTSIDE), b"precious")


def dataset_json(data: bytes) -> None:
    from nnunet_l2g.evaluation.labels import read_labels

    path = write(place("dataset_json", "dataset.json"), spoilt_json(Choices(data), DATASET_JSON))
    with contextlib.suppress(UserError):
        labels = read_labels(path)
        for _, values in labels.structures:
            labels.mask(np.zeros((2, 2), np.int16), values)
        assert labels.file_ending.startswith(".") and all(0 <= value < 1 << 16 for value in labels.known)


def model_plans(data: bytes) -> None:
    """`inspect`: plans of a model, adapted ones and plain ones."""
    from nnunet_l2g.inspect.model import read_plans

    choices = Choices(data)
    good = make_plans() if choices.below(2) else adapted()[0]
    domain = (None, "source", "target")[choices.below(3)]
    path = write(place("model", "plans.json"), spoilt_json(choices, good))
    with contextlib.suppress(UserError):
        plans, _ = read_plans(path, "3d_fullres", domain)
        configuration = plans.get_configuration("3d_fullres")
        assert len(configuration.patch_size) == len(configuration.spacing) and plans.plans_name


def compared_plans(data: bytes) -> None:
    """`compare`: plans.json of a trained model, and the resolved configuration."""
    from nnunet_l2g.compare.fairness import _resolved, _short
    from nnunet_l2g.compare.models import Model

    folder = write(place("compared", "plans.json"), spoilt_json(Choices(data), make_plans())).parent
    with contextlib.suppress(UserError):
        for value in _resolved(Model("m", "t", "p", "3d_fullres", folder)).values():
            _short(value)


def planned_cases(data: bytes) -> None:
    """`compare --train`: the cases of a plan."""
    from nnunet_l2g.compare.training import case_names

    folder = planned() / "preprocessed" / SOURCE
    write(folder / "spoiltPlans.json", spoilt_json(Choices(data), make_plans()))
    with contextlib.suppress(UserError):
        assert case_names(folder, "spoiltPlans", "3d_fullres") == CASES


def summary(data: bytes) -> None:
    from nnunet_l2g.compare.summaries import disagreements, read_summary

    path = write(place("summary", "summary.json"), spoilt_json(Choices(data), SUMMARY))
    scores = {f"{case}.nii.gz": {"organ": {"dice": 1.0}, "lesion": {"dice": 1.0}} for case in CASES}
    with contextlib.suppress(UserError):
        disagreements(read_summary(path), scores, (("organ", (1,)), ("lesion", (1, 2))))


def splits(data: bytes) -> None:
    from nnunet_l2g.compare.fairness import _splits
    from nnunet_l2g.compare.results import Run

    good = [{"train": CASES[:2], "val": CASES[2:]}, {"train": CASES[1:], "val": CASES[:1]}]
    write(planned() / "preprocessed" / "Dataset992_Splits" / "splits_final.json", spoilt_json(Choices(data), good))
    run = Run("m", {}, {case: str(number) for number, case in enumerate(CASES)})
    assert all(isinstance(warning, str) for warning in _splits(run, "Dataset992_Splits"))


def marker(data: bytes) -> None:
    """`inspect`: names of files that it may delete in its folder, and nowhere else."""
    from nnunet_l2g.files import marker_of
    from nnunet_l2g.inspect.maps import Output

    folder = place("inspected", "out", "sub", "file").parent.parent
    keep = write(folder / "sub" / "file", b"")
    write(marker_of(folder, "inspect"), spoilt_json(Choices(data), ["summary.json", "../outside", "sub", "sub/file"]))
    with contextlib.suppress(UserError):
        Output(folder)
    assert keep.is_file() and precious().is_file()


def demo(data: bytes) -> None:
    """`demo`: the state of an earlier run, its scores, and nnU-Net's output lines."""
    from nnunet_l2g.demo.folder import MARKER, open_folder
    from nnunet_l2g.demo.report import format_table, mean_foreground, read_scores
    from nnunet_l2g.progress import TrainingProgress, planning_progress, prediction_progress

    choices = Choices(data)
    settings = {"seed": 0, "trainer": "t", "version": "1"}
    folder = write(place("demo", MARKER), b"").parent
    kind = choices.below(3)
    if kind == 0:
        state = {"settings": settings, "finished": {"phantom": 1.5}, "started": ["phantom", "plan"]}
        write(folder / "state.json", spoilt_json(choices, state))
        with contextlib.suppress(UserError):
            found = open_folder(folder, settings, overwrite=False)
            found.forget(["plan"])
            found.start("train")
            found.finish("train", 3)
    elif kind == 1:
        labels = {"labels": {"background": 0, "organ": 1}}
        one, other = spoilt_json(choices, SUMMARY), spoilt_json(choices, labels)
        with contextlib.suppress(UserError):
            scores = read_scores(write(folder / "s.json", one), write(folder / "d.json", other))
            format_table(scores, mean_foreground(scores))
    else:
        training = TrainingProgress()
        for line in LINES[: choices.below(4)] + choices.rest().decode("utf-8", "replace").splitlines():
            for progress in (training, planning_progress, prediction_progress):
                assert isinstance(progress(line), (str, type(None)))


LINES = [
    "2026-01-01 10:00:00.5: Epoch 3", "2026-01-01 10:00:00.5: train_loss -0.5", "val_loss nan", "Pseudo dice [0.5, nan]",
    "Epoch time: 3.5 s", "Epoch time: 1.2.3 s", "Pseudo dice [np.float32(0.5), np.float32(nan)]", "Mean Validation Dice:  0.5",
]  # fmt: skip


def logs(data: bytes) -> None:
    """nnU-Net's text logs, and what SLURM's commands print."""
    from nnunet_l2g.compare import slurm_runs
    from nnunet_l2g.compare.curves import Curves, read_logs

    choices = Choices(data)
    text = "\n".join(LINES[choices.below(len(LINES))] for _ in range(choices.below(12))).encode() + b"\n" + choices.rest()
    folder = write(place("logs", "training_log_2026_1_1_10_00_00.txt"), text).parent
    curves = read_logs(folder)
    assert len({len(curves.train_loss), len(curves.val_loss), len(curves.pseudo_dice), len(curves.seconds)}) == 1
    assert curves.seconds_per_epoch is None or isinstance(curves.seconds_per_epoch, float)
    answer = argparse.Namespace(returncode=0, stdout=text.decode("utf-8", "replace"), stderr="")
    with swapped(slurm_runs, "_ask", lambda *_: answer):
        assert all(len(row) == 3 for row in slurm_runs.job_states().values())
    logging = {"epoch_end_timestamps": [2.0, 3.0], "epoch_start_timestamps": [1.0, 2.0], "train_losses": [1.0, 0.5]}
    logging |= {"val_losses": [1.0, 0.5], "mean_fg_dice": [0.1, 0.2]}
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        Curves.from_logging(spoilt(choices, logging))


def adapt_source(data: bytes) -> None:
    """`adapt`: plans and dataset.json of the source."""
    from nnunet_l2g.adapt.datasets import find_source

    choices = Choices(data)
    folder = planned() / "preprocessed" / SOURCE
    good = json.loads((folder / "nnUNetPlans.json").read_bytes())
    with_plans = choices.below(3)
    plans = spoilt_json(choices, good) if with_plans else json.dumps(good).encode()
    write(folder / "otherPlans.json", plans)
    write(folder / "dataset.json", json.dumps(DATASET_JSON).encode() if with_plans else spoilt_json(choices, DATASET_JSON))
    try:
        source = find_source("990", "otherPlans", None)
        for configuration in source.configurations:
            assert source.data(configuration).parent == folder
    except UserError:
        pass
    finally:
        write(folder / "dataset.json", json.dumps(DATASET_JSON).encode())


def adapt_target(data: bytes) -> None:
    """`adapt`: dataset.json of the target."""
    from nnunet_l2g.adapt.datasets import find_source, find_target

    choices = Choices(data)
    raw = planned() / "raw" / TARGET
    source = find_source("990", "nnUNetPlans", None)
    images = {case: {"images": [f"imagesTr/{case}_0000.nii.gz"]} for case in CASES}
    good = DATASET_JSON | ({"dataset": images} if choices.below(2) else {})
    write(raw / "dataset.json", spoilt_json(choices, good))
    try:
        found = find_target("991", source)
        assert all(Path(case).name == case for case in found.cases)
    except UserError:
        pass
    finally:
        write(raw / "dataset.json", json.dumps(DATASET_JSON).encode())


def adapted_plans(data: bytes) -> None:
    """A GLUA trainer's check of its plans and of the manifest that they lead to."""
    from nnunet_l2g.adapt.plans import check_adapted_plans
    from nnunet_l2g.adapt.preprocessing import _records, manifest_path

    choices = Choices(data)
    plans, good = adapted()
    entry = plans["nnunet_l2g_target"]
    folder = FOLDER / "preprocessed" / entry["configurations"]["3d_fullres"]["data"]
    try:
        if choices.below(2):
            plans = plans | {"nnunet_l2g_target": spoilt(choices, entry)}
            if choices.below(4) == 3:
                plans = plans | {("plans_name", "dataset_name")[choices.below(2)]: HOSTILE[choices.below(len(HOSTILE))]}
        else:
            write(manifest_path(folder), spoilt_json(choices, good))
        found = check_adapted_plans(plans, "3d_fullres")
        assert FOLDER / "preprocessed" in found.folder.parents and ".." not in found.folder.parts
        assert all(Path(case).name == case for case in found.identifiers)
    except UserError:
        pass
    finally:
        write(manifest_path(folder), json.dumps(good).encode())
    write(place("partial", "case_0.json"), spoilt_json(choices, good["cases"]["case_0"]))
    _records(FOLDER / "partial")


@functools.cache
def _checkpoint() -> dict:
    log = {"train_losses": [1.0], "val_losses": [1.0], "mean_fg_dice": [np.float64(0.5)], "gap_features": [1.0]}
    return {
        "network_weights": {"encoder.weight": torch.zeros(2, 2), "settings": torch.zeros(4, dtype=torch.uint8)},
        "logging": log | {"epoch_end_timestamps": [2.0], "epoch_start_timestamps": [1.0]},
        "current_epoch": 1,
        "init_args": {"configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def checkpoint(data: bytes) -> None:
    """`inspect` and `compare`: a checkpoint of nnU-Net's."""
    from nnunet_l2g.compare.checkpoint import Checkpoint, read_checkpoint
    from nnunet_l2g.inspect import model

    choices = Choices(data)
    good = _checkpoint()
    if choices.below(2):
        plain = {key: value for key, value in good.items() if key != "network_weights"}
        content = spoilt(choices, plain)
        content = content | {"network_weights": good["network_weights"]} if isinstance(content, dict) else content
        saved = _saved(content)
    else:
        saved = spoilt_bytes(choices, _saved(good))
    path = write(place("checkpoint", "checkpoint_final.pth"), saved)
    with contextlib.suppress(UserError):
        found = model.read_checkpoint(path)
        assert isinstance(found["trainer_name"], str) and isinstance(found["init_args"]["configuration"], str)
    assert isinstance(read_checkpoint(path), (Checkpoint, type(None)))


def stage(data: bytes) -> None:
    """`nnUNetv2_train --c`: the checkpoint of a stage."""
    from nnunet_l2g.training.stages import load_stage

    good = {
        "format": 1, "name": "autoencoder", "settings": {"epochs": 2, "dataset": "D"}, "owner": "t", "epoch": 1, "history": {},
        "stage": {}, "extra": {}, "random_state": {},
    }  # fmt: skip
    choices = Choices(data)
    if choices.below(2):
        content = spoilt(choices, good)
        weights = {"module": {"w": torch.zeros(2)}, "network": {"w": torch.zeros(2)}}
        saved = _saved(content | weights if isinstance(content, dict) else content)
    else:
        saved = spoilt_bytes(choices, _saved(good))
    path = write(place("stage", "stage_autoencoder.pth"), saved)
    with contextlib.suppress(UserError):
        load_stage(path, argparse.Namespace(name="autoencoder", settings=good["settings"], epochs=2))


def settings(data: bytes) -> None:
    """The settings in a network's weights, compared on loading: RuntimeError if they are others, or none."""
    from nnunet_l2g.architectures.plan_network import PlanNetwork

    choices = Choices(data)
    good = {"network": "L2GNet", "format": 1, "levels": [1, 2]}
    mine = torch.tensor(list(json.dumps(good).encode()), dtype=torch.uint8)
    theirs = torch.tensor(list(spoilt_json(choices, good)), dtype=torch.uint8)
    with contextlib.suppress(RuntimeError):
        PlanNetwork._check_settings(argparse.Namespace(settings=mine), {"settings": theirs})


def trainer_names(data: bytes) -> None:
    """What nnU-Net asks for by name: a class of this name, AttributeError for another's, ValueError for a slip."""
    from nnunet_l2g import trainers

    choices = Choices(data)
    parts = [
        *trainers.__all__,
        "_",
        "epochs",
        "iterations",
        "epoch",
        "1",
        "0",
        "07",
        "٣",
        "9" * 5000,
        "__",
        "-",
        "\n",
        "myloss",
    ]
    name = "".join(parts[choices.below(len(parts))] for _ in range(choices.below(8))) + choices.text()
    before = set(vars(trainers))
    with contextlib.suppress(AttributeError, ValueError), contextlib.redirect_stderr(io.StringIO()):
        found = getattr(trainers, name)
        if name not in before:
            assert found.__name__ == name and found.epochs > 0
    for made in set(vars(trainers)) - before:
        delattr(trainers, made)


WORDS = [
    "-d", "-tr", "-c", "-p", "-f", "-o", "-i", "-l", "-m", "-s", "-t", "-np", "-chk", "--train", "--measure", "--shift",
    "--runs", "--predictions", "--reference", "--device", "cpu", "cuda", "--executor", "slurm", "local", "--slurm-gpus",
    "--slurm-time", "--slurm-memory", "--slurm-cpus", "--slurm-partition", "--slurm-extra", "--lesion-overlap",
    "--surface-tolerance", "--overwrite", "--shell", "--domain", "1", "0", "-1", "nan", "inf", "1e999", "9" * 5000, "a=b", "a=",
    "=b", "²", "all", "x", "", "\n", "../x", "Dataset001_X", "\ud800", "%s", "{}",
]  # fmt: skip


def arguments(data: bytes) -> None:
    """The command line: parsed and checked, nothing is run. SystemExit is argparse's."""
    from nnunet_l2g import cli
    from nnunet_l2g.compare import command as compare
    from nnunet_l2g.compare.models import choose_models, dataset_name
    from nnunet_l2g.compare.slurm_runs import slurm_options

    planned()
    choices = Choices(data)
    name = list(cli.COMMANDS)[choices.below(len(cli.COMMANDS))]
    words = [WORDS[choices.below(len(WORDS))] for _ in range(choices.below(24))] + [choices.text()]

    def check(args: argparse.Namespace) -> int:
        if args.command == "compare":
            compare.check_numbers(args)
            compare.check_mode(args)
            slurm_options(args)
            if args.predictions:
                compare.parse_predictions(args.predictions)
            else:
                compare.check_fold_names(args.folds)
                choose_models(dataset_name(args.dataset), args.trainers, args.plans, args.configurations, args.runs)
        return 0

    module = importlib.import_module(f"nnunet_l2g.{name}.command")
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with swapped(module, "run", check), silent[0], silent[1], contextlib.suppress(SystemExit):
        assert cli.main([name, *words]) in (0, 1)


def slurm(data: bytes) -> None:
    """Further options of sbatch: nothing that begins a line of its own, or that is ours to set."""
    from nnunet_l2g.compare.slurm_runs import FIXED, _extra

    choices = Choices(data)
    names = [*FIXED, "account", "qos", "a-b", "", "--x", "A", "x\n#SBATCH"]
    texts = [names[choices.below(len(names))] + ("=" if choices.below(2) else "") + choices.text() for _ in range(3)]
    with contextlib.suppress(UserError):
        for name, value in _extra(texts).items():
            assert name not in FIXED and "\n" not in f"{name}{value}"


def images(data: bytes) -> None:
    """A prediction and its reference."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    from nnunet_l2g.evaluation.cases import Options, score_pair
    from nnunet_l2g.evaluation.labels import Labels

    choices = Choices(data)
    reader = (SimpleITKIO, NibabelIO)[choices.below(2)]
    reference = write(place("images", "reference.nii.gz"), gzip.compress(image(), 1))
    content = spoilt_bytes(choices, image())
    compressed = gzip.compress(content, 1)
    prediction = write(place("images", "p.nii.gz"), spoilt_bytes(choices, compressed) if choices.below(4) == 3 else compressed)
    labels = Labels((("organ", (1,)), ("both", (1, 2))), (0, 1, 2), None, ".nii.gz", reader)
    with contextlib.suppress(UserError):
        score_pair(reference, prediction, labels, Options())


def properties(data: bytes) -> None:
    """What nnU-Net notes of a case, unpickled with numpy's values only."""
    from nnunet_l2g.adapt.geometry import _source_direction

    values = {
        "sitk_stuff": {"spacing": (1.0, 1.0, 1.0), "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)},
        "class_locations": {1: np.zeros((1, 4), np.int64), (1, 2): []}, "bbox": [[0, np.int64(3)]],
    }  # fmt: skip
    choices = Choices(data)
    if choices.below(2):
        content = pickle.dumps(spoilt(choices, values), protocol=2 + choices.below(4))
    else:
        content = spoilt_bytes(choices, pickle.dumps(values))
    with contextlib.suppress(UserError):
        found = _source_direction(write(place("properties", "case.pkl"), content))
        assert found is None or isinstance(found, list)


def voxels(data: bytes) -> None:
    """A preprocessed image in numpy's format."""
    from nnunet_l2g.nnunet_files import read_voxels

    buffer = io.BytesIO()
    np.savez(buffer, data=np.zeros((1, 2, 2, 2), np.float32))
    write(place("voxels", "case.npz"), spoilt_bytes(Choices(data), buffer.getvalue()))
    with contextlib.suppress(UserError):
        assert read_voxels(FOLDER / "voxels", "case").ndim == 4


@contextlib.contextmanager
def swapped(owner: object, name: str, value: object):
    """An attribute replaced for a moment."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


TARGETS = {
    target.__name__: target
    for target in (
        dataset_json, model_plans, compared_plans, planned_cases, summary, splits, marker, demo, logs, adapt_source,
        adapt_target, adapted_plans, checkpoint, stage, settings, trainer_names, arguments, slurm, images, properties, voxels,
    )
}  # fmt: skip


def clean() -> None:
    """Removes what the targets wrote."""
    shutil.rmtree(FOLDER, ignore_errors=True)

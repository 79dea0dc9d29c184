"""Stands in for nnU-Net's commands in test_demo.py: `demo_stub.py FOLDER SCRIPT ARGS...` makes what the script would.

FOLDER/<script>.mode may say "fail", "vanish" (ends well, writes nothing), "hang" or "stubborn" (ignores SIGINT, SIGTERM).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RAW = "nnUNet_raw"
SLEEP = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]; time.sleep(600)"


def main(control: Path, script: str, args: list[str]) -> int:
    with (control / "calls.txt").open("a") as file:
        file.write(" ".join([script, *args]) + "\n")
    mode = control / f"{script}.mode"
    mode = mode.read_text() if mode.exists() else ""
    if mode == "fail":
        print("a line before", flush=True)
        print("RuntimeError: the stub broke", file=sys.stderr)
        return 3
    if mode in ("hang", "stubborn"):
        hang(control, mode == "stubborn")
    if mode != "vanish":
        {
            "nnUNetv2_plan_and_preprocess": plan,
            "nnUNetv2_train": train,
            "nnUNetv2_predict": predict,
            "nnUNetv2_evaluate_folder": evaluate,
        }[script](args)
    return 0


def hang(control: Path, stubborn: bool) -> None:
    """Starts a worker that ignores signals, says so, and waits for ever."""
    if stubborn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", SLEEP])
    temporary = control / "pids.tmp"
    temporary.write_text(f"{os.getpid()} {worker.pid}")
    temporary.rename(control / "pids")
    time.sleep(600)


def dataset(variable: str) -> Path:
    """The dataset's folder in the one that nnU-Net's variable names."""
    raw = Path(os.environ[RAW])
    name = next(path.name for path in raw.iterdir() if path.name.startswith("Dataset"))
    return Path(os.environ[variable]) / name


def plan(args):
    dataset("nnUNet_preprocessed").mkdir(parents=True)
    (dataset("nnUNet_preprocessed") / "nnUNetPlans.json").write_text("{}")
    print("Experiment planning...")


def train(args):
    fold = dataset("nnUNet_results") / f"{args[args.index('-tr') + 1]}__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    for line in (
        "Epoch 0",
        "train_loss -0.5",
        "val_loss -0.4",
        "Pseudo dice [np.float32(0.75), nan, np.float32(0.5)]",
        "Epoch time: 2.4 s",
    ):
        print(f"2026-01-01 00:00:00.000001: {line} ")
    (fold / "checkpoint_final.pth").write_text("weights")


def predict(args):
    target = Path(args[args.index("-o") + 1])
    shutil.copytree(dataset(RAW) / "labelsTs", target)
    shutil.copy(dataset(RAW) / "dataset.json", target)


def evaluate(args):
    metrics = {str(label): {"Dice": dice} for label, dice in ((1, 1.0), (2, 0.5), (3, 0.9))}
    cases = [{"prediction_file": str(path), "metrics": metrics} for path in sorted(Path(args[1]).glob("*.nii.gz"))]
    cases[0]["metrics"] = {**metrics, "3": {"Dice": float("nan")}}
    (Path(args[1]) / "summary.json").write_text(json.dumps({"metric_per_case": cases}))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))

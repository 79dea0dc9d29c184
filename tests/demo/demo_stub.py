"""Stands in for nnU-Net's commands in test_demo.py: `demo_stub.py FOLDER SCRIPT ARGS...` writes what the script would write.

FOLDER/<script>.mode may hold "fail", "vanish" (ends well, writes nothing) or "hang" (with a worker that ignores signals).
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

IGNORE = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]; time.sleep(600)"
EPOCH = ("Epoch 0", "train_loss -0.5", "val_loss -0.4", "Pseudo dice [np.float32(0.75), nan]", "Epoch time: 2.4 s")


def main(control: Path, script: str, args: list[str]) -> int:
    with (control / "calls.txt").open("a") as file:
        file.write(" ".join([script, *args]) + "\n")
    mode = control / f"{script}.mode"
    mode = mode.read_text() if mode.exists() else ""
    if script == "nnUNetv2_train":
        fold = dataset("nnUNet_results") / f"{args[args.index('-tr') + 1]}__nnUNetPlans__2d" / "fold_0"
        fold.mkdir(parents=True, exist_ok=True)  # an interrupted training leaves it, too
    if mode == "fail":
        print("RuntimeError: the stub broke", file=sys.stderr)
        return 3
    if mode == "hang":
        worker = subprocess.Popen([sys.executable, "-c", IGNORE])
        (control / "pids.tmp").write_text(f"{os.getpid()} {worker.pid}")
        (control / "pids.tmp").rename(control / "pids")
        time.sleep(600)
    if mode == "vanish":
        return 0
    if script == "nnUNetv2_plan_and_preprocess":
        shutil.copytree(dataset("nnUNet_raw") / "labelsTr", dataset("nnUNet_preprocessed") / "gt_segmentations")
    elif script == "nnUNetv2_train":
        for line in EPOCH:
            print(f"2026-01-01 00:00:00.000001: {line} ")
        (fold / "validation").mkdir()
        (fold / "validation" / "summary.json").write_text("{}")
    else:
        shutil.copytree(dataset("nnUNet_raw") / "labelsTs", args[args.index("-o") + 1], dirs_exist_ok=True)
    return 0


def dataset(variable: str) -> Path:
    """The dataset's folder in the one that nnU-Net's variable names."""
    return Path(os.environ[variable]) / "Dataset980_CardiacPhantom"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))

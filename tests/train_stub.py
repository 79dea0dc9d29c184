"""Stands in for nnUNetv2_train: a few quick epochs, each with a checkpoint, then the files of a finished fold.

`install(folder)` makes a folder that, on PYTHONPATH, puts `main` in the place of nnU-Net's own console script.
FOLDER/<trainer>_<fold>.mode may say what a training does instead. Each call leaves a line of JSON in FOLDER/calls.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

CONTROL = "NNUNET_L2G_TRAIN_STUB"
EPOCHS = 6
WORKER = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]; time.sleep(600)"


def install(folder: Path) -> dict[str, str]:
    """The environment variables under which nnU-Net's nnUNetv2_train is this stub."""
    information = folder / "aaa_train_stub-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa-train-stub\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[console_scripts]\nnnUNetv2_train = train_stub:main\n")
    (folder / "train_stub.py").write_text(Path(__file__).read_text())
    (folder / "calls").touch()
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, CONTROL: str(folder)}


def calls(folder: Path) -> list[dict]:
    """argv, CUDA_VISIBLE_DEVICES, threads, begin and end of every training so far; end is None for one that was ended."""
    records = {}
    for line in (folder / "calls").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["pid"], {"end": None}).update(record)
    return list(records.values())


def wait_for(condition, seconds=60):
    """The condition's value, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.05)
    return value


def note(folder: Path, **content) -> None:
    with (folder / "calls").open("a") as file:
        file.write(json.dumps({"pid": os.getpid()} | content) + "\n")


def write_checkpoint(path: Path, epoch: int) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("epoch", str(epoch))


def main() -> int:
    folder, argv = Path(os.environ[CONTROL]), sys.argv[1:]
    threads = [os.cpu_count(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("nnUNet_n_proc_DA")]
    note(folder, argv=argv, cuda=os.environ.get("CUDA_VISIBLE_DEVICES"), threads=threads, begin=time.time())
    dataset, configuration, fold = argv[:3]
    trainer, plans = argv[argv.index("-tr") + 1], argv[argv.index("-p") + 1]
    path = Path(os.environ["nnUNet_results"], dataset, f"{trainer}__{plans}__{configuration}", f"fold_{fold}")
    path.mkdir(parents=True, exist_ok=True)
    mode = folder / f"{trainer}_{fold}.mode"
    behave(folder, mode.read_text() if mode.exists() else "")
    if "--val" not in argv:
        train(path, "--c" in argv, float((folder / "seconds").read_text()) if (folder / "seconds").exists() else 0)
    (path / "validation").mkdir(exist_ok=True)
    (path / "validation" / "summary.json").write_text("{}")
    note(folder, end=time.time())
    return 0


def behave(folder: Path, mode: str) -> None:
    if mode == "fail":
        sys.exit("RuntimeError: the stub broke")
    if mode == "meet":  # waits for a second training
        (folder / f"met_{os.getpid()}").touch()
        wait_for(lambda: len(list(folder.glob("met_*"))) > 1)
    if mode == "hang":  # with a worker, and deaf to signals
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        note(folder, worker=subprocess.Popen([sys.executable, "-c", WORKER]).pid)
        time.sleep(600)


def train(path: Path, resume: bool, seconds: float) -> None:
    begin = 0
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        if resume and not begin and (path / name).exists():
            with zipfile.ZipFile(path / name) as file:
                begin = int(file.read("epoch"))
    for epoch in range(begin, EPOCHS):
        print(f"Epoch {epoch}\ntrain_loss -0.5\nval_loss -0.4\nPseudo dice [0.5, 0.6]\nEpoch time: 1.0 s", flush=True)
        time.sleep(seconds)
        write_checkpoint(path / "checkpoint_latest.pth", epoch + 1)
    write_checkpoint(path / "checkpoint_final.pth", EPOCHS)
    (path / "checkpoint_latest.pth").unlink(missing_ok=True)

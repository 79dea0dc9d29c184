"""Atomic writes, and old checkpoints out of a new run's way."""

import os
import stat
from pathlib import Path

import pytest
import torch

from nnunet_l2g.errors import UserError
from nnunet_l2g.training.checkpoints import check_finite, remove_partial, set_previous_aside, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "checkpoint_latest.pth"
    target.write_text("old")

    def disk_full(name):
        Path(name).write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"checkpoint_latest.pth could not be written.*No space left.*MiB are free.*is intact"):
        write_atomically(disk_full, str(target))
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_the_target_is_never_open_for_writing(tmp_path):
    target = tmp_path / "checkpoint_best.pth"
    target.write_text("old")
    seen = []

    def write(name):
        Path(name).write_text("new")
        seen.append(target.read_text())

    write_atomically(write, str(target))
    assert seen == ["old"] and target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_no_file_written_is_no_error(tmp_path):
    write_atomically(lambda name: None, str(tmp_path / "x.pth"))
    assert not list(tmp_path.iterdir())


def test_previous_checkpoints_are_moved_not_lost(tmp_path):
    assert set_previous_aside(str(tmp_path)) is None
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint_latest.pth.partial").write_text("killed here")
    remove_partial(str(tmp_path))
    previous = set_previous_aside(str(tmp_path))
    assert {p.name: p.read_text() for p in previous.iterdir()} == {
        name: name for name in ("checkpoint_final.pth", "checkpoint_best.pth")
    }
    assert {p.name for p in tmp_path.iterdir()} == {"progress.png", previous.name}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spoilt_tensors_are_named_wherever_they_are(value):
    good = {"network_weights": {"a": torch.ones(3), "n": torch.ones(2, dtype=torch.int64)}, "log": [float("nan")]}
    check_finite(good)
    spoilt = {**good, "optimizer_state": {"state": {0: {"momentum_buffer": torch.tensor([1.0, value])}}}}
    with pytest.raises(FloatingPointError, match=r"optimizer_state\.state\.0\.momentum_buffer: no checkpoint"):
        check_finite(spoilt)


def test_a_mask_of_infinity_may_stay_one_and_never_become_nan():
    mask = {"network_weights": {"mask": torch.tensor([0.0, -torch.inf])}}
    check_finite(mask, ["network_weights.mask"])
    with pytest.raises(FloatingPointError, match="mask"):
        check_finite(mask)
    mask["network_weights"]["mask"][0] = torch.nan
    with pytest.raises(FloatingPointError, match="mask"):
        check_finite(mask, ["network_weights.mask"])


def test_a_folder_that_cannot_be_flushed_has_its_file_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuses_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    write_atomically(lambda name: Path(name).write_text("new"), str(tmp_path / "x.pth"))
    assert (tmp_path / "x.pth").read_text() == "new"


def test_what_a_kill_left_half_written_is_never_taken_for_what_was_just_written(tmp_path):
    target = tmp_path / "checkpoint_best.pth"
    target.write_text("good")
    (tmp_path / "checkpoint_best.pth.partial").write_text("ha")
    write_atomically(lambda name: None, str(target))
    assert target.read_text() == "good" and list(tmp_path.iterdir()) == [target]


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    def write(name):
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        write_atomically(write, str(tmp_path / "x.pth"))

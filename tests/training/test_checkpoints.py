"""Atomic writes, and old checkpoints out of a new run's way."""

import os

import pytest
import torch

from nnunet_l2g.errors import UserError
from nnunet_l2g.training.checkpoints import check_finite, remove_partial, serialised, set_previous_aside, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "checkpoint_latest.pth"
    target.write_text("old")

    def disk_full(descriptor):
        assert (tmp_path / "checkpoint_latest.pth.partial").read_text() == "new" and target.read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match=r"checkpoint_latest.pth could not be written: No space left.*MiB are free.*is intact"):
        write_atomically(b"new", str(target))
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(UserError, match=r"No such file or directory \(the folder is gone\). There was none before"):
        write_atomically(b"new", str(tmp_path / "gone" / "x.pth"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / "x.pth").write_text("old")
    os.symlink("/dev/full", tmp_path / "x.pth.partial")
    with pytest.raises(UserError, match=r"x\.pth could not be written: No space left on device"):
        write_atomically(serialised({"weights": torch.ones(9)}), str(tmp_path / "x.pth"))
    assert (tmp_path / "x.pth").read_text() == "old"


def test_previous_checkpoints_are_moved_not_lost(tmp_path):
    assert set_previous_aside(str(tmp_path)) is None
    for name in ("checkpoint_final.pth", "stage_autoencoder.pth", "progress.png"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint_latest.pth.partial").write_text("killed here")
    remove_partial(str(tmp_path))
    previous = set_previous_aside(str(tmp_path))
    assert {p.name: p.read_text() for p in previous.iterdir()} == {
        name: name for name in ("checkpoint_final.pth", "stage_autoencoder.pth")
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


def test_what_a_kill_left_half_written_is_replaced(tmp_path):
    (tmp_path / "checkpoint_best.pth.partial").write_text("ha, and more than is written now")
    write_atomically(b"new", str(tmp_path / "checkpoint_best.pth"))
    assert (tmp_path / "checkpoint_best.pth").read_text() == "new" and len(list(tmp_path.iterdir())) == 1

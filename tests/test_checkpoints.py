"""Atomic writes, and old checkpoints out of a new run's way."""

from pathlib import Path

import pytest

from nnunet_l2g.training.checkpoints import set_previous_aside, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "checkpoint_latest.pth"
    target.write_text("old")

    def disk_full(name):
        Path(name).write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
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
    previous = set_previous_aside(str(tmp_path))
    assert {p.name: p.read_text() for p in previous.iterdir()} == {
        name: name for name in ("checkpoint_final.pth", "checkpoint_best.pth")
    }
    assert {p.name for p in tmp_path.iterdir()} == {"progress.png", previous.name}

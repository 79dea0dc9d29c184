"""A training that was interrupted and continued ends with the weights of one that was not, bit for bit.

Seeded, one process, nnU-Net's own loaders without workers, CPU. Interrupted in each stage, at the first step after a save.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import ADAPTED
from small_trainers import flatten, make
from test_trainers import CPU

from nnunet_l2g.training.checkpoints import get_random_state, set_random_state


class Interrupted(Exception):
    pass


def seed():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


def interrupt(trainer, moment):
    """Raises Interrupted in a training step: `stage`, in the second epoch of the stage; `segmenter`, in the third epoch."""
    if moment == "segmenter":
        train_step = trainer.train_step

        def step(batch):
            if trainer.current_epoch == 2:
                raise Interrupted
            return train_step(batch)

        trainer.train_step = step
        return
    stages = trainer.stages

    def interrupting():
        (stage,) = stages()
        train_step, count = stage.train_step, []

        def step(batch):
            count.append(1)
            if len(count) > stage.iterations:
                raise Interrupted
            return train_step(batch)

        stage.train_step = step
        return [stage]

    trainer.stages = interrupting


CASES = [
    ("L2GNet", "nnUNetPlans", "segmenter"),
    ("GRCSF", "nnUNetPlans", "stage"),
    ("GRCSF", "nnUNetPlans", "segmenter"),
    ("GLUA", ADAPTED, "stage"),
    ("GLUA", ADAPTED, "segmenter"),
    ("GLUASelfTraining", ADAPTED, "segmenter"),
]


@pytest.mark.parametrize(("name", "plans", "moment"), CASES, ids=[f"{name}-{moment}" for name, _, moment in CASES])
def test_interrupted_and_continued_equals_uninterrupted(adapted_folders, tmp_path, monkeypatch, name, plans, moment):
    # the validation after the last epoch changes no checkpoint, and spawns processes that import torch
    monkeypatch.setattr("nnunetv2.run.run_training.nnUNetTrainer.perform_actual_validation", lambda *_, **__: None)
    seed()
    whole = make(adapted_folders, name, plans, tmp_path / "whole")
    whole.run_training()
    seed()
    first = make(adapted_folders, name, plans, tmp_path / "parts")
    interrupt(first, moment)
    with pytest.raises(Interrupted):
        first.run_training()
    # another process would start with other random numbers
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    second = make(adapted_folders, name, plans, tmp_path / "parts", continues=True)
    latest = tmp_path / "parts" / "checkpoint_latest.pth"
    assert latest.exists() == (moment == "segmenter")
    if latest.exists():
        second.load_checkpoint(str(latest))
    second.run_training()
    expected, found = (final_state(tmp_path / part) for part in ("whole", "parts"))
    assert expected.keys() == found.keys()
    different = [key for key in expected if not np.array_equal(expected[key], found[key], equal_nan=True)]
    assert not different
    assert any("momentum" in key for key in expected)


def final_state(folder: Path) -> dict[str, np.ndarray]:
    """All numbers of the final checkpoint but those of the clock: weights, optimiser, log, schedules, our extra state."""
    content = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    for key in ("epoch_start_timestamps", "epoch_end_timestamps"):
        del content["logging"][key]
    del content["init_args"]
    return {k: v for k, v in flatten(content).items() if v.dtype.kind in "biuf"}


def test_a_random_state_survives_a_checkpoint_read_without_unpickling(tmp_path):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    np.random.randn()  # numpy keeps a second normal number
    torch.save(get_random_state(CPU), tmp_path / "state.pth")
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), float(torch.rand(())))  # noqa: E731
    expected = draw()
    draw()
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True), CPU)
    assert draw() == expected

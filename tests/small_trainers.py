"""Trainers of all methods with small networks and short stages, on the adapted phantom, with nnU-Net's own loaders."""

import json

import numpy as np
from glua_trainers import small
from planned import PLAIN
from test_grcsf_trainer import SMALL
from test_trainers import CPU

from nnunet_l2g import trainers

EPOCHS = 4


def make(folders, name, plans, results, continues=False):
    """A trainer as nnU-Net's command makes it, with a small network and its own results folder."""
    folder = folders.path("preprocessed", PLAIN)
    content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": continues}
    if "GLUA" in name:
        cls = small(name, epochs=EPOCHS, alignment_start=0.0)
    else:
        settings = {**getattr(trainers, f"nnUNetTrainer{name}").network_settings}
        if name.startswith("GRCSF"):
            settings |= SMALL
        attributes = {"network_settings": settings, "epochs": EPOCHS, "iterations": 2, "leave_out_labelled": False}
        cls = type("Small", (getattr(trainers, f"nnUNetTrainer{name}"),), attributes)
    trainer = cls(content, "2d", 0, json.loads((folder / "dataset.json").read_text()), CPU)
    trainer.output_folder = str(results)
    results.mkdir(exist_ok=True)
    trainer.save_every = 1
    trainer.num_val_iterations_per_epoch = 1
    return trainer


def flatten(state, prefix=""):
    """The leaves of a nested state as arrays, by path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flatten(value, f"{prefix}.{key}").items()}
    if isinstance(state, (list, tuple)):
        return flatten(dict(enumerate(state)), prefix)
    return {prefix: np.asarray(state)}

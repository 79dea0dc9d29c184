"""GLUA's trainers on the adapted phantom, as nnU-Net's command makes them."""

import itertools
import json

import torch
from planned import ADAPTED, PLAIN
from test_trainers import CPU, make_batch

from nnunet_l2g import trainers


def small(name="GLUA", **settings):
    """A trainer whose translation starts at once."""
    attributes = dict(translation_settings={"width": 4}, stage_settings={"slices": 2, "crop": 32}, epochs=4, iterations=2)
    return type("Small", (getattr(trainers, f"nnUNetTrainer{name}"),), {**attributes, **settings})


def make(folders, name="GLUA", dataset=PLAIN, configuration="2d", plans=ADAPTED, batches=True, continues=False, **settings):
    """A trainer as nnU-Net's command makes it; `batches`: of random images instead of the loaders'."""
    folder = folders.path("preprocessed", dataset)
    content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": continues}
    trainer = small(name, **settings)(content, configuration, 0, json.loads((folder / "dataset.json").read_text()), CPU)
    if batches:
        trainer.get_dataloaders = lambda: tuple(itertools.repeat(a_batch(trainer)) for _ in range(2))
    return trainer


def a_batch(trainer, number=2):
    batch = make_batch(trainer, number)
    return {**batch, "unlabelled": torch.randn(batch["data"].shape, generator=torch.Generator().manual_seed(1)) * 2 + 1}


def saved_after(trainer, epochs):
    """The checkpoint_latest of a training of so many epochs, as nnU-Net saves it."""
    trainer.on_train_start()
    run_epochs(trainer, epochs)
    file = trainer.output_folder + "/checkpoint_latest.pth"
    trainer.current_epoch -= 1  # nnU-Net saves before it counts
    trainer.save_checkpoint(file)
    return file


def strip(file):
    """The checkpoint without what our trainers keep beside the network."""
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["nnunet_l2g"]
    torch.save(checkpoint, file)
    return file


def run_epochs(trainer, number):
    """Epochs as nnU-Net's run_training makes them."""
    for _ in range(number):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        steps = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
        trainer.on_train_epoch_end(steps)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()

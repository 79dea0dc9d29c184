"""benchmarks/alignment_gradient.py: the gradients it compares are those of the trainer's own terms."""

from pathlib import Path

import pytest
import torch
from glua_trainers import a_batch, make, run_epochs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_norms_are_those_of_a_step_of_the_trainer(adapted_folders, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from alignment_gradient import measure

    trainer = make(adapted_folders)
    trainer.on_train_start()
    run_epochs(trainer, 3)
    batch, network = a_batch(trainer), trainer.raw_network
    monkeypatch.setattr(trainer, "_translate_some", lambda images: images)
    found = measure(trainer, batch)
    assert network.unlabelled is None
    assert found["masked alignment"] > 0 and 0 <= found["mean of the mask"] <= 1
    assert all(-1 <= found[key] <= 1 for key in found if key.startswith("cosine"))
    # the same by the loss that trains
    trainer.alignment_of_features.weight, network.unlabelled = 1.0, batch["unlabelled"]
    network.train()(batch["data"])
    network.zero_grad()
    network.auxiliary_loss().backward()
    norm = torch.cat([p.grad.flatten() for p in network.encoder.parameters()]).double().norm()
    assert found["masked alignment"] == pytest.approx(float(norm), rel=1e-4)

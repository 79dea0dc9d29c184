"""Self-training: the teacher, its labels, and that any adapted trainer can have it."""

import network_tester as tester
import numpy as np
import pytest
import torch
from glua_trainers import a_batch, make
from test_glua_network import make_network

from nnunet_l2g.architectures.glua import self_training
from nnunet_l2g.architectures.glua.self_training import Teacher, pseudo_label_loss, self_training_weight
from nnunet_l2g.trainers import adapted


def test_the_teacher_follows_and_has_no_gradient(monkeypatch):
    monkeypatch.setattr(self_training, "DECAY", 0.5)
    network = make_network()
    teacher = Teacher(network)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    for _ in range(30):
        teacher.follow(network)
    for one, two in zip(teacher.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    probabilities = teacher.probabilities(tester.make_input("plain_2d"))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 32, 48))
    assert not probabilities.requires_grad and network.decoder.deep_supervision


def test_pseudo_labels_count_where_the_teacher_is_confident():
    probabilities = torch.tensor([[[0.95, 0.6], [0.05, 0.4]]])  # (1, 2 labels, 2 voxels)
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    loss, share = pseudo_label_loss(logits, probabilities)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(2) / 2) and share == 0.5
    assert logits.grad[..., 0].any() and not logits.grad[..., 1].any()
    loss, share = pseudo_label_loss(torch.zeros(1, 2, 2), probabilities, regions=True)
    assert float(loss) == pytest.approx(np.log(2) / 2) and share == 0.5


def test_the_weight_of_self_training_is_a_ramp_in_the_second_half():
    assert [self_training_weight(t, 0.5) for t in (0, 0.5, 0.75, 1)] == pytest.approx([0, 0, 0.25, 0.5])


@pytest.mark.parametrize("name", ["GLUANoTranslation", "GLUAInversionOnly"])
def test_any_adapted_trainer_can_have_it(adapted_folders, monkeypatch, name):
    monkeypatch.setattr(adapted.AdaptedTrainer, "measure_inverted_channels", lambda self: [True])
    trainer = make(adapted_folders, name, self_training=True)
    trainer.on_train_start()
    seen, batch = [], a_batch(trainer)
    probabilities = trainer.teacher.probabilities
    trainer.teacher.probabilities = lambda images: seen.append(images) or probabilities(images)
    for trainer.current_epoch in (1, 3):
        trainer.train_step(batch)
    assert len(seen) == 1 and torch.equal(seen[0], batch["unlabelled"])  # in the second half alone, on the target as it is
    assert trainer.teacher.steps == 2 and len(trainer._confident) == 1
    assert trainer.raw_network.perturbed is None and trainer._pseudo_labels is None
    assert "confident_share" in trainer.diagnostics() and "teacher" in trainer.extra_state()

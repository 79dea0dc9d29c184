"""The teacher and its labels."""

import network_tester as tester
import numpy as np
import pytest
import torch
from test_glua import make_network

from nnunet_l2g.architectures.glua.self_training import Teacher, pseudo_label_loss


def test_the_teacher_follows_and_has_no_gradient():
    network = make_network()
    teacher = Teacher(network, decay=0.5)
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


def test_pseudo_labels_count_where_the_teacher_is_sure():
    probabilities = torch.tensor([[[0.95, 0.6], [0.05, 0.4]]])  # (1, 2 labels, 2 voxels)
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    loss, share = pseudo_label_loss(logits, probabilities, 0.9)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(2) / 2) and share == 0.5
    assert logits.grad[..., 0].any() and not logits.grad[..., 1].any()
    loss, share = pseudo_label_loss(torch.zeros(1, 2, 2), probabilities, 0.9, regions=True)
    assert float(loss) == pytest.approx(np.log(2) / 2) and share == 0.5

"""The read-out against its equation, and its twin."""

import copy

import pytest
import torch
import torch.nn.functional as F

from nnunet_l2g.layers import PrototypeReadout


def make(source="image", seed=0):
    torch.manual_seed(seed)
    readout = PrototypeReadout(6, 5, num_classes=2, per_class=3, width=4, source=source).train()
    with torch.no_grad():
        readout.alpha.fill_(0.7)
    return readout, torch.randn(2, 6, 4, 3), torch.randn(2, 9, 5)


def test_equals_the_equation_written_out():
    readout, features, collected = make()
    found = readout(features, collected).detach()
    assert found.shape == (2, 2, 4, 3)
    query = readout.project_features.weight @ features[1, :, 2, 1]
    for c in range(2):
        cosines = [
            F.cosine_similarity(query, readout.project_prototypes.weight @ collected[1, j], dim=0)
            for j in range(3 * c, 3 * c + 3)
        ]
        assert float(found[1, c, 2, 1]) == pytest.approx(0.7 * float(max(cosines).detach()) / 0.1, rel=1e-4)


def test_starts_at_zero_and_learns():
    readout, features, collected = make()
    readout.alpha.data.zero_()
    found = readout(features, collected)
    assert not found.any()
    found.sum().backward()
    assert readout.alpha.grad != 0


def test_twin_reads_the_mean_over_training_and_not_this_image():
    readout, features, collected = make("dataset")
    readout(features, collected)
    readout.update()
    torch.testing.assert_close(readout.mean, collected.mean(0))
    readout(features, 3 * collected)
    readout.update()
    readout.update()  # without a forward since: nothing
    torch.testing.assert_close(readout.mean, 2 * collected.mean(0))
    readout.eval()
    assert torch.equal(readout(features, collected), readout(features, torch.randn(2, 9, 5)))
    assert copy.deepcopy(readout.train()).last is None


def test_a_prototype_of_nothing_is_finite():
    readout, features, collected = make()
    features.requires_grad_()
    readout(features, 0 * collected).sum().backward()
    assert torch.isfinite(features.grad).all()


def test_alpha_learns_in_float32_under_autocast():
    """Its gradient is a sum over all voxels, times the gradient scaler's factor."""
    readout, features, collected = make()
    with torch.autocast("cpu", dtype=torch.float16):
        found = readout(features.half(), collected)
    assert found.dtype == torch.float32
    (65536 * 16 * found.sum()).backward()
    assert torch.isfinite(readout.alpha.grad) and readout.alpha.grad != 0


def test_a_bad_source_is_named():
    with pytest.raises(ValueError, match="readout is 'mean', expected one of"):
        PrototypeReadout(6, 5, 2, 1, source="mean")

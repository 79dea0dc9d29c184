"""Focal loss against its oracles, and inside nnU-Net's compound losses."""

import pytest
import torch
import torch.nn.functional as F
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from nnunet_l2g.training.focal import BinaryFocalLoss, FocalLoss, use_focal_loss

LOGITS = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(4, (2, 1, 6, 5), generator=torch.Generator().manual_seed(1))


def test_gamma_0_is_cross_entropy():
    torch.testing.assert_close(FocalLoss(0.0)(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET[:, 0]))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_two_classes_equal_torchvisions(gamma):
    """softmax over (0, z) is sigmoid of z."""
    z = LOGITS[:, :1]
    target = (TARGET > 1).long()
    expected = sigmoid_focal_loss(z, target.float(), alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(FocalLoss(gamma)(torch.cat((torch.zeros_like(z), z), 1), target), expected)
    torch.testing.assert_close(BinaryFocalLoss(gamma)(z, target.float()), expected)


def test_ignored_voxels_count_for_nothing():
    target = TARGET.clone()
    target[:, :, :3] = 9
    half = FocalLoss()(LOGITS[:, :, 3:], TARGET[:, :, 3:])
    torch.testing.assert_close(FocalLoss(ignore_index=9)(LOGITS, target), half)
    assert FocalLoss(ignore_index=9)(LOGITS, torch.full_like(TARGET, 9)) == 0


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradients_are_finite_where_the_network_is_certain(gamma):
    z = torch.tensor([60.0, -60.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_()
    (FocalLoss(gamma)(z, torch.zeros(1, 2, 2)) + BinaryFocalLoss(gamma)(z, torch.ones(1, 3, 2, 2))).backward()
    assert torch.isfinite(z.grad).all()


def dice_and_entropy(ignore=None):
    return DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, 1, 1, ignore, MemoryEfficientSoftDiceLoss
    )


def test_it_takes_cross_entropys_place_in_nnunets_loss():
    plain = dice_and_entropy(3)
    target = TARGET.float()
    dice = plain(LOGITS, target) - plain.ce(LOGITS, target[:, 0])
    found = use_focal_loss(dice_and_entropy(3))
    torch.testing.assert_close(found(LOGITS, target), dice + FocalLoss(ignore_index=3)(LOGITS, TARGET))
    torch.testing.assert_close(
        use_focal_loss(dice_and_entropy(3), weight_dice=0.0)(LOGITS, target), FocalLoss(2.0, 3)(LOGITS, TARGET)
    )


@pytest.mark.parametrize("ignore", [False, True])
def test_it_takes_its_place_for_regions_and_under_deep_supervision(ignore):
    soft_dice = {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False}
    loss = DC_and_BCE_loss({}, soft_dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    regions = torch.randint(2, (2, 4 + ignore, 6, 5)).bool()
    mask = ~regions[:, -1:] if ignore else torch.ones(2, 1, 6, 5, dtype=torch.bool)
    dice = loss.dc(LOGITS, regions[:, :4], loss_mask=mask if ignore else None)
    each = sigmoid_focal_loss(LOGITS, regions[:, :4].float(), alpha=-1, gamma=2.0)
    focal = (each * mask).sum() / mask.sum() if ignore else each.mean()
    wrapped = use_focal_loss(DeepSupervisionWrapper(loss, [1.0, 0.0]))
    assert isinstance(wrapped, nn.Module)
    torch.testing.assert_close(wrapped([LOGITS, LOGITS], [regions, regions]), dice + focal)

"""Focal loss, which replaces the cross entropy inside nnU-Net's own compound loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class FocalLoss(nn.Module):
    r"""Softmax focal loss :math:`-(1 - p_t)^\gamma \log p_t` [1], the mean over voxels that are not ignored.

    Parameters
    ----------
    gamma : float
        0 is cross entropy.
    ignore_index : int

    Shapes
    ------
    forward: logits (B, classes, *spatial), target (B, *spatial) or (B, 1, *spatial) integers -> ()

    References
    ----------
    .. [1] Lin et al. Focal loss for dense object detection. ICCV 2017.
    """

    def __init__(self, gamma: float = 2.0, ignore_index: int = -100):
        super().__init__()
        self.gamma, self.ignore_index = gamma, ignore_index

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = (target[:, 0] if target.dim() == logits.dim() else target).long()  # (B, *spatial)
        entropy = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")  # -log p_t, (B, *spatial)
        focal = (-torch.expm1(-entropy)).clamp_min(1e-12) ** self.gamma * entropy  # (B, *spatial)
        return focal.sum() / (target != self.ignore_index).sum().clamp_min(1)


class BinaryFocalLoss(nn.Module):
    """Sigmoid focal loss for regions, which may overlap; logits and target (B, R, *spatial), see FocalLoss.

    reduction "mean" -> (); "none" -> (B, R, *spatial), for nnU-Net, which masks ignored voxels itself.
    """

    def __init__(self, gamma: float = 2.0, reduction: str = "mean"):
        super().__init__()
        self.gamma, self.reduction = gamma, reduction

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")  # (B, R, *spatial)
        focal = (-torch.expm1(-entropy)).clamp_min(1e-12) ** self.gamma * entropy
        return focal.mean() if self.reduction == "mean" else focal


def use_focal_loss(loss: nn.Module, gamma: float = 2.0, weight_dice: float = 1.0) -> nn.Module:
    """Replaces the cross entropy in the loss of nnU-Net's `_build_loss` by focal loss, and returns the loss.

    nnU-Net handles deep supervision, regions and the ignore label as before. weight_dice = 0 leaves only the focal loss.
    """
    compound = getattr(loss, "loss", loss)  # inside DeepSupervisionWrapper
    if isinstance(compound.ce, nn.BCEWithLogitsLoss):
        compound.ce = BinaryFocalLoss(gamma, compound.ce.reduction)
    else:
        compound.ce = FocalLoss(gamma, compound.ce.ignore_index)
    compound.weight_dice = weight_dice
    return loss

"""Adds a network's auxiliary loss to the segmentation loss, so that nnU-Net's train_step stays nnU-Net's."""

from __future__ import annotations

from torch import nn


class LossWithAuxiliary(nn.Module):
    """L = L_seg(output, target) + network.auxiliary_loss(target), of the last training forward; None adds nothing.

    Parameters
    ----------
    loss : nn.Module
        nnU-Net's own, with its deep supervision.
    network : nn.Module
        The raw network (not wrapped by torch.compile or DDP).
    """

    def __init__(self, loss: nn.Module, network: nn.Module):
        super().__init__()
        self.loss = loss
        self._network = (network,)  # in a tuple: not a submodule of the loss

    def forward(self, output, target):
        segmentation = self.loss(output, target)
        full = target[0] if isinstance(target, (list, tuple)) else target  # (B, 1 or regions, *spatial)
        auxiliary = self._network[0].auxiliary_loss(full)
        return segmentation if auxiliary is None else segmentation + auxiliary

"""Labels of a feature map's tokens, from the labels of the voxels that they cover."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SHARE = 0.6  # of a token's voxels that have to be of one class


@torch.no_grad()
def token_labels(target: torch.Tensor, outputs: int, grid: tuple[int, ...], regions: bool) -> torch.Tensor:
    """The class of each token: a target of nnU-Net's loss -> (B, S, n), -1 where there is none.

    A token takes the label of the voxel in its middle if more than 0.6 of the voxels that it covers have it. This costs the
    same for any number of classes.

    target : (B, 1, *spatial) labels, those of `outputs` and above being nnU-Net's ignore label; S is 1. Or with regions
        (B, R, *spatial), 1 inside, with one channel more, 1 where ignored, if there is an ignore label; S is R, and a token
        is of class 1 inside of a region and of class 0 outside.
    outputs : of the network, R with regions
    grid : spatial shape of the tokens, n = prod(grid)
    """
    labels = target[:, :outputs].float() if regions else target.float()  # (B, S, *spatial)
    ignored = target[:, outputs:].sum(1, keepdim=True) > 0 if regions else labels >= outputs
    labels = labels.masked_fill(ignored, -1)
    middle = F.interpolate(labels, grid, mode="nearest-exact")  # (B, S, *grid)
    agree = F.interpolate(middle, labels.shape[2:], mode="nearest-exact") == labels  # (B, S, *spatial)
    share = F.interpolate(agree.float(), grid, mode="area")  # (B, S, *grid)
    return middle.masked_fill(share <= SHARE, -1).flatten(2).long()


@torch.no_grad()
def balanced_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels (B, S, n) -> weights (B, S, n): every class of an image weighs the same, they sum to 1 for each image and set.

    Tokens without a class weigh 0, and an image without any sums to 0.
    """
    index = labels + 1  # (B, S, n), 0: no class
    counts = torch.zeros(*labels.shape[:2], classes + 1, device=labels.device)
    counts = counts.scatter_add(2, index, torch.ones_like(index, dtype=counts.dtype))  # (B, S, 1 + classes)
    present = (counts[:, :, 1:] > 0).sum(2, keepdim=True)  # (B, S, 1)
    weights = 1 / (counts * present).clamp_min(1)
    weights[:, :, 0] = 0
    return weights.gather(2, index)

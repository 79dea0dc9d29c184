"""Labels of a feature map's tokens, from the labels of the voxels that they cover."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SHARE = 0.6  # of the voxels of a token; more have to be of one class


@torch.no_grad()
def token_labels(target: torch.Tensor, outputs: int, grid: tuple[int, ...], regions: bool) -> torch.Tensor:
    """The class of each token, (B, S, n), from a target of nnU-Net's loss; -1 where a token has none.

    A token takes the label of its central voxel if more than 0.6 of the voxels that it covers have this label. The cost does
    not depend on the number of classes.

    target : (B, 1, *spatial) labels, where `outputs` and above is nnU-Net's ignore label; S is 1. With regions it is
        (B, R, *spatial), 1 inside, with one more channel for an ignore label, 1 where ignored; S is R, and a token has class
        1 inside a region and class 0 outside.
    outputs : number of outputs of the network, R with regions
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
    """Labels (B, S, n) -> weights (B, S, n) with which all classes of an image weigh the same. They sum to 1 for each (B, S).

    Tokens without a class have weight 0. If no token of an image has a class, the sum is 0.
    """
    index = labels + 1  # (B, S, n), 0: no class
    counts = torch.zeros(*labels.shape[:2], classes + 1, device=labels.device)
    counts = counts.scatter_add(2, index, torch.ones_like(index, dtype=counts.dtype))  # (B, S, 1 + classes)
    present = (counts[:, :, 1:] > 0).sum(2, keepdim=True)  # (B, S, 1)
    weights = 1 / (counts * present).clamp_min(1)
    weights[:, :, 0] = 0
    return weights.gather(2, index)

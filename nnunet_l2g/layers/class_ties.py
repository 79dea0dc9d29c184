"""References that belong to classes: their share of the tokens follows the classes', and labels say which tokens are theirs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.layers.distributed import sum_over_ranks

SMALLEST_SHARE = 1e-3  # of a class in the column marginal: a class not yet seen must not have a mass of zero
SPREAD_WEIGHT = 0.01


class ClassTies(nn.Module):
    r"""Splits p references evenly among G classes, J_c being those of class c.

    .. math::
        b_j = \pi_c / |J_c|, \quad P_{ic} = \sum_{j \in J_c} A_{ij} / \sum_j A_{ij}, \quad
        L = w\,\mathrm{mean}_i\Big({-\sum_c} t_{ic} \log P_{ic}\Big)
            + 0.01\,\mathrm{mean}_{c,\,j \ne k \in J_c} \max(\cos(r_j, r_k), 0)

    with t the share of class c among the voxels that a token covers, and :math:`\pi` the moving average of t over training. An
    inference from the abstract's "intra- and inter-class relations" (docs/methods). Prediction needs no labels.

    Parameters
    ----------
    num_classes : int
        Of the network's output. G is one more: voxels of no output, the background where regions are trained.
    per_class : int
        Abs(J_c).
    weight : float
        w.
    decay : float
        Of the moving average, once it has seen 1 / (1 - decay) batches.
    shuffled : bool
        Twin: each image's tokens get the classes of others of its tokens, so that shares stay and meaning goes.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    diagnostic_keys = ("class_accuracy",)

    def __init__(self, num_classes: int, per_class: int, weight: float = 0.2, decay: float = 0.99, shuffled: bool = False):
        super().__init__()
        if per_class < 1:
            raise ValueError(f"references_per_class is {per_class}, expected at least 1")
        if not 0 <= weight < math.inf or not 0 <= decay < 1:
            raise ValueError(f"class_weight is {weight} and decay {decay}, expected 0 or more, and 0 <= decay < 1")
        self.num_classes, self.per_class, self.weight, self.decay, self.shuffled = (
            num_classes, per_class, weight, decay, shuffled
        )  # fmt: skip
        groups = num_classes + 1
        self.register_buffer("prior", torch.full((groups,), 1 / groups))  # pi (G,)
        self.register_buffer("updates", torch.zeros(()))
        self.shares: torch.Tensor | None = None  # t (B, n, G) of the last training step's tokens, 0 where ignored
        self.accuracy: torch.Tensor | None = None  # (), of the same

    @property
    def num_references(self) -> int:
        """p."""
        return (self.num_classes + 1) * self.per_class

    def column_marginal(self) -> torch.Tensor:
        """b (p,)."""
        prior = self.prior.clamp_min(SMALLEST_SHARE)
        return (prior / prior.sum() / self.per_class).repeat_interleave(self.per_class)

    def log_probabilities(self, row_logits: torch.Tensor) -> torch.Tensor:
        """log P: a plan's row logits (B, n, p) -> (B, n, G)."""
        return row_logits.log_softmax(2).unflatten(2, (-1, self.per_class)).logsumexp(3)

    def loss(self, log_p: torch.Tensor, references: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """L () of log P (B, n, G), references (p, d) and shares t (B, n, G), which are all 0 for tokens that are ignored."""
        if self.shuffled:
            shares = shares[:, torch.randperm(shares.shape[1], device=shares.device)]
        self.shares = shares
        counted = shares.sum(2)  # (B, n), 1 or the share that is not ignored
        hit = (log_p.detach().argmax(2) == shares.argmax(2)) * counted
        self.accuracy = hit.sum() / counted.sum()  # NaN where all of it is ignored
        tie = -(shares * log_p).sum() / counted.sum().clamp_min(1e-6)
        unit = F.normalize(references, dim=1).unflatten(0, (-1, self.per_class))  # (G, m, d)
        cosines = (unit @ unit.transpose(1, 2)).clamp_min(0)  # (G, m, m)
        others = 1 - torch.eye(self.per_class, device=cosines.device)
        return self.weight * tie + SPREAD_WEIGHT * (cosines * others).sum() / (others.sum() * len(unit)).clamp_min(1)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the prior by the shares of the last step, of all DDP processes. No host synchronisation."""
        if self.shares is None:
            return
        total = sum_over_ranks(self.shares.sum((0, 1)))  # (G,)
        self.shares = None
        seen = total.sum() > 0  # false where all of it was ignored
        self.updates += seen
        rate = (1 / self.updates.clamp_min(1)).clamp_min(1 - self.decay) * seen
        self.prior.lerp_(total / total.sum().clamp_min(1e-6), rate)

    def diagnostics(self) -> dict[str, float]:
        """class_accuracy: the share of the last step's tokens whose references' class is the labels' commonest."""
        return {"class_accuracy": float("nan") if self.accuracy is None else float(self.accuracy)}

    def __getstate__(self):
        return {**self.__dict__, "shares": None, "accuracy": None}  # deepcopy and pickle copy the layer, not its last batch


@torch.no_grad()
def class_shares(target: torch.Tensor, num_classes: int, grid: tuple[int, ...]) -> torch.Tensor:
    """Which share of the voxels under each token has which class: a target of nnU-Net's loss -> (B, n, num_classes + 1).

    target : (B, 1, *spatial) labels, those of num_classes and above being nnU-Net's ignore label; or (B, R, *spatial) regions,
        1 inside, with one channel more, 1 where ignored, if there is an ignore label. Of overlapping regions the last counts,
        as when nnU-Net makes labels of regions. The last class is "none of them": the background of regions.
    num_classes : outputs of the network, num_classes = R for regions
    grid : spatial shape of the tokens

    What is ignored counts for no class, so a token's shares sum to 1 less the share that is ignored.
    """
    size = target.shape[2:]
    pool = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
    labels_only = target.shape[1] == 1 and num_classes > 1
    # (B, 1, *spatial), of no class yet and not ignored
    free = target[:, num_classes:] == 0 if target.shape[1] > num_classes else torch.ones_like(target[:, :1], dtype=torch.bool)
    pooled = []  # one class at a time: all of them at full resolution would need more memory than the network's features
    for label in reversed(range(num_classes)):
        inside = (target == label) if labels_only else (target[:, label : label + 1] != 0) & free
        free = free & ~inside
        pooled.append(pool(inside.float(), grid).flatten(2))  # (B, 1, n)
    rest = torch.zeros_like(pooled[0]) if labels_only else pool(free.float(), grid).flatten(2)
    return torch.cat([*pooled[::-1], rest], 1).transpose(1, 2)  # (B, n, G)

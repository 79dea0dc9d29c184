"""Self-training on the target: a slow teacher labels an image, the segmenter learns it from a perturbed copy."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn


class Teacher:
    r"""Exponential moving average of the segmenter, :math:`\bar\theta \leftarrow a\,\bar\theta + (1 - a)\,\theta` [1].

    Parameters
    ----------
    network : nn.Module
        Copied; raw, with `decoder.deep_supervision`.
    decay : float
        a, approached as (1 + step) / (10 + step).
    regions : bool
        Outputs are regions (sigmoid), not labels (softmax).
    confidence : float
        Of the teacher, under which a voxel does not count.

    References
    ----------
    .. [1] Tarvainen, Valpola. Mean teachers are better role models. NeurIPS 2017; for weak and strong views: Sohn et al.
       FixMatch. NeurIPS 2020.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, regions: bool = False, confidence: float = 0.9):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.network.decoder.deep_supervision = False
        self.decay, self.regions, self.confidence, self.steps = decay, regions, confidence, 0

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """One step towards the segmenter."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, *patch) -> (B, heads, *patch), float32."""
        logits = self.network(images).float()
        return logits.sigmoid() if self.regions else logits.softmax(1)

    def state_dict(self) -> dict:
        return {"network": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.steps = state["steps"]


def pseudo_label_loss(
    logits: torch.Tensor, probabilities: torch.Tensor, confidence: float, regions: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Cross-entropy with the teacher's labels where it is sure, over all voxels: few sure voxels have little weight.

    Parameters
    ----------
    logits, probabilities : (B, heads, *patch)
        The segmenter's and the teacher's.
    confidence : float
        A label counts from this probability on; with `regions` a region's absence too, below 1 - confidence.

    Returns
    -------
    (), float32, and the share of sure voxels, without gradient
    """
    logits = logits.float()
    if regions:
        sure = (probabilities >= confidence) | (probabilities <= 1 - confidence)  # (B, heads, *patch)
        entropy = F.binary_cross_entropy_with_logits(logits, (probabilities > 0.5).float(), reduction="none")
    else:
        highest, labels = probabilities.max(1)  # (B, *patch)
        sure, entropy = highest >= confidence, F.cross_entropy(logits, labels, reduction="none")
    return (entropy * sure).mean(), sure.float().mean()


def self_training_weight(progress: float, largest: float) -> float:
    """0 over the first half of training, then linear to `largest`; `progress` in [0, 1]."""
    return largest * max(0.0, 2 * progress - 1)

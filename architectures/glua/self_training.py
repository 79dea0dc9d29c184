"""Self-training on the target: a teacher labels an image, and the segmenter learns the labels on a perturbed copy."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

DECAY = 0.999  # of the teacher's average
CONFIDENCE = 0.9  # probability of the teacher from which a label counts


class Teacher:
    r"""Exponential moving average of the segmenter, :math:`\bar\theta \leftarrow a\,\bar\theta + (1 - a)\,\theta` [1].

    a is `DECAY`, approached as (1 + step) / (10 + step).

    Parameters
    ----------
    network : nn.Module
        Copied. Without the wrappers of DDP and torch.compile, with `decoder.deep_supervision`.
    regions : bool
        Outputs are regions (sigmoid), not labels (softmax).

    References
    ----------
    .. [1] Tarvainen, Valpola. Mean teachers are better role models. NeurIPS 2017; labels of weakly perturbed images for
       strongly perturbed ones: Sohn et al. FixMatch. NeurIPS 2020.
    """

    def __init__(self, network: nn.Module, regions: bool = False):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.network.decoder.deep_supervision = False
        self.regions, self.steps = regions, 0

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """One step of the average towards the segmenter's weights."""
        decay = min(DECAY, (1 + self.steps) / (10 + self.steps))
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
    logits: torch.Tensor, probabilities: torch.Tensor, regions: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Cross-entropy with the teacher's labels where it is confident, averaged over all voxels.

    So a few confident voxels have little weight. A label counts from probability `CONFIDENCE` on; with `regions` the absence
    of a region counts too, below 1 - `CONFIDENCE`.

    Parameters
    ----------
    logits, probabilities : (B, heads, *patch)
        The segmenter's and the teacher's.

    Returns
    -------
    (), float32, and the share of confident voxels, without gradient
    """
    logits = logits.float()
    if regions:
        confident = (probabilities >= CONFIDENCE) | (probabilities <= 1 - CONFIDENCE)  # (B, heads, *patch)
        entropy = F.binary_cross_entropy_with_logits(logits, (probabilities > 0.5).float(), reduction="none")
    else:
        highest, labels = probabilities.max(1)  # (B, *patch)
        confident, entropy = highest >= CONFIDENCE, F.cross_entropy(logits, labels, reduction="none")
    return (entropy * confident).mean(), confident.float().mean()


def self_training_weight(progress: float, largest: float) -> float:
    """0 over the first half of training, then linear to `largest`; `progress` in [0, 1]."""
    return largest * max(0.0, 2 * progress - 1)

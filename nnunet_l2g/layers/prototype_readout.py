"""Logits from what the references of an image have collected: its own class prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunet_l2g.layers.distributed import sum_over_ranks, world_size

TEMPERATURE = 0.1
SOURCES = ("image", "dataset")


class PrototypeReadout(nn.Module):
    r"""Compares features with class prototypes.

    .. math::
        \Delta_{xc} = \alpha \max_{j \in J_c} \cos(W f_x, V g_j) / 0.1

    to be added to the logit of class c. :math:`\alpha = 0` at first, so that the network starts as the plain one. An inference
    from the abstract's "discriminative on-the-fly representation" (docs/methods).

    Parameters
    ----------
    channels, dim : int
        C of the features; d of the prototypes.
    num_classes, per_class : int
        Of the network's output; prototypes of each class.
    width : int
        Of the space in which both are compared.
    source : "image" or "dataset"
        "image": g is what this image's references collect. "dataset" (twin): its moving average over training.

    Shapes
    ------
    forward: features (B, C, *spatial), g (B, p, d) -> (B, num_classes, *spatial), float32. References of "none of the
    classes" come last in p and are not read.

    Raises
    ------
    ValueError
        If the source is neither.
    """

    def __init__(self, channels: int, dim: int, num_classes: int, per_class: int, width: int = 32, source: str = "image"):
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"readout is {source!r}, expected one of {SOURCES}, or None for no read-out")
        self.num_classes, self.per_class, self.source = num_classes, per_class, source
        self.project_features = nn.Linear(channels, width, bias=False)  # W
        self.project_prototypes = nn.Linear(dim, width, bias=False)  # V
        self.alpha = nn.Parameter(torch.zeros(()))
        self.last: torch.Tensor | None = None  # g of the last training forward, for the twin
        if source == "dataset":
            self.register_buffer("mean", torch.zeros((num_classes + 1) * per_class, dim))  # (p, d)
            self.register_buffer("updates", torch.zeros(()))

    def forward(self, features: torch.Tensor, collected: torch.Tensor) -> torch.Tensor:
        if self.source == "dataset":
            self.last = collected.detach() if self.training else None
            collected = self.mean.expand(len(features), -1, -1)
        prototypes = self.project_prototypes(collected)[:, : self.num_classes * self.per_class]  # (B, C m, w)
        prototypes = F.normalize(prototypes.float(), dim=2, eps=1e-3)
        # made again in the backward: cosines with all prototypes at stride 2 are larger than the decoder's own features there
        best = checkpoint(self._best, features, prototypes, use_reentrant=False, preserve_rng_state=False)  # (B, n, C)
        # in float32: alpha's gradient is a sum over all voxels, which float16 would not hold
        return self.alpha / TEMPERATURE * best.float().transpose(1, 2).unflatten(2, features.shape[2:])

    def _best(self, features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """The largest cosine of each feature (B, C, *spatial) with prototypes (B, C m, w) of each class -> (B, n, C)."""
        queries = self.project_features(features.flatten(2).transpose(1, 2)).float()  # (B, n, w)
        cosines = F.normalize(queries, dim=2, eps=1e-3) @ prototypes.transpose(1, 2)  # (B, n, C m)
        return cosines.unflatten(2, (-1, self.per_class)).amax(3)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the dataset's mean, of the twin, after an optimiser step."""
        if self.last is None:
            return
        seen = sum_over_ranks(self.last.mean(0)) / world_size()  # (p, d)
        self.last = None
        self.updates += 1
        self.mean.lerp_(seen, (1 / self.updates).clamp_min(0.01))

    def __getstate__(self):
        return {**self.__dict__, "last": None}  # deepcopy and pickle copy the layer, not its last batch

"""Tells the domain of deep features at every position; trained beside the segmenter, not part of it."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_l2g.training.distributed import sum_over_ranks, world_size
from nnunet_l2g.training.precision import full_precision

WIDTHS = (256, 128, 64, 32)


class DomainDiscriminator(nn.Module):
    r"""Fully convolutional least-squares discriminator :math:`D((f - \mu) / \sigma)`, 3x3 convolutions C-256-128-64-32-1.

    Features are standardised for each channel by running moments of both domains together, so that neither the segmenter's
    scale nor its drift decides; what differs between the domains stays. The last convolution starts at weight 0 and bias
    1/2: D = 1/2 everywhere, so the mask starts at 0.

    Group norm stands where the sibling code has instance norm: instance norm takes each image's own mean and variance away,
    in which domains differ most (docs/methods has the measurement), and needs more than one position.

    Parameters
    ----------
    channels : int
        C of the features.
    dims : int
        2 or 3.
    momentum : float
        Of the running moments, after a plain average of the first 1 / momentum batches.

    Shapes
    ------
    forward: (B, C, *spatial) -> (B, 1, *spatial), float32 whatever autocast says

    Raises
    ------
    ValueError
        If dims is not 2 or 3.
    """

    def __init__(self, channels: int, dims: int, momentum: float = 0.01):
        if dims not in (2, 3):
            raise ValueError(f"dims={dims}: expected 2 or 3, the dimensions of the features")
        super().__init__()
        self.momentum = momentum
        convolution = nn.Conv2d if dims == 2 else nn.Conv3d
        layers, width = [], channels
        for wider in WIDTHS:
            layers += [convolution(width, wider, 3, padding=1), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        last = convolution(width, 1, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 0.5)
        self.layers = nn.Sequential(*layers, last)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))  # E f^2
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with full_precision(features.device.type):
            shape = (1, -1) + (1,) * (features.dim() - 2)
            deviation = (self.square - self.mean.square()).clamp_min(1e-6).sqrt()  # (C,)
            return self.layers((features.float() - self.mean.view(shape)) / deviation.view(shape))

    @torch.no_grad()
    def observe(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Takes the features of both domains, (B, C, *spatial) each, into the running moments: half the weight each.

        Nothing happens if one is not finite: under AMP a target image may overflow, and no gradient scaler looks at it.
        """
        moments = [torch.stack([f.transpose(0, 1).float().flatten(1).pow(p).mean(1) for p in (1, 2)])
                   for f in (source, target)]  # fmt: skip
        mean, square = sum_over_ranks(sum(moments) / 2) / world_size()  # (C,) each
        finite = (torch.isfinite(mean) & torch.isfinite(square)).all()  # no host synchronisation
        self.batches += finite
        share = torch.clamp(1 / self.batches, min=self.momentum, max=1.0) * finite
        self.mean.lerp_(torch.where(finite, mean, self.mean), share)
        self.square.lerp_(torch.where(finite, square, self.square), share)

"""Adversarial alignment of features: domain discriminator, local feature mask, and the steps of both sides."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_l2g.training.distributed import average_gradients, from_rank_0, sum_over_ranks, world_size
from nnunet_l2g.training.precision import full_precision

WIDTHS = (256, 128, 64, 32)
MOMENTUM = 0.01  # of the running moments, after a plain average of the first 1 / MOMENTUM batches


class DomainDiscriminator(nn.Module):
    r"""Least-squares discriminator of each position, :math:`D((f - \mu) / \sigma)`, 3x3 convolutions C-256-128-64-32-1.

    Features are standardised for each channel by running moments of both domains together. So the scale and the drift of the
    segmenter's features do not matter, and a difference between the domains stays. The last convolution starts with weight 0
    and bias 1/2: D is 1/2 everywhere, and the mask starts at 0.

    The sibling code has instance norm where this has group norm. Instance norm removes each image's own mean and variance,
    where domains differ most (docs/methods/glua.md has the measurement), and it needs more than one position.

    Parameters
    ----------
    channels, dims : int
        C of the features, and 2 or 3.

    Shapes
    ------
    forward: (B, C, *spatial) -> (B, 1, *spatial), float32, also inside autocast
    """

    def __init__(self, channels: int, dims: int):
        super().__init__()
        convolution = nn.Conv2d if dims == 2 else nn.Conv3d
        layers, inputs = [], channels
        for width in WIDTHS:
            layers += [convolution(inputs, width, 3, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
            inputs = width
        last = convolution(inputs, 1, 3, padding=1)
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
        """Updates the running moments with features (B, C, *spatial) of both domains, half the weight each.

        Does nothing if a feature is not finite: under AMP a target image may overflow, and no gradient scaler checks it.
        """
        mean = square = 0.0
        for features in (source, target):
            values = features.transpose(0, 1).float().flatten(1)  # (C, n)
            mean, square = mean + values.mean(1) / 2, square + values.square().mean(1) / 2
        mean, square = sum_over_ranks(torch.stack([mean, square])) / world_size()  # (C,) each
        finite = (torch.isfinite(mean) & torch.isfinite(square)).all()  # a tensor: the CPU does not wait for the GPU
        self.batches += finite
        share = torch.clamp(1 / self.batches, min=MOMENTUM, max=1.0) * finite
        self.mean.lerp_(torch.where(finite, mean, self.mean), share)
        self.square.lerp_(torch.where(finite, square, self.square), share)


def local_feature_mask(score: torch.Tensor) -> torch.Tensor:
    r""":math:`m = \mathrm{clip}(|2 D(f) - 1|, 0, 1)`: 0 where the discriminator cannot tell the domains apart, 1 where it can.

    The mask is detached: it selects positions, and no gradient makes it smaller. By its abstract GLUA [1] has such a mask;
    this form is inferred (docs/methods/glua.md).

    Parameters
    ----------
    score : (B, 1, *spatial)
        D(f), trained to 1 on source and 0 on target.

    Returns
    -------
    (B, 1, *spatial) in [0, 1], without gradient

    References
    ----------
    .. [1] Su et al. Mind The Gap: alleviating local imbalance for unsupervised cross-modality medical image segmentation.
       arXiv 2205.11888; IEEE JBHI.
    """
    return (2 * score.detach() - 1).abs().clamp(0, 1)


class AdversarialAlignment:
    r"""The segmenter's loss and the discriminator's step, in turn [1]:

    .. math::
        L_{align} = \lambda\,\mathrm{mean}\, m\,(D(f_t) - 1)^2, \qquad
        L_D = \mathrm{mean}\,(D(sg f_s) - 1)^2 + \mathrm{mean}\,D(sg f_t)^2

    with m the local feature mask and sg a stopped gradient. L_align has a gradient for the features only, L_D for D only.

    Parameters
    ----------
    discriminator : DomainDiscriminator
        On its device. It is frozen outside its own step, and equal on all processes afterwards.
    mask : bool
        False: m = 1 (ablation).
    lr : float
        Of the discriminator's Adam.

    Attributes
    ----------
    weight : float
        :math:`\lambda`, set by the trainer. While it is 0, the discriminator learns and the segmenter gets no gradient.

    References
    ----------
    .. [1] Mao et al. Least squares generative adversarial networks. ICCV 2017.
    """

    def __init__(self, discriminator: DomainDiscriminator, mask: bool = True, lr: float = 1e-4):
        self.discriminator, self.mask, self.weight = discriminator.requires_grad_(False), mask, 0.0
        for tensor in discriminator.state_dict().values():
            tensor.copy_(from_rank_0(tensor))
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr, betas=(0.5, 0.999))
        self._features: tuple[torch.Tensor, torch.Tensor] | None = None
        self._records: list[torch.Tensor] = []

    def loss(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """L_align of features (B, C, *spatial), float32, (); None while the weight is 0. Keeps the features for `step`."""
        self._features = (source.detach(), target.detach())
        if not self.weight:
            return None  # not 0 times the loss, which is NaN where the features overflow
        score = self.discriminator(target)  # (B, 1, *spatial)
        error = (score - 1).square()
        return self.weight * (local_feature_mask(score) * error if self.mask else error).mean()

    @torch.enable_grad()
    def step(self, translated: torch.Tensor | None = None) -> None:
        """One step of the discriminator on the features that `loss` was given last.

        translated : (B,) bool or None
            Source samples that count as source, because they look like the target. None: all. Without any, the loss is the
            target's alone.
        """
        if self._features is None:
            return
        source, target = self._features
        self._features = None
        discriminator = self.discriminator.requires_grad_(True)
        discriminator.observe(source, target)
        finite = torch.isfinite(source).all() & torch.isfinite(target).all()
        source, target = (torch.where(finite, f, torch.zeros_like(f)) for f in (source, target))
        of_source, of_target = discriminator(source), discriminator(target)  # (B, 1, *spatial) each
        counts = torch.ones(len(source), device=source.device) if translated is None else translated.float()  # (B,)
        error = (of_source - 1).square().flatten(1).mean(1)  # (B,)
        loss = ((error * counts).sum() / counts.sum().clamp_min(1) + of_target.square().mean()) * finite
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(discriminator.parameters())
        self.optimizer.step()
        discriminator.requires_grad_(False)
        right_source = (of_source > 0.5).float().flatten(1).mean(1)  # (B,)
        right_target = (of_target < 0.5).float().mean()
        record = [local_feature_mask(of_target).mean(), right_target, (right_source * counts).sum(), counts.sum()]
        self._records.append(torch.stack(record).detach())  # tensors: the CPU does not wait for the GPU

    def diagnostics(self) -> dict[str, float]:
        """Since the last call: mean mask on the target, share of positions D is right about (mean of both domains), weight."""
        records, self._records = self._records or [torch.zeros(4)], []  # the gradient scaler may have skipped all steps
        mask, right_target, right_source, sources = torch.stack(records).mean(0).tolist()
        accuracy = (right_source / sources + right_target) / 2 if sources else right_target
        return {"mask_mean": mask, "domain_accuracy": accuracy, "alignment_weight": self.weight}

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


def alignment_weight(progress: float, start: float, weights: tuple[float, float]) -> float:
    r""":math:`\lambda`: 0 before `start`, then linear from the first to the second weight; `progress` in [0, 1]."""
    if progress < start:
        return 0.0
    first, last = weights
    return first + (last - first) * (progress - start) / max(1e-8, 1 - start)

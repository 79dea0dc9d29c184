"""Pulls the target's deep features to where a domain discriminator takes them for the translated source's."""

from __future__ import annotations

import torch

from nnunet_l2g.architectures.glua.domain_discriminator import DomainDiscriminator
from nnunet_l2g.architectures.glua.local_feature_mask import local_feature_mask
from nnunet_l2g.training.distributed import average_gradients, from_rank_0


class AdversarialAlignment:
    r"""The segmenter's term and the discriminator's step, in turn [1]:

    .. math::
        L_{align} = \lambda\,\mathrm{mean}\, m\,(D(f_t) - 1)^2, \qquad
        L_D = \mathrm{mean}\,(D(sg f_s) - 1)^2 + \mathrm{mean}\,D(sg f_t)^2

    with m the local feature mask. The gradient of the first reaches the features alone, that of the second D alone.

    Parameters
    ----------
    discriminator : DomainDiscriminator
        On its device; frozen but for its own step. Equal on all processes afterwards.
    mask : bool
        False: m = 1 (twin).
    lr : float
        Of the discriminator's Adam.

    Attributes
    ----------
    weight : float
        :math:`\lambda`, set by the trainer; 0: the discriminator learns, the segmenter is left alone.

    References
    ----------
    .. [1] Mao et al. Least squares generative adversarial networks. ICCV 2017.
    """

    def __init__(self, discriminator: DomainDiscriminator, mask: bool = True, lr: float = 1e-4):
        self.discriminator, self.mask, self.weight = discriminator.requires_grad_(False), mask, 0.0
        for tensor in discriminator.state_dict().values():
            tensor.copy_(from_rank_0(tensor))
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr, betas=(0.5, 0.999))
        self._features = None
        self._sums = {}

    def loss(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """L_align of features (B, C, *spatial), float32, (); None while the weight is 0. Remembers both for `step`."""
        self._features = (source.detach(), target.detach())
        if not self.weight:
            return None
        score = self.discriminator(target)  # (B, 1, *spatial); D is frozen here
        error = (score - 1).square()
        return self.weight * (local_feature_mask(score) * error if self.mask else error).mean()

    @torch.enable_grad()
    def step(self, translated: torch.Tensor | None = None) -> None:
        """One step of the discriminator on the features last seen.

        translated : (B,) bool or None
            Source samples that count as source: those that look like the target. None: all. If there is none, the step is
            the target's alone.
        """
        if self._features is None:
            return
        source, target = self._features
        self._features = None
        discriminator = self.discriminator.requires_grad_(True)
        discriminator.observe(source, target)
        finite = torch.isfinite(source).all() & torch.isfinite(target).all()
        source, target = (torch.where(finite, f, torch.zeros_like(f)) for f in (source, target))
        of_source, of_target = discriminator(source), discriminator(target)
        counts = torch.ones(len(source), device=source.device) if translated is None else translated.float()
        error = (of_source - 1).square().flatten(1).mean(1)  # (B,)
        loss = ((error * counts).sum() / counts.sum().clamp_min(1) + of_target.square().mean()) * finite
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(discriminator.parameters())
        self.optimizer.step()
        discriminator.requires_grad_(False)
        self._note(of_source.detach(), of_target.detach(), counts)

    def _note(self, of_source: torch.Tensor, of_target: torch.Tensor, counts: torch.Tensor) -> None:
        right_source = (of_source > 0.5).float().flatten(1).mean(1)  # (B,)
        values = {
            "mask_mean": (local_feature_mask(of_target).mean(), 1.0),
            "source_right": ((right_source * counts).sum(), counts.sum()),
            "target_right": ((of_target < 0.5).float().mean(), 1.0),
        }
        for key, (value, weight) in values.items():
            total, number = self._sums.get(key, (0.0, 0.0))
            self._sums[key] = (total + value, number + weight)  # tensors: no host synchronisation in a step

    def diagnostics(self) -> dict[str, float]:
        """Means since the last call: mask on the target, share of positions D is right about (both domains alike), weight."""
        sums, self._sums = self._sums, {}
        means = {key: float(total) / max(float(number), 1e-6) for key, (total, number) in sums.items()}
        accuracy = (means.get("source_right", 0.5) + means.get("target_right", 0.5)) / 2
        return {"mask_mean": means.get("mask_mean", 0.0), "domain_accuracy": accuracy, "alignment_weight": self.weight}

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

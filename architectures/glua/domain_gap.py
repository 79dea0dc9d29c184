"""The gap between two domains as a number: sliced Wasserstein distance of intensities and of deep features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

BATCHES, SAMPLES = 4, 1024  # batches of an epoch, positions of a batch


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    r""":math:`SW_2(a, b) = (E_\theta\, W_2^2(\theta \cdot a, \theta \cdot b))^{1/2}` of a (n, d) and b (m, d) [1], by POT.

    50 seeded directions theta on the sphere; exact for d = 1.

    References
    ----------
    .. [1] Bonneel et al. Sliced and Radon Wasserstein barycenters of measures. JMIV 2015.
    """
    import ot  # large, and only needed here

    return float(ot.sliced_wasserstein_distance(a.astype(np.float64), b.astype(np.float64), n_projections=50, seed=0))


def sample_positions(x: torch.Tensor, number: int, generator: torch.Generator) -> np.ndarray:
    """Images or features (B, C, *spatial) -> (at most `number`, C), positions drawn without replacement."""
    vectors = x.float().cpu().movedim(1, -1).flatten(0, -2)  # (n, C)
    return vectors[torch.randperm(len(vectors), generator=generator)[:number]].numpy()


class DomainGap:
    """Keeps the first batches of an epoch on the CPU and measures the gap on them.

    Finite samples of one domain are not at distance 0 from each other: compare epochs and methods, not with 0.
    """

    def __init__(self):
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """A batch of each domain, (B, C, *patch), as the loader gave it."""
        if len(self._batches) < BATCHES:
            self._batches.append((source, target))

    @torch.no_grad()
    def measure(
        self, encode: Callable[[torch.Tensor], torch.Tensor], translate: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> dict[str, float]:
        """The distances, {} without batches. Forgets the batches.

        Returns
        -------
        gap_intensity, gap_features : between source and target; features in units of the target's standard deviation, for
            each channel
        gap_intensity_translated, gap_features_translated : between translated source and target, if `translate` is given
        """
        generator = torch.Generator().manual_seed(0)
        samples: dict[tuple[str, str], list[np.ndarray]] = {}
        for source, target in self._batches:
            images = {"": source, "target": target}
            if translate is not None:
                images["_translated"] = translate(source)
            for domain, image in images.items():
                for kind, values in (("intensity", image), ("features", encode(image))):
                    samples.setdefault((kind, domain), []).append(sample_positions(values, SAMPLES, generator))
        self._batches = []
        joined = {key: np.concatenate(parts) for key, parts in samples.items()}  # (n, C) each
        gaps = {}
        for (kind, domain), values in joined.items():
            if domain != "target":
                target = joined[kind, "target"]
                scale = np.maximum(target.std(0), 1e-6) if kind == "features" else 1.0
                gaps[f"gap_{kind}{domain}"] = sliced_wasserstein(values / scale, target / scale)
        return gaps

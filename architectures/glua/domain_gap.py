"""The gap between two domains as a number: sliced Wasserstein distance of intensities and of deep features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, projections: int = 50, seed: int = 0) -> float:
    r""":math:`SW_2(a, b) = (E_\theta\, W_2^2(\theta \cdot a, \theta \cdot b))^{1/2}`, theta uniform on the sphere [1]. POT's.

    Parameters
    ----------
    a : (n, d)
    b : (m, d)
    projections : number of theta; for d = 1 the distance is exact
    seed : of the projections: same samples, same number

    References
    ----------
    .. [1] Bonneel et al. Sliced and Radon Wasserstein barycenters of measures. JMIV 2015.
    """
    import ot  # large, and only needed here

    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return float(ot.sliced_wasserstein_distance(a, b, n_projections=projections, seed=seed))


def intensity_samples(x: torch.Tensor, number: int, generator: torch.Generator) -> np.ndarray:
    """Images (B, C, *spatial) -> (number, d): voxels for one channel (d = 1), else 3x3 patches of the last two axes (9 C)."""
    x = x.float().cpu()
    if x.shape[1] == 1 or min(x.shape[-2:]) < 3:
        return feature_samples(x, number, generator)
    patches = x.unfold(-2, 3, 1).unfold(-2, 3, 1)  # (B, C, *spatial, 3, 3)
    places = [torch.randint(size, (number,), generator=generator) for size in (len(x), *patches.shape[2:-2])]
    sample, *rest = places
    return patches.movedim(1, -1)[(sample, *rest)].flatten(1).numpy()  # (number, 9 C)


def feature_samples(features: torch.Tensor, number: int, generator: torch.Generator) -> np.ndarray:
    """Features (B, C, *spatial) -> (at most number, C), positions drawn without replacement."""
    tokens = features.float().cpu().movedim(1, -1).flatten(0, -2)  # (N, C)
    return tokens[torch.randperm(len(tokens), generator=generator)[:number]].numpy()


class DomainGap:
    """Collects a few batches of an epoch and measures on them; all numbers shrink as the domains come together.

    Finite samples of one domain are not at distance 0 either: compare epochs and rows, not with 0.

    Parameters
    ----------
    batches : int
        Kept, the first of an epoch, on the CPU.
    samples : int
        Drawn from each batch.
    """

    def __init__(self, batches: int = 4, samples: int = 1024, seed: int = 0):
        self.batches, self.samples, self.seed = batches, samples, seed
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """A batch of each domain, (B, C, *patch), as the loader gave them."""
        if len(self._kept) < self.batches:
            self._kept.append((source, target))

    @torch.no_grad()
    def measure(
        self, encode: Callable[[torch.Tensor], torch.Tensor], translate: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> dict[str, float]:
        """Forgets the batches afterwards.

        Returns
        -------
        gap_intensity, gap_features : between source and target; features in units of the target's standard deviation, for
            each channel
        gap_intensity_translated, gap_features_translated : between translated source and target, if `translate` is given
        """
        generator = torch.Generator().manual_seed(self.seed)
        kinds = ("source", "translated", "target")
        intensities, features = ({kind: [] for kind in kinds} for _ in range(2))
        for source, target in self._kept:
            images = {"source": source, "target": target}
            if translate is not None:
                images["translated"] = translate(source)
            for kind, image in images.items():
                intensities[kind].append(intensity_samples(image, self.samples, generator))
                features[kind].append(feature_samples(encode(image), self.samples, generator))
        self._kept = []
        found = {}
        for name, samples in (("intensity", intensities), ("features", features)):
            target = _joined(samples["target"])
            scale = 1.0 if name == "intensity" else np.maximum(target.std(0), 1e-6)
            for kind, suffix in (("source", ""), ("translated", "_translated")):
                if samples[kind]:
                    found[f"gap_{name}{suffix}"] = sliced_wasserstein(_joined(samples[kind]) / scale, target / scale)
        return found


def _joined(samples: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(samples) if samples else np.zeros((1, 1))

"""k-means centres of tokens, by scikit-learn on the CPU: it runs once or twice in a training."""

from __future__ import annotations

import torch

MAX_TOKENS = 8192  # more would take seconds and hardly move the centres


@torch.no_grad()
def kmeans_centres(tokens: torch.Tensor, k: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """k centres (k, d) of tokens (n, d) with weights (n,), equal by default. Deterministic.

    If k or fewer tokens are distinct, each of them is a centre, and the others are copies moved by 1 % of the tokens' spread.
    Raises FloatingPointError if a token is not finite.
    """
    if not bool(torch.isfinite(tokens).all()):
        raise FloatingPointError(f"k-means got NaN or Inf in {len(tokens)} tokens, expected finite ones")
    step = -(-len(tokens) // MAX_TOKENS)
    points = tokens[::step].cpu().double()  # Apple's mps has no float64
    distinct = points.unique(dim=0)  # KMeans would return duplicates, with a warning
    if len(distinct) > k:
        from sklearn.cluster import KMeans  # a second to import, needed only here

        weights = None if weights is None else weights[::step].cpu().double().numpy()
        found = KMeans(k, n_init=1, max_iter=50, random_state=0).fit(points.numpy(), sample_weight=weights)
        centres = torch.from_numpy(found.cluster_centers_)
    else:
        centres = distinct.repeat(-(-k // len(distinct)), 1)[:k]
        noise = torch.randn(centres.shape, generator=torch.Generator().manual_seed(0), dtype=centres.dtype)
        centres[len(distinct) :] += 0.01 * points.std(unbiased=False).clamp_min(1e-6) * noise[len(distinct) :]
    return centres.to(tokens.dtype).to(tokens.device)

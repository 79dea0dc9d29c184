"""k-means centres of tokens. Runs once or twice in a training, so scikit-learn on the CPU does it."""

from __future__ import annotations

import torch

MAX_TOKENS = 8192  # more take seconds and do not move the centres


@torch.no_grad()
def kmeans_centres(tokens: torch.Tensor, k: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """k centres of tokens (n, d), which weigh (n,), equally by default -> (k, d), on the tokens' device. Deterministic.

    With k or fewer distinct tokens each of them is a centre, and the rest are copies moved by 1 % of the tokens' spread.

    Raises
    ------
    ValueError
        If there is no token.
    FloatingPointError
        If one is not finite.
    """
    if len(tokens) == 0:
        raise ValueError("k-means got no tokens, expected at least one")
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

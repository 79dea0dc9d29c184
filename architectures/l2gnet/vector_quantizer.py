"""A codebook that follows the tokens: nearest code, commitment loss, EMA update after the optimiser's step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.training.distributed import from_rank_0, sum_over_ranks
from nnunet_l2g.training.kmeans import kmeans_centres

PART = 2**15  # tokens whose distances are computed at a time


class VectorQuantizer(nn.Module):
    r"""Finds the nearest code of each token.

    .. math::
        k_i = \arg\min_k |h_i - e_k|^2, \quad L_{commit} = \beta\,\mathrm{mean}|h - \mathrm{sg}\,e_k|^2

    The codebook is no parameter. `update`, called once after each optimiser step, moves it by exponential moving averages of
    the counts and sums of the tokens of the last training forward (summed over all DDP processes):

    .. math::
        N_k \leftarrow \lambda N_k + (1-\lambda) n_k, \quad m_k \leftarrow \lambda m_k + (1-\lambda) \sum_{i: k_i = k} h_i,
        \quad e_k = m_k / \tilde N_k

    with Laplace-smoothed :math:`\tilde N`. Codes whose N falls under ``dead_below`` times the uniform share restart at a token,
    drawn in proportion to its squared distance from its code. The first update places the codes by k-means. Updating outside
    the forward keeps torch.compile right: an in-place update inside a compiled forward gives wrong gradients, since the
    backward looks up the code again.

    Parameters
    ----------
    num_codes : int
        K.
    dim : int
        d, width of a token.
    beta : float
        Weight of the commitment loss.
    decay : float
        lambda.
    dead_below : float
        Share of the uniform count under which a code is restarted; 0 never restarts.

    Shapes
    ------
    forward: tokens (B, n, d) -> codes (B, n), without gradient. A training forward keeps both in ``pending`` for `update`.

    Raises
    ------
    ValueError
        If num_codes or dim is under 1, or decay or dead_below is outside [0, 1).

    References
    ----------
    .. [1] van den Oord, Vinyals, Kavukcuoglu. Neural discrete representation learning. NeurIPS 2017, appendix A.1.
    """

    diagnostic_keys = ("perplexity", "codes_used")

    def __init__(self, num_codes: int, dim: int, beta: float = 0.25, decay: float = 0.99, dead_below: float = 0.05):
        super().__init__()
        if num_codes < 1:
            raise ValueError(f"num_codes (K) is {num_codes}, expected at least 1")
        if dim < 1:
            raise ValueError(f"dim is {dim}, expected at least 1")
        for name, value in (("decay", decay), ("dead_below", dead_below)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected 0 <= {name} < 1")
        self.beta, self.decay, self.dead_below = beta, decay, dead_below
        self.register_buffer("codebook", torch.randn(num_codes, dim))  # e (K, d)
        self.register_buffer("ema_counts", torch.ones(num_codes))  # N (K,)
        self.register_buffer("ema_sums", self.codebook.clone())  # m (K, d)
        self.register_buffer("used", torch.zeros(num_codes), persistent=False)  # counts since the last diagnostics
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens (B, n, d), codes (B, n)

    @torch.no_grad()
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # |h - e|^2 without |h|^2, which is the same for all codes; in parts, because (n, K) numbers are many
        codebook = self.codebook.to(h.dtype)
        offset = codebook.square().sum(1)  # (K,)
        codes = torch.cat([(offset - 2 * part @ codebook.T).argmin(-1) for part in h.split(PART, 1)], 1)  # (B, n)
        self.pending = (h.detach(), codes) if self.training else None
        return codes

    def commitment(self, h: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """L_commit () of tokens (B, n, d) and their codes (B, n)."""
        return self.beta * F.mse_loss(h, F.embedding(codes, self.codebook.to(h.dtype)))

    @torch.no_grad()
    def initialise(self, h: torch.Tensor) -> None:
        """Places the codes by k-means over tokens (B, n, d), each with the uniform share of the tokens."""
        tokens = h.flatten(0, 1)
        centres = kmeans_centres(tokens, len(self.codebook))
        share = sum_over_ranks(tokens.new_tensor(len(tokens))) / len(centres)  # (); processes may hold unequal batches
        self.codebook.copy_(from_rank_0(centres))
        self.ema_counts.copy_(share.expand(len(centres)))
        self.ema_sums.copy_(self.codebook * share)

    @torch.no_grad()
    def update(self) -> torch.Tensor | None:
        """One EMA step from the last training forward, which it uses up. Returns which codes (K,) restarted.

        No host synchronisation.
        """
        if self.pending is None:
            return None
        tokens, codes = (x.flatten(0, 1) for x in self.pending)  # (n, d), (n,)
        self.pending = None
        num_codes = len(self.codebook)
        tokens = tokens.to(self.codebook.dtype)
        statistics = tokens.new_zeros(num_codes, 1 + tokens.shape[1])  # (K, 1 + d): counts and sums
        statistics[:, 0].index_add_(0, codes, tokens.new_ones(len(codes)))
        statistics[:, 1:].index_add_(0, codes, tokens)
        error = (tokens - self.codebook[codes]).float().square().sum(1) + 1e-12  # (n,)
        restarts = tokens[torch.multinomial(error, num_codes, replacement=True)]  # (K, d)
        statistics, restarts = sum_over_ranks(statistics), from_rank_0(restarts)
        counts, sums = statistics[:, 0], statistics[:, 1:]
        self.used += counts
        self.ema_counts.lerp_(counts, 1 - self.decay)
        self.ema_sums.lerp_(sums, 1 - self.decay)
        total = self.ema_counts.sum()
        dead = self.ema_counts < self.dead_below * total / num_codes  # (K,)
        start = 2 * self.dead_below * total / num_codes  # soon dead again if no token comes
        self.ema_counts.copy_(torch.where(dead, start, self.ema_counts))
        self.ema_sums.copy_(torch.where(dead[:, None], restarts * start, self.ema_sums))
        total = self.ema_counts.sum()
        smoothed = (self.ema_counts + 1e-5) / (total + num_codes * 1e-5) * total  # (K,)
        self.codebook.copy_(self.ema_sums / smoothed[:, None])
        return dead

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """codes_used and perplexity (exp of the entropy of the usage) since the last call; then counts anew."""
        usage = self.used / self.used.sum().clamp_min(1)
        self.used.zero_()
        return {
            "perplexity": float(torch.exp(-(usage * usage.clamp_min(1e-30).log()).sum())),
            "codes_used": float((usage > 0).sum()),
        }

    def __getstate__(self):
        # deepcopy and pickle copy the layer, not its last batch
        return {**self.__dict__, "pending": None}

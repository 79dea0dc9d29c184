"""A codebook that follows the tokens: nearest code, commitment loss, EMA update after the optimiser's step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.training.distributed import from_rank_0, sum_over_ranks
from nnunet_l2g.training.kmeans import kmeans_centres

PART = 2**15  # number of tokens whose distances to all codes are computed at a time


class VectorQuantizer(nn.Module):
    r"""Finds the nearest code of each token [1].

    .. math::
        k_i = \arg\min_k |h_i - e_k|^2, \quad L_{commit} = \beta\,\mathrm{mean}|h - \mathrm{sg}\,e_k|^2

    The codebook is not a parameter. `update`, called once after each optimiser step, moves it by exponential moving averages
    of the counts and sums of the tokens of the last training forward (summed over all DDP processes):

    .. math::
        N_k \leftarrow \lambda N_k + (1-\lambda) n_k, \quad m_k \leftarrow \lambda m_k + (1-\lambda) \sum_{i: k_i = k} h_i,
        \quad e_k = m_k / \tilde N_k

    with Laplace-smoothed :math:`\tilde N`. A code whose N falls below ``dead_below`` times the uniform share restarts at a
    token, which is drawn in proportion to its squared distance from its code. `initialise` places the codes by k-means.

    The update is outside the forward because of torch.compile: with an in-place update inside a compiled forward, the backward
    would look up the codes again and find the new ones.

    Parameters
    ----------
    num_codes : int
        K.
    dim : int
        d, the width of a token.

    Attributes
    ----------
    beta, decay, dead_below : float
        beta and lambda; the share of the uniform count below which a code restarts, where 0 never restarts one.

    Shapes
    ------
    forward: tokens (B, n, d) -> codes (B, n), without gradient. A training forward keeps both in ``pending`` for `update`.

    References
    ----------
    .. [1] van den Oord, Vinyals, Kavukcuoglu. Neural discrete representation learning. NeurIPS 2017, appendix A.1.
    """

    beta, decay, dead_below = 0.25, 0.95, 0.05
    diagnostic_keys = ("perplexity", "codes_used")

    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        self.register_buffer("codebook", torch.randn(num_codes, dim))  # e (K, d)
        self.register_buffer("ema_counts", torch.ones(num_codes))  # N (K,)
        self.register_buffer("ema_sums", self.codebook.clone())  # m (K, d)
        self.register_buffer("used", torch.zeros(num_codes), persistent=False)  # counts since the last diagnostics
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens (B, n, d), codes (B, n)

    @torch.no_grad()
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # |h - e|^2 without |h|^2, which is the same for all codes. In parts, because (K, n) numbers are many.
        codebook = self.codebook.to(h.dtype)
        offset = codebook.square().sum(1, keepdim=True)  # (K, 1)
        parts = h.transpose(1, 2).split(PART, 2)  # (B, d, n) each
        codes = torch.cat([(offset - 2 * (codebook @ part)).min(1).indices for part in parts], 1)  # (B, n)
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

        The CPU does not wait for the GPU here.
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
        start = 2 * self.dead_below * total / num_codes  # so that it is dead again soon if no token comes
        self.ema_counts.copy_(torch.where(dead, start, self.ema_counts))
        self.ema_sums.copy_(torch.where(dead[:, None], restarts * start, self.ema_sums))
        total = self.ema_counts.sum()
        smoothed = (self.ema_counts + 1e-5) / (total + num_codes * 1e-5) * total  # (K,)
        self.codebook.copy_(self.ema_sums / smoothed[:, None])
        return dead

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """codes_used and perplexity (exp of the entropy of the usage) since the last call, then starts to count anew."""
        usage = self.used / self.used.sum().clamp_min(1)
        self.used.zero_()
        return {
            "perplexity": float(torch.exp(-(usage * usage.clamp_min(1e-30).log()).sum())),
            "codes_used": float((usage > 0).sum()),
        }

    def __getstate__(self):
        # deepcopy and pickle copy the layer, not its last batch
        return {**self.__dict__, "pending": None}

"""Tokens are collected by trainable references through a transport plan, and handed back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from nnunet_l2g.layers.distributed import from_rank_0
from nnunet_l2g.layers.kmeans import kmeans_centres
from nnunet_l2g.layers.sinkhorn import check_transport, sinkhorn_potentials


class Plan(NamedTuple):
    """How n tokens are tied to p references."""

    scores: torch.Tensor  # S (B, n, p)
    columns: torch.Tensor  # A (B, n, p) scaled so that columns sum to 1: what a reference collects
    row_logits: torch.Tensor  # (B, n, p), whose softmax over references is A scaled so that rows sum to 1
    received: torch.Tensor  # (B, p), the sums of A's own columns: 1 with uniform marginals. Without gradient


class Alignment(NamedTuple):
    """What one forward did, detached: for logs, figures and tests."""

    queries: torch.Tensor  # (B, n, d)
    columns: torch.Tensor  # A (B, n, p): each column sums to 1, what a reference collects
    output: torch.Tensor  # (B, n, d)
    counts: torch.Tensor  # (B, n), how many tokens each row stands for
    received: torch.Tensor  # (B, p), p times the share of all tokens


class TransportAlignment(nn.Module):
    r"""Aligns tokens on trainable references by optimal transport (OTKE), and scatters what they collect back to the tokens.

    .. math::
        S_{ij} = \cos(q_i - \bar q,\; r_j), \quad A = p\,\Pi^*(S) \text{ (see sinkhorn\_potentials)}

        g_j = \sum_i A_{ij} q_i / \sum_i A_{ij}, \quad o_i = \sum_j A_{ij} g_j / \sum_{j'} A_{ij'}

    Scores come from centred tokens: between uncentred ones every cosine is alike and the plan is flat, each reference then
    averages nearly all tokens and o is constant over the image.

    Parameters
    ----------
    dim : int
        d, width of a token.
    num_references : int
        p.
    eps : float
        Strength of the entropy. Cosines of unrelated tokens differ by about d^-1/2, so eps has to be of that size.
    iterations : int
        T of Sinkhorn. 0 replaces the transport by a softmax over tokens (the twin without marginals).
    solver : "log" or "pot"
    relaxation : float or None
        See sinkhorn_potentials.
    reference_norm : float
        |r_j| where the references are placed. Only their directions count, and a gradient step of SGD turns a vector by
        its size over the norm squared: short references learn faster, at the same learning rate.

    Shapes
    ------
    forward: (B, n, d) -> (B, n, d), for any n; float32. See `align` for what else it can be given.

    Raises
    ------
    ValueError
        If dim or num_references is under 1, or eps, iterations, solver, relaxation, reference_norm are out of range.

    References
    ----------
    .. [1] Mialon et al. A trainable optimal transport embedding for feature aggregation (OTKE). ICLR 2021.
       Its g / sqrt(p) is our g; its own 2D code sets p = n, which ties a network to one patch size.
    """

    diagnostic_keys = ("kept_variance", "tokens_per_reference", "marginal_error", "duplicate_references", "reference_drift")

    def __init__(
        self,
        dim: int,
        num_references: int,
        eps: float = 0.1,
        iterations: int = 20,
        solver: str = "log",
        relaxation: float | None = None,
        reference_norm: float = 1.0,
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}, expected at least 1")
        if num_references < 1:
            raise ValueError(f"num_references (p) is {num_references}, expected at least 1")
        if not 0.01 <= reference_norm <= 1:
            raise ValueError(f"reference_norm is {reference_norm}, expected 0.01 to 1: below, directions are rounded away")
        check_transport(eps, iterations, solver, relaxation)
        self.eps, self.iterations, self.solver, self.relaxation = eps, iterations, solver, relaxation
        self.reference_norm = reference_norm
        self.references = nn.Parameter(reference_norm * _unit(torch.randn(num_references, dim)))  # (p, d)
        self.register_buffer("placed", self.references.detach().clone())  # (p, d), where they last started from
        self.last: Alignment | None = None  # set by a training forward

    def scores(self, q: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """S: cosines of centred tokens (B, n, d) with the references -> (B, n, p)."""
        mean = q.mean(1, keepdim=True) if weights is None else weights[:, None] @ q  # (B, 1, d)
        return _unit(q - mean) @ self._directions(self.references.to(q.dtype)).T

    def _directions(self, references: torch.Tensor) -> torch.Tensor:
        return _unit(references / self.reference_norm)  # the floor of _unit is for vectors of norm 1

    def plan(self, q: torch.Tensor, weights: torch.Tensor | None = None, column_marginal: torch.Tensor | None = None) -> Plan:
        """The plan of tokens q (B, n, d); weights a (B, n) and column_marginal b (p,) sum to 1, uniform by default."""
        scores = self.scores(q, weights)  # (B, n, p)
        u, v = sinkhorn_potentials(scores, self.eps, self.iterations, weights, column_marginal, self.solver, self.relaxation)
        kernel = scores / self.eps
        # Both normalisations of A = exp(kernel + u + v) are a softmax: the constant potential cancels.
        collecting = kernel + u[:, :, None]  # (B, n, p)
        received = (collecting.detach().logsumexp(1) + v.detach()).exp()  # (B, p)
        return Plan(scores, collecting.softmax(1), kernel + v[:, None, :], received)

    def align(
        self, q: torch.Tensor, counts: torch.Tensor | None = None, column_marginal: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """o (B, n, d), what references collect g (B, p, d), and the plan's row_logits (B, n, p).

        counts : (B, n), optional
            How many equal tokens each of q stands for, see merge_tokens: the plan over codes is the plan over tokens.
        column_marginal : (p,), optional
            b: which share of the tokens each reference is to receive.
        """
        plan = self.plan(q, None if counts is None else counts / counts.sum(1, keepdim=True), column_marginal)
        collected = plan.columns.transpose(1, 2) @ q  # (B, p, d)
        output = plan.row_logits.softmax(2) @ collected  # (B, n, d)
        self.last = None
        if self.training:
            counts = torch.ones_like(q[:, :, 0]) if counts is None else counts  # (B, n)
            self.last = Alignment(q.detach(), plan.columns.detach(), output.detach(), counts, plan.received)
        return output, collected, plan.row_logits

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return self.align(q)[0]

    @torch.no_grad()
    def initialise(self, q: torch.Tensor, shares: torch.Tensor | None = None) -> None:
        """Places the references by spherical k-means over centred tokens (B, n, d). Deterministic.

        shares : (B, n, G), optional
            Of G classes in each token, 0 where unknown: the references are placed class by class, those of a class over the
            tokens that hold at least half as much of it as any; small structures fill no token. A class that is in none keeps
            its references.
        """
        directions = _unit(q - q.mean(1, keepdim=True)).flatten(0, 1)  # (B n, d)
        placed = self.references.detach().clone()
        if shares is None:
            placed = kmeans_centres(directions, len(placed))
        else:
            for share, references in zip(shares.flatten(0, 1).T, placed.chunk(shares.shape[2]), strict=True):
                of_class = directions[(share > 0) & (share >= share.max() / 2)]  # share (B n,)
                if len(of_class):
                    references.copy_(kmeans_centres(of_class, len(references)))
        self.references.copy_(from_rank_0(self.reference_norm * _unit(placed)))
        self.placed.copy_(self.references)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Is the plan flat? From the last training forward; empty if there was none.

        kept_variance: Var(o) / Var(q) over tokens (1 keeps all, 0 is a flat plan). tokens_per_reference: exp of the
        entropy of a column, mean (n is flat). marginal_error: largest relative error of a row sum.
        duplicate_references: references with another one at cosine above 0.95. reference_drift: 1 - mean cosine to where the
        references were last placed: do they learn at all?
        """
        if self.last is None:
            return {}
        q, columns, o, counts, received = self.last
        n, p = counts.sum(1, keepdim=True), columns.shape[2]  # (B, 1), tokens of an image
        row_sums = (columns * received[:, None]).sum(2)  # (B, rows), tends to p counts / n
        error = (row_sums * n / (p * counts) - 1).abs() * (counts > 0.5)  # of rows that have tokens
        entropy = -(columns * (columns / counts[:, :, None]).clamp_min(1e-30).log()).sum(1)  # (B, p), over single tokens
        unit = self._directions(self.references)
        moved = (r.detach().cpu().double() for r in (self.references, self.placed))  # the floor of _unit alone is 1e-6 here
        alike = (unit @ unit.T).fill_diagonal_(-1) > 0.95  # (p, p)
        return {
            "kept_variance": float((_variance(o, counts / n) / _variance(q, counts / n).clamp_min(1e-30)).mean()),
            "tokens_per_reference": float(entropy.exp().mean()),
            "marginal_error": float(error.amax()),
            "duplicate_references": float(alike.any(1).sum()),
            "reference_drift": float(1 - torch.nn.functional.cosine_similarity(*moved).mean()),
        }

    def __getstate__(self):
        return {**self.__dict__, "last": None}  # deepcopy and pickle copy the layer, not its last batch


def merge_tokens(q: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, n, d) of which many are equal, by the K kinds they are of: each kind's token (B, K, d) and count (B, K).

    members (B, n, K) is one-hot. What is then made of the kinds, y (B, K, ?), is spread to the tokens by members @ y. A kind's
    token is the mean over its tokens, so that in the backward each of them gets the mean of their gradients. Counts are never
    quite 0: their logarithm is taken.
    """
    counts = members.sum(1)  # (B, K)
    merged = members.transpose(1, 2) @ q / counts.clamp_min(1)[:, :, None]  # (B, K, d)
    return merged, counts.clamp_min(1e-30)


def _variance(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of rows x (B, n, d) that weigh (B, n), summed over d -> (B,)."""
    mean = weights[:, None] @ x  # (B, 1, d)
    return ((x - mean).square().sum(2) * weights).sum(1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x| over the last axis. The floor of 1e-3 bounds the gradient where a token equals the mean (constant patches)."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()

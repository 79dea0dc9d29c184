"""Tokens are collected by trainable references through a transport plan, and handed back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from nnunet_l2g.layers.distributed import from_rank_0
from nnunet_l2g.layers.kmeans import kmeans_centres
from nnunet_l2g.layers.sinkhorn import check_transport, sinkhorn_potentials


class Alignment(NamedTuple):
    """What one forward did, detached: for logs, figures and tests."""

    queries: torch.Tensor  # (B, n, d)
    columns: torch.Tensor  # A (B, n, p): each column sums to 1, what a reference collects
    output: torch.Tensor  # (B, n, d)


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
        See sinkhorn_potentials.

    Shapes
    ------
    forward: (B, n, d) -> (B, n, d), for any n; float32.

    Raises
    ------
    ValueError
        If dim or num_references is under 1, or eps, iterations, solver are out of range.

    References
    ----------
    .. [1] Mialon et al. A trainable optimal transport embedding for feature aggregation (OTKE). ICLR 2021.
       Its g / sqrt(p) is our g; its own 2D code sets p = n, which ties a network to one patch size.
    """

    diagnostic_keys = ("kept_variance", "tokens_per_reference", "marginal_error", "duplicate_references", "reference_drift")

    def __init__(self, dim: int, num_references: int, eps: float = 0.1, iterations: int = 20, solver: str = "log"):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}, expected at least 1")
        if num_references < 1:
            raise ValueError(f"num_references (p) is {num_references}, expected at least 1")
        check_transport(eps, iterations, solver)
        self.eps, self.iterations, self.solver = eps, iterations, solver
        self.references = nn.Parameter(_unit(torch.randn(num_references, dim)))  # (p, d)
        self.register_buffer("placed", self.references.detach().clone())  # (p, d), where they last started from
        self.last: Alignment | None = None  # set by a training forward

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """S: cosines of centred tokens (B, n, d) with the references -> (B, n, p)."""
        centred = q - q.mean(1, keepdim=True)
        return _unit(centred) @ _unit(self.references).T

    def plan(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """S, A with columns that sum to 1, and A with rows that sum to 1, (B, n, p) each, of tokens (B, n, d)."""
        scores = self.scores(q)  # (B, n, p)
        u, v = sinkhorn_potentials(scores, self.eps, self.iterations, solver=self.solver)
        kernel = scores / self.eps
        # Both normalisations of A = exp(kernel + u + v) are a softmax: the constant potential cancels.
        columns = (kernel + u[:, :, None]).softmax(1)  # (B, n, p), over tokens
        rows = (kernel + v[:, None, :]).softmax(2)  # (B, n, p), over references
        return scores, columns, rows

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        _, columns, rows = self.plan(q)
        collected = columns.transpose(1, 2) @ q  # (B, p, d)
        output = rows @ collected  # (B, n, d)
        self.last = Alignment(q.detach(), columns.detach(), output.detach()) if self.training else None
        return output

    @torch.no_grad()
    def initialise(self, q: torch.Tensor) -> None:
        """Places the references by spherical k-means over centred tokens (B, n, d). Deterministic."""
        directions = _unit(q - q.mean(1, keepdim=True)).flatten(0, 1)  # (B n, d)
        self.references.copy_(from_rank_0(_unit(kmeans_centres(directions, len(self.references)))))
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
        q, columns, o = self.last
        n, p = columns.shape[1:]
        row_sums = columns.sum(2)  # (B, n), tends to p / n
        entropy = -(columns * columns.clamp_min(1e-30).log()).sum(1)  # (B, p)
        unit = _unit(self.references)
        alike = (unit @ unit.T).fill_diagonal_(-1) > 0.95  # (p, p)
        return {
            "kept_variance": float((o.var(1).sum(-1) / q.var(1).sum(-1).clamp_min(1e-30)).mean()),
            "tokens_per_reference": float(entropy.exp().mean()),
            "marginal_error": float((row_sums * (n / p) - 1).abs().amax()),
            "duplicate_references": float(alike.any(1).sum()),
            "reference_drift": float(1 - (unit * _unit(self.placed)).sum(1).mean()),
        }

    def __getstate__(self):
        return {**self.__dict__, "last": None}  # deepcopy and pickle copy the layer, not its last batch


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x| over the last axis. The floor of 1e-3 bounds the gradient where a token equals the mean (constant patches)."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()

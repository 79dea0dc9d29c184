"""Entropic optimal transport between tokens and references, in the log domain."""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

SOLVERS = ("log", "pot")


def sinkhorn_potentials(
    scores: torch.Tensor,
    eps: float,
    iterations: int,
    row_marginal: torch.Tensor | None = None,
    column_marginal: torch.Tensor | None = None,
    solver: str = "log",
    relaxation: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Potentials (u, v) of the plan that maximises :math:`\langle\Pi, S\rangle + \varepsilon H(\Pi)` under its marginals.

    .. math::
        \Pi 1 = a,\; \Pi^T 1 = b,\quad A = p\,\Pi^* = \exp(S/\varepsilon + u + v)

    ``iterations`` times, from u = v = 0:

    .. math::
        u_i = \log(p\,a_i) - \mathrm{LSE}_j(S_{ij}/\varepsilon + v_j),\quad
        v_j = \log(p\,b_j) - \mathrm{LSE}_i(S_{ij}/\varepsilon + u_i)

    Columns of A sum to :math:`p\,b_j` exactly (v is updated last) unless relaxed, rows tend to :math:`p\,a_i`. With
    ``iterations=0`` only v is computed: a softmax over tokens for each reference, in which token i counts :math:`n\,a_i` times.

    With a relaxation :math:`\rho` the column marginal is a wish: :math:`-\rho\,\mathrm{KL}(\Pi^T 1 \,|\, b)` is added to what
    is maximised, and v is multiplied by :math:`\rho / (\rho + \varepsilon)` [3].

    Parameters
    ----------
    scores : (B, n, p) float tensor
        S. Bounded scores (cosines) keep exp safe for eps down to about 0.02.
    eps : float
        Strength of the entropy, in units of the scores.
    iterations : int
        T. The gradient is that of the T unrolled iterations; memory does not grow with T (see _Sinkhorn).
    row_marginal : (n,) or (B, n), optional
        a, positive, sums to 1. Uniform by default.
    column_marginal : (p,) or (B, p), optional
        b, positive, sums to 1. Uniform by default.
    solver : "log" or "pot"
        "log": the loop above, traceable by torch.compile. "pot": the same T iterations by POT's `ot.batch.solve_batch`.
    relaxation : float, optional
        rho, in units of the scores; None keeps the marginal, as an infinite one would. Not with "pot".

    Returns
    -------
    u : (B, n), v : (B, p)

    Raises
    ------
    ValueError
        If the scores are not (B, n, p) with n, p >= 1, or eps, iterations, solver or relaxation are out of range.

    References
    ----------
    .. [1] Cuturi. Sinkhorn distances: lightspeed computation of optimal transport. NeurIPS 2013.
    .. [2] Mialon et al. A trainable optimal transport embedding for feature aggregation (OTKE). ICLR 2021.
    .. [3] Chizat et al. Scaling algorithms for unbalanced optimal transport problems. Math. Comp. 2018.

    Examples
    --------
    >>> u, v = sinkhorn_potentials(torch.randn(2, 50, 8), eps=0.5, iterations=10)
    >>> u.shape, v.shape
    (torch.Size([2, 50]), torch.Size([2, 8]))
    """
    if scores.ndim != 3 or scores.shape[1] < 1 or scores.shape[2] < 1:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}, expected (B, n, p) with at least one token and one reference"
        )
    check_transport(eps, iterations, solver, relaxation)
    n, p = scores.shape[1:]
    if solver == "pot" and iterations > 0:
        return _pot_potentials(scores, eps, iterations, row_marginal, column_marginal)
    kernel = scores / eps  # (B, n, p)
    log_rows = kernel.new_full((1, n), math.log(p / n)) if row_marginal is None else (p * row_marginal).log()
    log_columns = kernel.new_zeros(1, p) if column_marginal is None else (p * column_marginal).log()
    power = 1.0 if relaxation is None else relaxation / (relaxation + eps)
    if iterations == 0:
        u = (log_rows - math.log(p / n)).expand(kernel.shape[:2])  # (B, n), 0 for equal tokens
        return u, power * (log_columns - (kernel + u[:, :, None]).logsumexp(1))
    return _Sinkhorn.apply(kernel, log_rows, log_columns, iterations, power)


class _Sinkhorn(torch.autograd.Function):
    r"""The iterations, with a backward that keeps their potentials, T (n + p) numbers, and not their matrices, T n p of them.

    Each half-iteration is :math:`y = f (\log c - \mathrm{LSE}(K + x))`, f = 1 or a relaxed marginal's power, whose gradient
    is a softmax that its own result normalises: :math:`\partial y_j / \partial K_{ij} = -f \exp(K_{ij} + x_i + y_j / f - \log
    c_j)`. So the backward needs one exp for each half-iteration and no reduction.

    Shapes: kernel (B, n, p), log_rows and log_columns broadcast to (B, n) and (B, p) -> u (B, n), v (B, p).
    """

    @staticmethod
    def forward(ctx, kernel, log_rows, log_columns, iterations, power):
        v = kernel.new_zeros(kernel.shape[0], kernel.shape[2])  # (B, p)
        us, vs = [], [v]
        for _ in range(iterations):
            u = log_rows - (kernel + v[:, None, :]).logsumexp(2)  # (B, n)
            v = power * (log_columns - (kernel + u[:, :, None]).logsumexp(1))  # (B, p)
            us.append(u)
            vs.append(v)
        ctx.save_for_backward(kernel, log_rows, log_columns, torch.stack(us), torch.stack(vs))
        ctx.power = power
        return u, v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_v):
        kernel, log_rows, log_columns, us, vs = ctx.saved_tensors  # us (T, B, n), vs (T + 1, B, p)
        grad_kernel, grad_rows, grad_columns = torch.zeros_like(kernel), torch.zeros_like(us[0]), torch.zeros_like(vs[0])
        for t in reversed(range(len(us))):
            grad_v = ctx.power * grad_v
            shift = vs[t + 1] / ctx.power - log_columns  # (B, p)
            share = (kernel + us[t, :, :, None] + shift[:, None, :]).exp()  # (B, n, p), columns sum to 1
            share = share * grad_v[:, None, :]
            grad_columns, grad_kernel, grad_u = grad_columns + grad_v, grad_kernel - share, grad_u - share.sum(2)
            share = (kernel + vs[t, :, None, :] + (us[t] - log_rows)[:, :, None]).exp()  # (B, n, p), rows sum to 1
            share = share * grad_u[:, :, None]
            grad_rows, grad_kernel, grad_v = grad_rows + grad_u, grad_kernel - share, -share.sum(1)
            grad_u = torch.zeros_like(grad_u)
        return grad_kernel, grad_rows.sum_to_size(log_rows.shape), grad_columns.sum_to_size(log_columns.shape), None, None


def _pot_potentials(scores, eps, iterations, row_marginal, column_marginal):
    from ot.batch import solve_batch  # 0.3 s to import, and only this solver needs it

    batch, n, p = scores.shape
    a = scores.new_full((batch, n), 1 / n) if row_marginal is None else row_marginal.expand(batch, n)
    b = scores.new_full((batch, p), 1 / p) if column_marginal is None else column_marginal.expand(batch, p)
    # tol=0: exactly T iterations. grad="autodiff": POT's default detaches the plan.
    result = solve_batch(-scores, reg=eps, a=a, b=b, max_iter=iterations, tol=0.0, method="log_sinkhorn", grad="autodiff")
    u, v = result.potentials
    return u + math.log(p), v  # A = p Pi


def check_transport(eps: float, iterations: int, solver: str, relaxation: float | None = None) -> None:
    """ValueError that names the argument if one of them cannot be used."""
    if not eps > 0:
        raise ValueError(f"eps is {eps}, expected a positive number (0.1 to 0.5 suits cosine scores)")
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations (T) is {iterations}, expected an integer of 0 or more (0 is a softmax over tokens)")
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {SOLVERS}")
    if relaxation is not None and not 0 < relaxation < math.inf:
        raise ValueError(f"relaxation (rho) is {relaxation}, expected a positive number, or None for fixed column marginals")
    if relaxation is not None and solver == "pot":
        raise ValueError("relaxation with solver 'pot', expected solver 'log': POT's batched solver has fixed marginals only")

"""Entropic optimal transport between tokens and references, by Sinkhorn's iterations."""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

EXPONENT = 30  # up to this |S| / eps, float32 holds exp(S / eps) and all scalings of the rows and columns
SMALLEST = 1e-30  # of a marginal whose logarithm is taken
LOWEST = -1e3  # of a potential


def sinkhorn_potentials(
    kernel: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, iterations: int, bound: float = math.inf
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Potentials (u, v) of the plan that maximises :math:`\langle\Pi, S\rangle + \varepsilon H(\Pi)` under its marginals [1].

    .. math::
        \Pi = \exp(S/\varepsilon + u + v), \quad \Pi 1 = a, \quad \Pi^T 1 = b

    ``iterations`` times, from v = 0:

    .. math::
        u_i = \log a_i - \mathrm{LSE}_j(S_{ij}/\varepsilon + v_j), \quad
        v_j = \log b_j - \mathrm{LSE}_i(S_{ij}/\varepsilon + u_i)

    The columns of the plan sum to b exactly, because v is updated last. The rows tend to a. Where the kernel is known to be
    bounded by 30, the iterations run without logarithms, with the same values and gradients. They scale the rows and columns
    of :math:`K = \exp(S/\varepsilon)` by e^u = a / (K e^v) and e^v = b / (K^T e^u): products of a matrix and a vector.

    Parameters
    ----------
    kernel : (..., n, p) float32 or float64
        S / eps. Leading axes of all three tensors are broadcast against each other.
    rows : (..., n)
        a, 0 or more, with the same sum as b. A row of 0 sends nothing.
    columns : (..., p)
        b, 0 or more.
    iterations : int
        T, at least 1. The gradient is that of the T unrolled iterations.
    bound : float
        What \|S\| / eps cannot exceed, known without looking at the values: 1 / eps for cosines.

    Returns
    -------
    u : (..., n), v : (..., p)

    References
    ----------
    .. [1] Cuturi. Sinkhorn distances: lightspeed computation of optimal transport. NeurIPS 2013.
    """
    if bound <= EXPONENT:
        return _Scalings.apply(kernel, rows, columns, iterations)
    log_rows, log_columns = rows.clamp_min(SMALLEST).log(), columns.clamp_min(SMALLEST).log()
    v = torch.zeros_like(log_columns)  # (..., p)
    for _ in range(iterations):
        u = log_rows - (kernel + v[..., None, :]).logsumexp(-1)  # (..., n)
        v = log_columns - (kernel + u[..., None]).logsumexp(-2)  # (..., p)
    return u, v


class _Scalings(torch.autograd.Function):
    r"""The iterations on K = exp(kernel), for \|kernel\| up to 30. Below, u and v are the scalings e^u and e^v, as rows.

    For the backward, vectors are kept and no matrix. Each half of an iteration, u = a / (K v), adds a matrix of rank 1 to the
    gradient of the kernel, :math:`-K_{ij} x_i v_j` with :math:`x = \bar u / (K v)` and :math:`\bar u` the gradient of log u.
    The sum of all 2 T of them is one product of (n, 2 T) and (2 T, p).
    """

    @staticmethod
    def forward(ctx, kernel, rows, columns, iterations):
        matrix = kernel.exp()  # K (..., n, p)
        transposed = matrix.mT  # a row times a matrix is up to ten times faster on a CPU than a matrix times a column
        a, b = rows[..., None, :], columns[..., None, :]  # (..., 1, n), (..., 1, p)
        v, saved = torch.ones_like(b), []
        for _ in range(iterations):
            per_row = (v @ transposed).reciprocal()  # (..., 1, n)
            u = a * per_row
            per_column = (u @ matrix).reciprocal()  # (..., 1, p)
            saved += [v, per_row, u, per_column]
            v = b * per_column
        ctx.save_for_backward(kernel, rows, columns, *saved)
        # the logarithm of 0, of a row or column that sends nothing, is made finite and stays far below all others
        return u[..., 0, :].log().clamp_min(LOWEST), v[..., 0, :].log().clamp_min(LOWEST)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_v):
        kernel, rows, columns, *saved = ctx.saved_tensors
        matrix = kernel.exp()
        transposed = matrix.mT
        grad_u, grad_v = grad_u[..., None, :], grad_v[..., None, :]  # of log u and log v
        left, right, grads_u, grads_v = [], [], [], []
        for t in range(len(saved) - 4, -1, -4):  # from the last iteration to the first
            v, per_row, u, per_column = saved[t : t + 4]
            y = grad_v * per_column  # (..., 1, p)
            through_v = u * (y @ transposed)
            grads_v.append(grad_v)
            grads_u.append(-through_v if grads_u else grad_u - through_v)  # u of the last iteration is returned
            x = grads_u[-1] * per_row  # (..., 1, n)
            v = v.expand_as(y)
            grad_v = -v * (x @ matrix)
            left += [u, x]
            right += [y, v]
        grad_kernel = -matrix * (torch.cat(left, -2).mT @ torch.cat(right, -2))  # (..., n, p)
        grad_rows, grad_columns = (torch.cat(grads, -2).sum(-2) for grads in (grads_u, grads_v))  # of log a and log b
        grad_rows = torch.where(rows > 0, grad_rows / rows, 0)
        grad_columns = torch.where(columns > 0, grad_columns / columns, 0)
        grads = ((grad_kernel, kernel), (grad_rows, rows), (grad_columns, columns))
        return *(grad.sum_to_size(tensor.shape) for grad, tensor in grads), None

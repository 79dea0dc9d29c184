"""Entropic optimal transport between tokens and references, in the log domain."""

from __future__ import annotations

import torch

SMALLEST = 1e-30  # of a marginal: its logarithm is taken


@torch.no_grad()
def sinkhorn_potentials(
    kernel: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Potentials (u, v) of the plan that maximises :math:`\langle\Pi, S\rangle + \varepsilon H(\Pi)` under its marginals.

    .. math::
        \Pi = \exp(S/\varepsilon + u + v), \quad \Pi 1 = a, \quad \Pi^T 1 = b

    ``iterations`` times, from v = 0:

    .. math::
        u_i = \log a_i - \mathrm{LSE}_j(S_{ij}/\varepsilon + v_j), \quad
        v_j = \log b_j - \mathrm{LSE}_i(S_{ij}/\varepsilon + u_i)

    The columns of the plan sum to b exactly, because v is updated last; the rows tend to a. Without gradient.

    Parameters
    ----------
    kernel : (..., n, p)
        S / eps. Leading axes of all three tensors are broadcast against each other.
    rows : (..., n)
        a, 0 or more, with the same sum as b. A row of 0 sends nothing.
    columns : (..., p)
        b, 0 or more.
    iterations : int
        T, at least 1.

    Returns
    -------
    u : (..., n), v : (..., p)

    Raises
    ------
    ValueError
        If the shapes do not fit each other, n or p is 0, or T is under 1.

    References
    ----------
    .. [1] Cuturi. Sinkhorn distances: lightspeed computation of optimal transport. NeurIPS 2013.

    Examples
    --------
    >>> u, v = sinkhorn_potentials(torch.randn(2, 50, 8), torch.full((50,), 1 / 50), torch.full((8,), 1 / 8), 10)
    >>> u.shape, v.shape
    (torch.Size([2, 50]), torch.Size([2, 8]))
    """
    if kernel.ndim < 2 or 0 in kernel.shape[-2:] or kernel.shape[-2:] != (rows.shape[-1], columns.shape[-1]):
        raise ValueError(
            f"kernel, rows and columns have shapes {tuple(kernel.shape)}, {tuple(rows.shape)}, {tuple(columns.shape)}, "
            "expected (..., n, p), (..., n), (..., p) with n and p of at least 1"
        )
    if iterations < 1:
        raise ValueError(f"iterations (T) is {iterations}, expected at least 1")
    log_rows, log_columns = rows.clamp_min(SMALLEST).log(), columns.clamp_min(SMALLEST).log()
    v = torch.zeros_like(log_columns)  # (..., p)
    for _ in range(iterations):
        u = log_rows - (kernel + v[..., None, :]).logsumexp(-1)  # (..., n)
        v = log_columns - (kernel + u[..., None]).logsumexp(-2)  # (..., p)
    return u, v

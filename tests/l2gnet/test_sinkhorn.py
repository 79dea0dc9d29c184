"""The plan against POT's solvers, and its properties."""

import ot
import pytest
import torch

from nnunet_l2g.architectures.l2gnet.sinkhorn import sinkhorn_potentials

N, P = 30, 6


def problem(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    kernel = (2 * torch.rand(batch, N, P, generator=generator, dtype=torch.float64) - 1) / 0.3
    rows, columns = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in (N, P))
    return kernel, rows / rows.sum(), columns / columns.sum()


def plan(kernel, rows, columns, iterations=300):
    u, v = sinkhorn_potentials(kernel, rows, columns, iterations)
    return (kernel + u[..., None] + v[..., None, :]).exp()


def test_equals_pot():
    kernel, rows, columns = problem()
    for mine, scores in zip(plan(kernel, rows, columns), kernel, strict=True):
        expected = ot.sinkhorn(rows, columns, -scores, 1.0, method="sinkhorn_log", numItermax=2000, stopThr=1e-14)
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_tends_to_the_exact_plan_as_eps_falls():
    kernel, rows, columns = problem(batch=1)
    mine = plan(200 * kernel, rows, columns, 3000)[0]
    exact = ot.emd(rows, columns, -kernel[0])
    assert float((mine * kernel[0]).sum()) == pytest.approx(float((exact * kernel[0]).sum()), abs=1e-3)


def test_columns_are_exact_and_rows_tend_to_theirs():
    kernel, rows, columns = problem()
    for iterations, error in ((1, 1.0), (5, 0.1), (50, 1e-6)):
        found = plan(kernel, rows, columns, iterations)
        torch.testing.assert_close(found.sum(1), columns.expand(2, -1))
        assert float((found.sum(2) / rows - 1).abs().max()) < error


def test_equal_tokens_are_one_token_with_their_weight():
    """The plan over codes is the plan over tokens."""
    kernel, _, columns = problem(batch=1)
    counts = torch.arange(1, N + 1)
    many = kernel.repeat_interleave(counts, 1)
    of_tokens = plan(many, torch.full((many.shape[1],), 1 / many.shape[1], dtype=torch.float64), columns, 7)
    of_codes = plan(kernel, counts / counts.sum().double(), columns, 7)
    merged = torch.stack([part.sum(1) for part in of_tokens.split(counts.tolist(), 1)], 1)
    torch.testing.assert_close(merged, of_codes, rtol=1e-12, atol=1e-15)


def test_closed_form_by_symmetry():
    found = plan(torch.eye(4, dtype=torch.float64) * 3, *[torch.full((4,), 0.25, dtype=torch.float64)] * 2)
    weight = torch.tensor(3.0, dtype=torch.float64).exp()
    torch.testing.assert_close(found.diagonal(dim1=0, dim2=1), (weight / (weight + 3) / 4).expand(4))


def test_a_row_or_column_without_mass_sends_and_receives_nothing():
    kernel, rows, columns = problem()
    rows[3], columns[2] = 0, 0
    found = plan(kernel, rows, columns / columns.sum() * rows.sum())
    assert torch.isfinite(found).all() and float(found[:, 3].max()) < 1e-25 and float(found[:, :, 2].max()) < 1e-25


def test_order_of_tokens_does_not_matter():
    kernel, rows, columns = problem()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plan(kernel[:, order], rows[order], columns, 5), plan(kernel, rows, columns, 5)[:, order])


@pytest.mark.parametrize("shapes", [((2, 0, 3), (0,), (3,)), ((4, 3), (3,), (3,)), ((3,), (3,), (3,))])
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(ValueError, match="kernel, rows and columns have shapes"):
        sinkhorn_potentials(*map(torch.ones, shapes), 3)


def test_no_iteration_is_refused():
    with pytest.raises(ValueError, match=r"\(T\) is 0"):
        sinkhorn_potentials(torch.ones(2, 3), torch.ones(2) / 2, torch.ones(3) / 3, 0)

"""The plan against POT's solvers, its properties, and the two forms of the iterations against each other."""

import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_l2g.architectures.l2gnet.sinkhorn import EXPONENT, sinkhorn_potentials

N, P = 30, 6
FORMS = {"scalings": EXPONENT, "logarithms": math.inf}
both_forms = pytest.mark.parametrize("bound", FORMS.values(), ids=FORMS)


def problem(seed=0, batch=2, scale=1 / 0.3):
    """A kernel within +-scale, and marginals."""
    generator = torch.Generator().manual_seed(seed)
    kernel = (2 * torch.rand(batch, N, P, generator=generator, dtype=torch.float64) - 1) * scale
    rows, columns = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in (N, P))
    return kernel, rows / rows.sum(), columns / columns.sum()


def plan(kernel, rows, columns, iterations=300, bound=math.inf):
    u, v = sinkhorn_potentials(kernel, rows, columns, iterations, bound)
    return (kernel + u[..., None] + v[..., None, :]).exp()


def with_gradients(bound, kernel, rows, columns, iterations=7):
    """u, v and the gradients of a loss that looks at both."""
    leaves = [x.detach().clone().requires_grad_() for x in (kernel, rows, columns)]
    u, v = sinkhorn_potentials(*leaves, iterations, bound)
    loss = (u * torch.linspace(-1, 1, N, dtype=u.dtype)).sum() + (v * torch.linspace(0, 2, P, dtype=v.dtype)).square().sum()
    return u.detach(), v.detach(), *torch.autograd.grad(loss, leaves)


@both_forms
def test_equals_pot(bound):
    kernel, rows, columns = problem()
    for found, scores in zip(plan(kernel, rows, columns, bound=bound), kernel, strict=True):
        expected = ot.sinkhorn(rows, columns, -scores, 1.0, method="sinkhorn_log", numItermax=2000, stopThr=1e-14)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_tends_to_the_exact_plan_as_eps_falls():
    kernel, rows, columns = problem(batch=1)
    found = plan(200 * kernel, rows, columns, 3000)[0]
    exact = ot.emd(rows, columns, -kernel[0])
    assert float((found * kernel[0]).sum()) == pytest.approx(float((exact * kernel[0]).sum()), abs=1e-3)


@both_forms
def test_columns_are_exact_and_rows_tend_to_theirs(bound):
    kernel, rows, columns = problem()
    for iterations, error in ((1, 1.0), (5, 0.1), (50, 1e-6)):
        found = plan(kernel, rows, columns, iterations, bound)
        torch.testing.assert_close(found.sum(1), columns.expand(2, -1))
        assert float((found.sum(2) / rows - 1).abs().max()) < error


@both_forms
def test_equal_tokens_are_one_token_with_their_weight(bound):
    """The plan over codes is the plan over tokens."""
    kernel, _, columns = problem(batch=1)
    counts = torch.arange(1, N + 1)
    many = kernel.repeat_interleave(counts, 1)
    uniform = torch.full((many.shape[1],), 1 / many.shape[1], dtype=torch.float64)
    of_tokens = plan(many, uniform, columns, 7, bound)
    of_codes = plan(kernel, counts / counts.sum().double(), columns, 7, bound)
    merged = torch.stack([part.sum(1) for part in of_tokens.split(counts.tolist(), 1)], 1)
    torch.testing.assert_close(merged, of_codes, rtol=1e-12, atol=1e-15)


def test_closed_form_by_symmetry():
    found = plan(torch.eye(4, dtype=torch.float64) * 3, *[torch.full((4,), 0.25, dtype=torch.float64)] * 2, bound=3)
    weight = torch.tensor(3.0, dtype=torch.float64).exp()
    torch.testing.assert_close(found.diagonal(dim1=0, dim2=1), (weight / (weight + 3) / 4).expand(4))


@both_forms
def test_a_row_or_column_without_mass_sends_and_receives_nothing(bound):
    kernel, rows, columns = problem()
    rows[3], columns[2] = 0, 0
    found = plan(kernel, rows, columns / columns.sum() * rows.sum(), bound=bound)
    assert torch.isfinite(found).all() and float(found[:, 3].max()) < 1e-25 and float(found[:, :, 2].max()) < 1e-25


# ---- the two forms ----


@pytest.mark.parametrize("scale", [1.0, 10.0, EXPONENT])
def test_both_forms_have_the_same_values_and_gradients(scale):
    """Also where marginals and kernel have different leading axes, and where a marginal is 0."""
    kernel, rows, columns = problem(scale=scale)
    for arguments in ((kernel, rows, columns), (kernel[:1], rows.expand(2, -1), columns.expand(3, 2, -1))):
        for one, two in zip(*(with_gradients(bound, *arguments) for bound in FORMS.values()), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    rows[3] = 0
    scalings, logarithms = (with_gradients(bound, kernel, rows, columns)[1:] for bound in FORMS.values())
    for one, two in zip(scalings, logarithms, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [10.0, EXPONENT])
def test_single_precision_is_near_double_precision(scale):
    problem_64 = problem(scale=scale)
    expected = with_gradients(EXPONENT, *problem_64)
    found = with_gradients(EXPONENT, *(x.float() for x in problem_64))
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).abs().max()) < 2e-4 * float(two.abs().max())


def test_gradients_equal_those_of_pots_batched_solver():
    kernel, rows, columns = problem(scale=10.0)
    grads = []
    for pots in (True, False):
        scores = kernel.clone().requires_grad_()
        if pots:
            a, b = rows.expand(2, -1), columns.expand(2, -1)
            found = ot.batch.solve_batch(
                -scores, reg=1.0, a=a, b=b, max_iter=400, tol=0.0, method="log_sinkhorn", grad="autodiff"
            ).plan
        else:
            found = plan(scores, rows, columns, 400, bound=10)
        grads.append(torch.autograd.grad((found * torch.linspace(0, 1, P)).square().sum(), scores)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-10)


def test_without_logarithms_no_matrix_is_kept_for_the_backward():
    kernel, rows, columns = problem()
    kernel.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sinkhorn_potentials(kernel, rows, columns, 20, EXPONENT)
    assert [x.shape for x in kept if x.numel() >= N * P and x.data_ptr() != kernel.data_ptr()] == []


def test_compiled_without_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: sinkhorn_potentials(*x, 5, EXPONENT), backend="aot_eager", fullgraph=True)
    grads = []
    for function in (compiled, lambda *x: sinkhorn_potentials(*x, 5, EXPONENT)):
        kernel, rows, columns = problem()
        u, v = function(kernel.requires_grad_(), rows, columns)
        grads.append(torch.autograd.grad(u.square().sum() + v.sum(), kernel)[0])
    torch.testing.assert_close(*grads)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300), p=st.integers(1, 70), scale=st.sampled_from([1e-3, 1.0, 29.9, 30.1, 1e4, 1e7]),
    iterations=st.integers(1, 20), zeros=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_single_precision_is_finite_and_moves_all_mass_at_any_size_and_scale(n, p, scale, iterations, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    kernel = scale * (2 * torch.randint(0, 2, (2, n, p), generator=generator) - 1).float()  # at both ends of its range
    rows = torch.rand(n, generator=generator) + 1e-3
    rows[1:] *= not zeros
    rows = rows / rows.sum()
    u, v = sinkhorn_potentials(kernel, rows, torch.full((p,), 1 / p), iterations, bound=scale)
    assert torch.isfinite(u).all() and torch.isfinite(v).all()
    found = p * (kernel.double() + u.double()[..., None] + v.double()[:, None]).exp()
    # float32 resolves a potential to 2^-24 of the kernel's range
    tolerance = 1e-4 + 4e-7 * scale
    if tolerance < 0.1:
        torch.testing.assert_close(found.sum(1), torch.ones(2, p).double(), rtol=tolerance, atol=tolerance)

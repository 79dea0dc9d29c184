"""Sinkhorn against POT and geomloss, and against what a transport plan has to be."""

import math

import geomloss
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_l2g.layers import sinkhorn_potentials


def plan(scores, eps, iterations, **kwargs):
    """A = p Pi from the potentials."""
    u, v = sinkhorn_potentials(scores, eps, iterations, **kwargs)
    return (scores / eps + u[:, :, None] + v[:, None, :]).exp()


def random_scores(batch=2, n=13, p=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, p, generator=generator, dtype=dtype)


@pytest.mark.parametrize("iterations", [1, 7])
@pytest.mark.parametrize("marginals", [False, True])
def test_equals_pot_in_values_and_gradients(iterations, marginals):
    scores = random_scores()
    keywords = {}
    if marginals:
        keywords = {
            "row_marginal": torch.linspace(1, 3, 13, dtype=torch.float64) / 26,
            "column_marginal": torch.linspace(1, 2, 5, dtype=torch.float64) / 7.5,
        }
    weights = random_scores(seed=1)
    results = {}
    for solver in ("log", "pot"):
        x = scores.clone().requires_grad_()
        a = plan(x, 0.5, iterations, solver=solver, **keywords)
        (a * weights).sum().backward()
        results[solver] = a.detach(), x.grad
    for ours, theirs in zip(results["log"], results["pot"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_converges_to_pots_exact_fixed_point():
    scores, eps = random_scores(batch=1), 0.5
    expected = ot.sinkhorn(torch.full((13,), 1 / 13), torch.full((5,), 1 / 5), -scores[0], eps, stopThr=1e-10, numItermax=5000)
    torch.testing.assert_close(plan(scores, eps, 300)[0] / 5, expected.to(scores), rtol=1e-6, atol=1e-9)


def test_converges_to_geomloss():
    torch.manual_seed(0)
    tokens, references, eps = torch.randn(13, 3).double(), torch.randn(5, 3).double(), 0.5
    scores = tokens @ references.T
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=1, blur=eps, scaling=0.999, debias=False, potentials=True, cost=lambda x, y: -x @ y.transpose(-1, -2)
    )
    f, g = loss(torch.full((13,), 1 / 13).double(), tokens, torch.full((5,), 1 / 5).double(), references)
    expected = ((f.view(-1, 1) + g.view(1, -1) + scores) / eps).exp() / (13 * 5)
    torch.testing.assert_close(plan(scores[None], eps, 300)[0] / 5, expected, rtol=2e-2, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    p=st.integers(1, 20),
    eps=st.floats(0.05, 2),
    scale=st.floats(0, 1),
    iterations=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_columns_sum_to_one_and_all_mass_is_moved(n, p, eps, scale, iterations, seed):
    a = plan(scale * random_scores(2, n, p, seed, torch.float32).clamp(-1, 1), eps, iterations)
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a.sum(1), torch.ones(2, p), rtol=1e-4, atol=1e-4)
    assert a.sum().item() == pytest.approx(2 * p, rel=1e-4)


def test_rows_converge_to_their_marginal():
    scores = random_scores().clamp(-1, 1)
    errors = [float((plan(scores, 0.5, t).sum(2) * 13 / 5 - 1).abs().max()) for t in (1, 3, 10, 30)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] and errors[3] < 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_permuting_tokens_and_references_permutes_the_plan(seed):
    scores = random_scores(seed=seed)
    rows, columns = torch.randperm(13), torch.randperm(5)
    torch.testing.assert_close(plan(scores[:, rows][:, :, columns], 0.3, 8), plan(scores, 0.3, 8)[:, rows][:, :, columns])


def test_shifting_scores_by_token_or_reference_changes_nothing():
    scores = random_scores()
    shifted = scores + torch.randn(2, 13, 1).double() + torch.randn(2, 1, 5).double()
    torch.testing.assert_close(plan(shifted, 0.5, 60), plan(scores, 0.5, 60), rtol=1e-6, atol=1e-9)


def test_equal_scores_give_the_uniform_plan_and_sharp_ones_a_permutation():
    torch.testing.assert_close(plan(torch.zeros(1, 6, 3), 0.1, 5), torch.full((1, 6, 3), 1 / 6))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(plan(torch.eye(4)[order][None], 0.02, 20), torch.eye(4)[order][None])


def test_zero_iterations_is_a_softmax_over_tokens():
    scores = random_scores()
    torch.testing.assert_close(plan(scores, 0.5, 0), (scores / 0.5).softmax(1))


def test_zero_iterations_count_a_token_as_often_as_it_weighs():
    scores = random_scores(1, 3, 2)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    merged = plan(scores, 0.5, 0, row_marginal=weights)
    apart = plan(scores[:, [0, 0, 1, 2]], 0.5, 0)
    torch.testing.assert_close(merged[:, 0], apart[:, :2].sum(1))
    torch.testing.assert_close(merged[:, 1:], apart[:, 2:])


@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
def test_relaxed_columns_converge_to_pots_unbalanced_plan(rho):
    scores, eps = random_scores(batch=1), 0.5
    b = torch.linspace(1, 2, 5, dtype=torch.float64) / 7.5
    expected = ot.unbalanced.sinkhorn_unbalanced(
        torch.full((13,), 1 / 13).double(), b, -scores[0], eps, (float("inf"), rho), reg_type="entropy",
        stopThr=1e-14, numItermax=20000,
    )  # fmt: skip
    found = plan(scores, eps, 400, column_marginal=b, relaxation=rho)[0] / 5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_relaxation_moves_from_a_wish_to_the_marginal():
    b = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025], dtype=torch.float64)
    far = [
        float((plan(random_scores(), 0.5, 50, column_marginal=b, relaxation=rho).sum(1) / 5 - b).abs().max())
        for rho in (0.01, 1.0, 1e6)
    ]
    assert far[0] > far[1] > far[2] and far[2] < 1e-4 and far[0] > 0.3


def test_gradients_pass_gradcheck():
    scores = random_scores(1, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: plan(s, 0.5, 3), (scores,))


def unrolled(scores, eps, iterations, log_rows, log_columns, power=1.0):
    """The equations, left to autograd."""
    kernel = scores / eps
    v = torch.zeros_like(kernel[:, 0])
    for _ in range(iterations):
        u = log_rows - (kernel + v[:, None, :]).logsumexp(2)
        v = power * (log_columns - (kernel + u[:, :, None]).logsumexp(1))
    return u, v


@pytest.mark.parametrize("relaxation", [None, 0.3])
@pytest.mark.parametrize("each_sample", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_gradients_to_scores_and_marginals_equal_the_unrolled_ones(iterations, each_sample, relaxation):
    """To both potentials, so that every path of the backward counts; marginals of the batch or of each sample."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(2 if each_sample else 1, k, generator=generator).double() + 0.1 for k in (13, 5))
    inputs = [random_scores(), rows / rows.sum(1, True), columns / columns.sum(1, True)]
    gradients = []
    for ours in (True, False):
        scores, a, b = (x.clone().requires_grad_() for x in inputs)
        if ours:
            u, v = sinkhorn_potentials(scores, 0.2, iterations, row_marginal=a, column_marginal=b, relaxation=relaxation)
        else:
            power = 1.0 if relaxation is None else relaxation / (relaxation + 0.2)
            u, v = unrolled(scores, 0.2, iterations, (5 * a).log(), (5 * b).log(), power)
        (u.square().sum() + v.sin().sum()).backward()
        gradients.append((u, v, scores.grad, a.grad, b.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_float32_gradients_equal_the_unrolled_ones_at_the_networks_size():
    scores = torch.nn.functional.normalize(random_scores(2, 280, 64, dtype=torch.float32), dim=2)
    gradients = []
    for solve in (
        lambda s: sinkhorn_potentials(s, 0.1, 20),
        lambda s: unrolled(s, 0.1, 20, math.log(64 / 280), 0.0),
    ):
        leaf = scores.clone().requires_grad_()
        u, v = solve(leaf)
        (leaf / 0.1 + u[:, :, None] + v[:, None]).exp().square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


def test_memory_grows_with_the_potentials_and_not_with_the_matrices_of_the_iterations():
    def saved(iterations):
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: count.append(x.numel()) or x, lambda x: x):
            sinkhorn_potentials(torch.randn(2, 280, 64, requires_grad=True), 0.1, iterations)
        return sum(count)

    assert saved(100) - saved(10) == 90 * 2 * (280 + 64)


def test_extreme_but_bounded_scores_stay_finite_in_float32():
    scores = random_scores(dtype=torch.float32).sign().requires_grad_()
    plan(scores, 0.02, 50).square().sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(scores=torch.zeros(3, 4), eps=1, iterations=1), r"\(3, 4\)"),
        (dict(scores=torch.zeros(1, 4, 0), eps=1, iterations=1), r"\(1, 4, 0\)"),
        (dict(scores=torch.zeros(1, 4, 2), eps=0, iterations=1), "eps is 0"),
        (dict(scores=torch.zeros(1, 4, 2), eps=math.nan, iterations=1), "eps is nan"),
        (dict(scores=torch.zeros(1, 4, 2), eps=1, iterations=-1), r"\(T\) is -1"),
        (dict(scores=torch.zeros(1, 4, 2), eps=1, iterations=1, solver="emd"), "'emd'"),
        (dict(scores=torch.zeros(1, 4, 2), eps=1, iterations=1, relaxation=0.0), r"\(rho\) is 0.0"),
        (dict(scores=torch.zeros(1, 4, 2), eps=1, iterations=1, relaxation=math.inf), r"\(rho\) is inf"),
        (dict(scores=torch.zeros(1, 4, 2), eps=1, iterations=1, relaxation=1.0, solver="pot"), "expected solver 'log'"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        sinkhorn_potentials(**arguments)

"""The alignment against OTKE's identities and a plain loop, and the question whether its plan is flat."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_l2g.layers import TransportAlignment, sinkhorn_potentials
from nnunet_l2g.layers.transport_alignment import merge_tokens

D = 16


def tokens(batch=2, n=40, seed=0):
    return torch.randn(batch, n, D, generator=torch.Generator().manual_seed(seed))


def clustered(n=60, clusters=6, seed=0):
    """Tokens around a few directions, plus a common offset: what a bottleneck gives."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, D, generator=generator) + 2
    return (centres.repeat(n // clusters, 1) + 0.2 * torch.randn(n, D, generator=generator))[None]


def test_equals_the_equations_written_out():
    torch.manual_seed(0)
    layer, q = TransportAlignment(D, 5, eps=0.3, iterations=6).double(), tokens(1, 9).double()
    centred = q[0] - q[0].mean(0)
    cosines = torch.nn.functional.cosine_similarity(centred[:, None], layer.references[None], dim=-1)
    u, v = sinkhorn_potentials(cosines[None], 0.3, 6)
    a = (cosines / 0.3 + u[0][:, None] + v[0][None]).exp()
    g = [sum(a[i, j] * q[0, i] for i in range(9)) / a[:, j].sum() for j in range(5)]
    o = torch.stack([sum(a[i, j] * g[j] for j in range(5)) / a[i].sum() for i in range(9)])
    torch.testing.assert_close(layer(q)[0], o, rtol=1e-5, atol=1e-6)


def test_references_together_collect_the_mean_token():
    """OTKE: the sum of p Pi^T q over references is p times the mean token, once rows have their marginal."""
    layer, q = TransportAlignment(D, 7, iterations=60).double().train(), tokens().double()
    layer(q)
    collected = layer.last.columns.transpose(1, 2) @ q  # (B, p, d)
    torch.testing.assert_close(collected.mean(1), q.mean(1), rtol=1e-4, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 50))
def test_is_equivariant_to_the_order_of_tokens_for_any_number_of_them(seed, n):
    torch.manual_seed(seed)
    layer, q, order = TransportAlignment(D, 4), tokens(1, n, seed), torch.randperm(n)
    torch.testing.assert_close(layer(q[:, order]), layer(q)[:, order], rtol=1e-3, atol=1e-4)


def test_is_invariant_to_the_order_of_references():
    torch.manual_seed(0)
    layer, q = TransportAlignment(D, 4), tokens()
    expected = layer(q)
    layer.references.data = layer.references.data[[2, 0, 3, 1]]
    torch.testing.assert_close(layer(q), expected, rtol=1e-4, atol=1e-5)


def test_a_sharp_plan_with_one_reference_for_each_token_hands_every_token_back():
    q = torch.eye(D)[None] * 3
    layer = TransportAlignment(D, D, eps=0.02, iterations=50)
    layer.references.data = q[0] - q[0].mean(0)
    torch.testing.assert_close(layer(q), q, rtol=1e-3, atol=1e-3)


def test_pot_and_log_solvers_agree_in_values_and_gradients():
    results = []
    for solver in ("log", "pot"):
        torch.manual_seed(0)
        layer, q = TransportAlignment(D, 5, solver=solver).double(), tokens().double().requires_grad_()
        layer(q).square().sum().backward()
        results.append((q.grad, layer.references.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_softmax_twin_lets_references_starve_and_transport_does_not():
    """The paper's argument: marginals couple all references."""
    q = clustered()
    layer, twin = TransportAlignment(D, 6, iterations=20).train(), TransportAlignment(D, 6, iterations=0).train()
    references = (q - q.mean(1, keepdim=True))[0, 0] + 0.05 * torch.randn(6, D)  # all of them near one cluster
    for each in (layer, twin):
        each.references.data.copy_(references)
        each(q)
    received = [each.last.columns.sum(2) for each in (layer, twin)]  # (1, n), p / n if every token sends the same
    spread = [float(r.max() / r.min().clamp_min(1e-12)) for r in received]
    assert spread[0] < 1.5 and spread[1] > 100


def test_plan_is_flat_without_centring_and_placed_references_and_not_with_them():
    """methods: cosines between random directions are about d^-1/2, so the plan is nearly uniform."""
    q = clustered()
    torch.manual_seed(0)
    flat = TransportAlignment(D, 6, eps=1.0).train()
    flat(q)
    sharp = TransportAlignment(D, 6, eps=0.1).train()
    sharp.initialise(q)
    sharp(q)
    assert flat.diagnostics()["kept_variance"] < 0.05
    values = sharp.diagnostics()
    assert values["kept_variance"] > 0.8 and values["tokens_per_reference"] < 15
    assert values["duplicate_references"] == 0 and values["marginal_error"] < 0.2


@pytest.mark.parametrize("norm", [0.1, 0.03])
def test_short_references_make_the_same_plan_and_turn_faster_by_the_norms_square(norm):
    turned, q = [], clustered().double()
    for each in (1.0, norm):
        torch.manual_seed(0)
        layer = TransportAlignment(D, 6, reference_norm=each).double().train()
        start = layer.references.detach().norm(dim=1)
        torch.testing.assert_close(start, torch.full_like(start, each), rtol=1e-4, atol=0)
        layer.initialise(q)
        torch.testing.assert_close(layer.references.detach().norm(dim=1), start, rtol=1e-4, atol=0)
        layer(q)
        assert abs(layer.diagnostics()["reference_drift"]) < 1e-12
        output = layer(q)
        output.square().sum().backward()
        with torch.no_grad():
            layer.references -= 1e-9 * layer.references.grad  # SGD's step, small enough for a tangent to be an angle
        unit, placed = (torch.nn.functional.normalize(r.detach(), dim=1) for r in (layer.references, layer.placed))
        turned.append((output.detach(), (unit - placed).norm(dim=1)))
    torch.testing.assert_close(turned[0][0], turned[1][0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(turned[1][1] * norm**2, turned[0][1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", [0.0, 0.001, 1.5, -0.1])
def test_other_reference_norms_are_refused(norm):
    with pytest.raises(ValueError, match=f"reference_norm is {norm}, expected 0.01 to 1"):
        TransportAlignment(D, 6, reference_norm=norm)


# ---- the plan over codes ----


def coded(codes=7, n=50, seed=0):
    """Tokens that are codes, as float64: q (2, n, D) and which code each is, one-hot (2, n, codes); one code is unused."""
    generator = torch.Generator().manual_seed(seed)
    members = torch.nn.functional.one_hot(torch.randint(codes - 1, (2, n), generator=generator), codes).double()
    return members @ torch.randn(codes, D, generator=generator, dtype=torch.float64), members


@pytest.mark.parametrize("iterations", [0, 3, 20])
@pytest.mark.parametrize("marginal", [None, torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)])
def test_a_plan_over_codes_is_the_plan_over_tokens(iterations, marginal):
    torch.manual_seed(0)
    layer, (q, members) = TransportAlignment(D, 4, iterations=iterations).double().train(), coded()
    output, collected, row_logits = layer.align(q, None, marginal)
    diagnostics = layer.diagnostics()
    merged_output, merged_collected, merged_logits = layer.align(*merge_tokens(q, members), marginal)
    assert merged_output.shape == (2, 7, D)
    torch.testing.assert_close(members @ merged_output, output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(merged_collected, collected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(members @ merged_logits.softmax(2), row_logits.softmax(2), rtol=1e-10, atol=1e-12)
    assert layer.diagnostics() == pytest.approx(diagnostics, rel=1e-6, abs=1e-9)


def test_gradients_over_codes_are_those_over_tokens_averaged_within_a_code():
    torch.manual_seed(0)
    layer, (q, members), weight = TransportAlignment(D, 4).double(), coded(), torch.randn(2, 50, D).double()
    gradients = []
    for over_codes in (False, True):
        layer.zero_grad()
        x = q.clone().requires_grad_()
        output = members @ layer.align(*merge_tokens(x, members))[0] if over_codes else layer.align(x)[0]
        (output * weight).sum().backward()
        gradients.append((x.grad, layer.references.grad))
    (tokens, references), (codes, other_references) = gradients
    torch.testing.assert_close(other_references, references, rtol=1e-8, atol=1e-10)
    mean = members @ (members.transpose(1, 2) @ tokens / members.sum(1).clamp_min(1)[:, :, None])
    torch.testing.assert_close(codes, mean, rtol=1e-8, atol=1e-10)


def test_marginals_are_kept_and_their_error_is_measured_against_them():
    marginal = torch.tensor([0.7, 0.1, 0.1, 0.1])
    layer = TransportAlignment(D, 4, iterations=100).train()
    layer.align(tokens(), None, marginal)
    torch.testing.assert_close(layer.last.received, (4 * marginal).expand(2, 4))
    assert layer.diagnostics()["marginal_error"] < 1e-3


def test_duplicate_references_are_counted():
    layer = TransportAlignment(D, 4).train()
    layer.references.data[1] = layer.references.data[0]
    layer(tokens())
    assert layer.diagnostics()["duplicate_references"] == 2


def test_drift_is_measured_from_the_last_placement():
    layer = TransportAlignment(D, 4).train()
    layer.initialise(tokens())
    layer(tokens())
    assert layer.diagnostics()["reference_drift"] == pytest.approx(0, abs=1e-5)
    layer.references.data.neg_()
    layer(tokens())
    assert layer.diagnostics()["reference_drift"] == pytest.approx(2, abs=1e-4)


def test_constant_image_has_finite_values_and_gradients():
    layer, q = TransportAlignment(D, 4).train(), torch.ones(1, 20, D).requires_grad_()
    layer(q).square().sum().backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(layer.references.grad).all()
    assert all(value == value for value in layer.diagnostics().values())


def test_eval_and_copies_hold_no_batch():
    layer = TransportAlignment(D, 4).train()
    layer(tokens().requires_grad_())
    assert copy.deepcopy(layer).last is None
    layer.eval()(tokens())
    assert layer.last is None and layer.diagnostics() == {}


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        (dict(dim=0, num_references=4), "dim is 0"),
        (dict(dim=4, num_references=0), r"\(p\) is 0"),
        (dict(dim=4, num_references=4, eps=-1), "eps is -1"),
        (dict(dim=4, num_references=4, iterations=-1), r"\(T\) is -1"),
        (dict(dim=4, num_references=4, solver="x"), "'x'"),
    ],
)
def test_bad_arguments_are_named(keywords, named):
    with pytest.raises(ValueError, match=named):
        TransportAlignment(**keywords)

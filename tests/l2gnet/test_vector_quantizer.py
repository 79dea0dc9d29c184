"""The quantiser against vector-quantize-pytorch, and its codebook's life: k-means start, EMA, restart, DDP."""

import copy

import pytest
import torch
from distributed import run_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import VectorQuantize

from nnunet_l2g.architectures.l2gnet import VectorQuantizer, vector_quantizer
from nnunet_l2g.training.kmeans import kmeans_centres

K, D = 8, 5


def tokens(seed=0, batch=2, n=30):
    return torch.randn(batch, n, D, generator=torch.Generator().manual_seed(seed))


def make(decay=0.99, dead_below=0.05):
    quantizer = VectorQuantizer(K, D).train()
    quantizer.decay, quantizer.dead_below = decay, dead_below
    return quantizer


def make_pair():
    """Our layer and vector-quantize-pytorch's with the same codebook and statistics."""
    ours = make(decay=0.9, dead_below=0.0)
    theirs = VectorQuantize(
        dim=D, codebook_size=K, decay=0.9, commitment_weight=0.25, kmeans_init=False, threshold_ema_dead_code=0
    ).train()
    book = theirs._codebook
    book.embed.data.copy_(ours.codebook[None])
    book.embed_avg.data.copy_(ours.ema_sums[None])
    book.cluster_size.data.copy_(ours.ema_counts[None])
    return ours, theirs


def test_equals_vector_quantize_pytorch_over_several_updates():
    ours, theirs = make_pair()
    for step in range(5):
        h = tokens(step)
        codes = ours(h)
        _, indices, loss = theirs(h)
        assert torch.equal(codes, indices) and torch.equal(ours.pending[1], codes)
        torch.testing.assert_close(ours.commitment(h, codes), loss.sum())
        ours.update()
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], rtol=1e-4, atol=1e-5)


def test_codes_are_the_nearest_in_parts_too(monkeypatch):
    quantizer = VectorQuantizer(K, D)
    h = tokens()
    expected = torch.cdist(h, quantizer.codebook).argmin(-1)
    assert torch.equal(quantizer(h), expected)
    monkeypatch.setattr(vector_quantizer, "PART", 7)
    assert torch.equal(quantizer(h), expected)


def test_commitment_pulls_tokens_to_their_codes():
    quantizer, h = VectorQuantizer(K, D), tokens().requires_grad_()
    codes = quantizer(h)
    quantizer.commitment(h, codes).backward()
    torch.testing.assert_close(h.grad, 0.25 * 2 * (h - quantizer.codebook[codes]).detach() / h.numel())


def test_eval_leaves_no_trace():
    quantizer = make()
    quantizer(tokens())
    before = quantizer.codebook.clone()
    quantizer.eval()(tokens(1))
    assert quantizer.pending is None
    quantizer.update()
    assert torch.equal(quantizer.codebook, before)


def test_initialise_places_every_code_in_use():
    quantizer = make()
    h = tokens()
    quantizer.codebook += 5
    assert len(quantizer(h).unique()) < K
    quantizer.initialise(h)
    assert len(quantizer(h).unique()) == K
    assert float((quantizer.codebook[quantizer(h)] - h).square().mean()) < 0.6


def test_dead_codes_restart_at_tokens():
    quantizer = make(decay=0.5, dead_below=0.3)
    quantizer.codebook[3:] = 1000.0  # far from every token
    quantizer.ema_sums.copy_(quantizer.codebook)
    h = tokens()
    for _ in range(3):
        quantizer(h)
        quantizer.update()
    assert quantizer.codebook.abs().max() < 10
    assert len(quantizer(h).unique()) > 4


def test_diagnostics_count_since_the_last_call():
    quantizer = make(dead_below=0)
    h = quantizer.codebook[[0, 0, 1, 1]][None]
    quantizer(h)
    quantizer.update()
    values = quantizer.diagnostics()
    assert values["codes_used"] == 2 and values["perplexity"] == pytest.approx(2)
    assert quantizer.diagnostics()["codes_used"] == 0


def test_copy_and_state_dict_hold_the_codebook_but_not_the_batch():
    quantizer = make()
    quantizer(tokens().requires_grad_())
    assert copy.deepcopy(quantizer).pending is None
    assert set(quantizer.state_dict()) == {"codebook", "ema_counts", "ema_sums"}


def _updated(rank, halves):
    torch.manual_seed(0)
    quantizer = make(dead_below=0.3)
    torch.manual_seed(rank)  # different restarts on each process, unless they agree on those of rank 0
    quantizer(halves[rank])
    quantizer.update()
    return quantizer.state_dict()


def _placed(rank, parts):
    quantizer = make()
    quantizer.initialise(parts[rank])
    return quantizer.state_dict()


def test_two_processes_with_unequal_batches_start_alike():
    first, second = run_two_processes(_placed, list(tokens(batch=4).split([3, 1])))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert first["ema_counts"].sum().item() == pytest.approx(4 * 30)


def test_two_processes_update_like_one_with_the_whole_batch():
    whole = tokens(batch=4)
    first, second = run_two_processes(_updated, list(whole.chunk(2)))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    torch.manual_seed(0)
    one = make(dead_below=0.0)
    one(whole)
    one.update()
    alive = one.ema_counts > 0.3 * one.ema_counts.mean()
    torch.testing.assert_close(first["ema_sums"][alive], one.ema_sums[alive])
    assert alive.sum() >= K // 2


def test_kmeans_finds_separated_clusters_and_fills_up_with_few_tokens():
    centres = torch.eye(4) * 10
    points = centres.repeat(20, 1) + 0.1 * torch.randn(80, 4)
    found = kmeans_centres(points, 4)
    assert torch.cdist(centres, found).min(1).values.max() < 0.2
    few = kmeans_centres(torch.eye(3), 7)
    assert few.shape == (7, 3) and len(few.unique(dim=0)) == 7
    assert kmeans_centres(torch.zeros(50, 3), 4).abs().max() < 0.1
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        kmeans_centres(torch.full((3, 2), float("nan")), 2)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), n=st.integers(1, 100), k=st.integers(1, 40), d=st.integers(1, 16), magnitude=st.integers(-4, 4),
    constant=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_it_is_finite_at_any_size_and_scale(batch, n, k, d, magnitude, constant, seed):
    """Forward, gradient and several updates of the codebook; with one token repeated too, where all codes but one die."""
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(k, d).train()
    h = 10.0**magnitude * torch.randn(batch, 1 if constant else n, d).expand(batch, n, d).clone()
    for _ in range(4):
        h.requires_grad_()
        loss = quantizer.commitment(h, quantizer(h))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(h.grad).all()
        quantizer.update()
        assert all(torch.isfinite(b).all() for b in quantizer.buffers() if b.is_floating_point())
        nearest = torch.cdist(h.detach(), quantizer.codebook[None].expand(batch, -1, -1)).min(-1).values
        chosen = (h.detach() - quantizer.codebook[quantizer.eval()(h)]).norm(dim=-1)
        quantizer.train()
        torch.testing.assert_close(chosen, nearest, rtol=1e-2, atol=1e-2 * 10.0**magnitude)
        h = h.detach()

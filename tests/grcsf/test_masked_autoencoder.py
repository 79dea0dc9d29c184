"""The masked autoencoder: what it may see, what it predicts, and what its residuals are."""

import math

import pytest
import torch
from torch import nn

from nnunet_l2g.architectures.grcsf.masked_autoencoder import QUARTERS, SETS, MaskedAutoencoder
from nnunet_l2g.architectures.grcsf.patches import patchify, token_grid, unpatchify

torch.set_num_threads(1)
SHAPES = {  # channels, patch, token
    "2d": (1, (16, 24), (4, 4)),
    "2d_3_channels": (3, (16, 16), (4, 8)),
    "3d": (1, (8, 8, 12), (4, 4, 4)),
    "3d_anisotropic_odd": (2, (5, 12, 12), (1, 4, 4)),  # 45 tokens: neither ratio divides them
}


def make(shape="2d", **settings):
    channels, patch, token = SHAPES[shape]
    torch.manual_seed(0)
    sizes = dict(width=16, depth=2, decoder_width=12, decoder_depth=1)
    return MaskedAutoencoder(channels, patch, token, **{**sizes, **settings})


def image(shape="2d", batch=2):
    channels, patch, _ = SHAPES[shape]
    return torch.randn(batch, channels, *patch, generator=torch.Generator().manual_seed(1))


def quarters_of(network, ratio, s):
    """(Q, n) token numbers: the quarters that set s of a ratio sees."""
    together = QUARTERS // SETS[ratio]
    return network.visible_75[s * together : (s + 1) * together]


def predict(network, tokens, ratio, s, masked):
    """Mean and scale (B, 1, m, C T) of masked tokens (1, m) from set s alone."""
    latent = network.encode(tokens, quarters_of(network, ratio, s))
    visible = getattr(network, f"visible_{ratio}")[s : s + 1]
    return latent, *network.predict(latent, tokens, visible, masked)


def change(x, token_size, tokens, by=7.0):
    """x with all voxels of the given tokens changed."""
    chosen = torch.zeros_like(patchify(x, token_size))
    chosen[:, tokens] = by
    return x + unpatchify(chosen, token_size, token_grid(x.shape[2:], token_size))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", SETS)
def test_a_masked_voxel_is_never_seen(shape, ratio):
    """Changed masked voxels leave the visible encoding, and what is predicted for them, as they were."""
    network, x = make(shape).eval(), image(shape)
    for s in range(SETS[ratio]):
        visible = getattr(network, f"visible_{ratio}")[s : s + 1]
        masked = getattr(network, f"masked_{ratio}")[s : s + 1]
        changed = [change(x, network.token_size, chosen[0]) for chosen in (masked, visible)]
        as_it_is, hidden, seen = (predict(network, patchify(y, network.token_size), ratio, s, masked) for y in (x, *changed))
        for before, after, other in zip(as_it_is, hidden, seen, strict=True):
            assert torch.equal(before, after)
            assert not torch.allclose(before, other)  # a visible one is
        assert set(quarters_of(network, ratio, s).flatten().tolist()) == set(visible[0].tolist())


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_plain_loop_over_sets_and_tokens(shape):
    """Each set alone, each token written where it belongs, averaged over the times it was masked."""
    network, x = make(shape).eval(), image(shape)
    tokens = patchify(x, network.token_size)
    with torch.no_grad():
        found = network(x)
        for ratio, sets in SETS.items():
            mean, residual = torch.zeros_like(tokens), torch.zeros_like(tokens)
            for s in range(sets):
                visible = sorted(set(getattr(network, f"visible_{ratio}")[s].tolist()))
                hidden = [n for n in range(tokens.shape[1]) if n not in visible]
                _, mu, scale = predict(network, tokens, ratio, s, torch.tensor([hidden]))
                mean[:, hidden] += mu[:, 0] / (sets - 1)
                residual[:, hidden] += (tokens[:, hidden] - mu[:, 0]) / scale[:, 0] / (sets - 1)
            torch.testing.assert_close(patchify(found[ratio].mean, network.token_size), mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(patchify(found[ratio].residual, network.token_size), residual, rtol=1e-4, atol=1e-4)


class Perfect(MaskedAutoencoder):
    """Knows the image."""

    def predict(self, latent, tokens, visible, masked, *rest):
        return self.truth[:, masked], super().predict(latent, tokens, visible, masked, *rest)[1]


def test_the_residual_is_zero_where_the_reconstruction_is_perfect():
    network, x = make(), image()
    network.__class__ = Perfect
    network.truth = patchify(x, network.token_size)
    for reconstruction in network(x).values():
        torch.testing.assert_close(reconstruction.mean, x)  # a mean of three equal numbers
        assert not reconstruction.residual.any()


def test_the_residual_is_in_units_of_the_expected_error():
    """Scale at its floor everywhere: (x - mean) / min_scale."""
    network, x = make(min_scale=0.5), image()
    nn.init.zeros_(network.head.weight)
    nn.init.constant_(network.head.bias, -40.0)  # the correction too; softplus 0
    for reconstruction in network(x).values():
        torch.testing.assert_close(reconstruction.residual, (x - reconstruction.mean) / 0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_background_continues_what_is_visible(shape):
    """A constant goes on everywhere; a slope is met better than by the mean; what is masked does not enter."""
    network = make(shape)
    channels, patch, token = SHAPES[shape]
    visible = network.visible_50
    constant = patchify(torch.full((1, channels, *patch), 2.5), token)
    torch.testing.assert_close(network.background(constant, visible), constant[:, None].expand(-1, 2, -1, -1))
    slope = torch.linspace(0, 1, patch[-1]).expand(1, channels, *patch)
    tokens = patchify(slope, token)[:, None]  # (1, 1, N, C T)
    error = (network.background(tokens[:, 0], visible) - tokens).abs().mean()
    assert error < 0.7 * (tokens - tokens.mean()).abs().mean()
    hidden = change(slope, token, sorted(set(range(tokens.shape[2])) - set(visible[0].tolist())))
    found = [network.background(patchify(y, token), visible[:1]) for y in (slope, hidden)]
    assert torch.equal(*found)


def test_it_learns_what_can_be_predicted_and_how_well():
    """Stripes with noise on one half of the columns: the mean is learnt, the scale is that of the noise."""
    torch.manual_seed(0)
    network = make(width=16)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    stripes = torch.arange(16)[:, None].remainder(2).float().expand(16, 24)
    noise = torch.zeros(16, 24)
    noise[:, 12:] = 0.5

    def sample(n):
        return (stripes + noise * torch.distributions.Laplace(0.0, 1.0).sample((n, 1, 16, 24)).squeeze(1))[:, None]

    for _ in range(300):
        optimizer.zero_grad()
        loss = network.loss(sample(16))[0]
        loss.backward()
        optimizer.step()
    x = sample(64)
    with torch.no_grad():
        r = network.eval()(x)[50]
    assert (r.mean - stripes).abs().mean() < 0.1
    quiet, noisy = r.residual.abs()[..., :12].mean(), r.residual.abs()[..., 12:].mean()
    assert 0.7 < noisy < 1.3  # E|x - mu| = b for a Laplace distribution: noise does not stand out
    assert quiet < 2.0


def test_every_parameter_gets_a_finite_gradient_from_the_loss():
    network = make("3d_anisotropic_odd")
    network.loss(image("3d_anisotropic_odd"))[0].backward()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_tokens_left_out_do_not_enter_the_loss():
    network, x = make().eval(), image()
    left_out = torch.zeros(2, 1, 16, 24, dtype=torch.bool)
    left_out[:, :, 1, 2] = True  # one voxel of token 0
    results = []
    for y in (x, change(x, (4, 4), [0])):
        torch.manual_seed(3)  # the mask
        results.append([network.loss(y, left_out), network.loss(y)])
    torch.manual_seed(3)
    order = torch.randperm(24)
    if 0 in order[:6]:  # seen at both ratios: it changes what is predicted for others
        pytest.fail("choose another seed: token 0 has to be masked here")
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert not torch.equal(results[0][1][0], results[1][1][0])


def test_all_tokens_left_out_give_a_loss_of_zero():
    assert [float(value) for value in make().loss(image(), torch.ones(2, 1, 16, 24, dtype=torch.bool))] == [0, 0, 0]
    assert float(make().loss(image())[2]) == 1


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_image_is_finite(value):
    network = make()
    x = torch.full((2, 1, 16, 24), value)
    network.loss(x)[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert all(torch.isfinite(part).all() for r in network(x).values() for part in r)


def test_weights_do_not_depend_on_the_patch():
    assert make().state_dict().keys() == make("3d").state_dict().keys()
    assert not any("position" in key or "visible" in key for key in make().state_dict())


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.zeros(1, 2, 16, 24), r"shape \(2, 16, 24\), expected channels and patch \(1, 16, 24\)"),
        (torch.zeros(1, 1, 16, 28), r"shape \(1, 16, 28\), expected channels and patch \(1, 16, 24\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(x, named):
    with pytest.raises(ValueError, match=named):
        make()(x)


def test_half_precision_stays_finite():
    network = make().eval()
    x = 1e4 * image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.isfinite(part).all() for r in network(x).values() for part in r)
        assert math.isfinite(float(network.loss(x)[0]))

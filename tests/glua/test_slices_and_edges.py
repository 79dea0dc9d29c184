"""Slices of patches, and what measures whether edges move: no network."""

import pytest
import torch
from test_translation import noise, phantoms

from nnunet_l2g.architectures.glua.translation import shift_of, structure_loss
from nnunet_l2g.architectures.glua.translation.slices import from_slices, pad, random_choice, to_slices

# slices


def test_slices_there_and_back():
    x = noise(2, 3, 4, 5, 6)
    assert torch.equal(to_slices(x)[4 + 1], x[1, :, 1]) and torch.equal(from_slices(to_slices(x), x.shape), x)
    padded = pad(noise(2, 1, 17, 5))
    assert padded.shape == (2, 1, 20, 16) and torch.equal(padded[..., 5:], padded[..., 4:5].expand(-1, -1, -1, 11))


def test_constant_slices_are_taken_last():
    x = torch.cat([torch.zeros(3, 1, 16, 16), noise(2, 1, 16, 16)])
    for seed in range(20):
        chosen, _ = random_choice(x, 3, (16, 16), torch.Generator().manual_seed(seed))
        assert (chosen.flatten(1).std(1) > 0).tolist() == [True, True, False]


def test_chosen_slices_are_uniform_without_repetition_and_labels_go_along():
    x = torch.arange(8.0).view(2, 1, 4, 1, 1) + torch.arange(24.0).view(1, 1, 1, 1, 24) / 100 + torch.zeros(2, 1, 4, 20, 24)
    generator, seen, lefts = torch.Generator().manual_seed(0), torch.zeros(8), set()
    for _ in range(200):
        chosen, labels = random_choice(x, 2, (16, 16), generator, x.repeat(1, 2, 1, 1, 1))
        assert chosen.shape == (2, 1, 16, 16) and torch.equal(labels[:, :1], chosen)
        numbers = chosen[:, 0, 0, 0].floor().long()
        assert numbers[0] != numbers[1]
        seen[numbers] += 1
        lefts.add(round(float(chosen[0, 0, 0, 0] % 1) * 100))
    assert seen.min() > 30 and lefts == set(range(9))


# edges


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (3, 2), (-5, 4)])
def test_shift_is_found_between_contrasts(shift):
    """The same hearts in two contrasts, own noise each."""
    cine, late = phantoms(range(6), "cine"), phantoms(range(6), "late_enhancement")
    found = shift_of(cine, torch.roll(late, shift, (2, 3)))
    assert (found - torch.tensor(shift, dtype=torch.float32)).abs().max() < 0.35
    stacked = shift_of(cine.transpose(0, 1)[None], torch.roll(late, shift, (2, 3)).transpose(0, 1)[None])
    assert stacked.shape == (1, 2) and (stacked - torch.tensor(shift)).abs().max() < 0.2


def test_half_a_pixel_is_seen():
    cine = phantoms(range(4), "cine")
    half = (cine + torch.roll(cine, 1, 3)) / 2
    assert (shift_of(cine, half) - torch.tensor([0.0, 0.5])).abs().max() < 0.2


def test_shift_of_nothing_is_zero_and_other_shapes_are_refused():
    assert torch.equal(shift_of(torch.ones(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)), torch.zeros(2, 2))
    assert torch.equal(shift_of(torch.ones(1, 1, 16, 16), noise(1, 1, 16, 16)), torch.zeros(1, 2))
    assert shift_of(torch.full((1, 1, 16, 16), torch.nan), noise(1, 1, 16, 16)).isnan().all()
    with pytest.raises(ValueError, match="expected two equal"):
        shift_of(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))


def test_structure_is_blind_to_contrast_and_not_to_place():
    cine, late = phantoms(range(4), "cine"), phantoms(range(4), "late_enhancement")
    assert structure_loss(cine, cine) < 1e-5 and structure_loss(cine, 2 - 3 * cine) < 1e-3
    losses = [float(structure_loss(cine, torch.roll(late, (0, k), (2, 3)))) for k in range(4)]
    assert losses == sorted(losses) and losses[2] > 1.5 * losses[0] and losses[3] < 1
    assert structure_loss(cine, torch.zeros_like(cine)) > 0.99
    assert abs(float(structure_loss(torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)))) < 1e-6
    swapped = torch.cat([cine, late], 1)
    torch.testing.assert_close(structure_loss(swapped, swapped.flip(1)), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_structure_has_a_gradient_against_oracle_and_on_constant_images():
    x = noise(1, 1, 8, 8).double()
    for image in (noise(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)):
        image.requires_grad_(True)
        structure_loss(noise(1, 1, 16, 16, seed=3), image).backward()
        assert torch.isfinite(image.grad).all()
    # one channel: the normalised gradient field of the literature, written plainly
    from nnunet_l2g.architectures.glua.translation.alignment import FLOOR, _gradient

    fields = []
    for image in (x, x.flip(3)):
        dy, dx = _gradient(image.float())
        eta = torch.sqrt(dy**2 + dx**2).mean() + FLOOR
        fields.append(torch.stack([dy, dx]) / torch.sqrt(dy**2 + dx**2 + eta**2))
    a, b = fields
    expected = 1 - 2 * ((a * b).sum(0) ** 2).sum() / ((a * a).sum(0) ** 2 + (b * b).sum(0) ** 2).sum()
    torch.testing.assert_close(structure_loss(x.float(), x.flip(3).float()), expected, atol=1e-5, rtol=1e-5)

"""Tokens of an image: there and back, their positions, the size that a plan gets, and complementary masks of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_l2g.architectures.grcsf.patches import (
    choose_token_size,
    make_partition,
    patchify,
    sincos_positions,
    token_grid,
    unpatchify,
)

sizes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=3)


@settings(deadline=None, max_examples=50)
@given(sizes, st.integers(1, 3))
def test_there_and_back(axes, channels):
    grid, token = zip(*axes, strict=True)
    x = torch.randn(2, channels, *(g * t for g, t in axes))
    tokens = patchify(x, token)
    assert tokens.shape == (2, math.prod(grid), channels * math.prod(token))
    assert torch.equal(unpatchify(tokens, token, grid), x)


def test_a_token_is_a_block_of_voxels_in_row_major_order():
    x = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = patchify(x, (2, 3))
    assert torch.equal(tokens[0, 1], x[0, :, 0:2, 3:6].flatten())
    assert torch.equal(tokens[0, 2], x[0, :, 2:4, 0:3].flatten())


@pytest.mark.parametrize("grid", [(5, 7), (3, 4, 2), (1, 9, 1)])
def test_positions_are_distinct_and_bounded(grid):
    positions = sincos_positions(grid, 16)
    assert positions.shape == (math.prod(grid), 16) and positions.abs().max() <= 1
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 1e-3


def test_too_narrow_positions_are_refused():
    with pytest.raises(ValueError, match="dim is 5, expected at least 6"):
        sincos_positions((2, 2, 2), 5)


@pytest.mark.parametrize(
    ("patch", "spacing", "multiples", "expected"),
    [
        ((768, 1152), (1, 1), (4, 4), (16, 16)),  # fundus photographs
        ((96, 112, 112), (1, 1, 1), (4, 4, 4), (8, 8, 8)),  # brain
        ((40, 56, 40), (1, 1, 1), (4, 4, 4), (8, 8, 8)),  # hippocampus
        ((20, 256, 224), (5, 1.56, 1.56), (2, 4, 4), (4, 16, 16)),  # heart, coarse along the first axis, many tokens
        ((8, 64, 64), (10, 1.8, 1.8), (1, 4, 4), (2, 8, 8)),
        ((32, 32), (1, 1), (4, 4), (8, 8)),  # 16 would leave four tokens
    ],
)
def test_token_size_suits_real_plans(patch, spacing, multiples, expected):
    assert choose_token_size(patch, spacing, multiples) == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(2, 12), st.sampled_from([1, 1, 1, 2.5, 6])), min_size=2, max_size=3))
def test_a_chosen_size_divides_the_patch_and_leaves_enough_tokens(axes):
    """For patches that are multiples of 8, as nnU-Net plans them."""
    patch, spacing = [8 * n for n, _ in axes], [s for _, s in axes]
    token = choose_token_size(patch, spacing, [2] * len(axes))
    assert 8 <= math.prod(token_grid(patch, token)) <= 8192
    assert all(t % 2 == 0 for t in token)


@pytest.mark.parametrize(
    ("patch", "named"),
    [
        ((31, 32, 32), "divides the patch on axis 0: 31 voxels, wanted about 8"),
        ((64, 62), "axis 1: 62 voxels.*such as 64"),
    ],
)
def test_a_patch_no_token_divides_is_refused_with_a_remedy(patch, named):
    with pytest.raises(ValueError, match=named):
        choose_token_size(patch, [1] * len(patch), [4] * len(patch))


def test_a_patch_of_few_tokens_is_refused():
    with pytest.raises(ValueError, match=r"patch \(8, 8\) has only . tokens.*larger patch"):
        choose_token_size((8, 8), (1, 1), (4, 4))


def test_a_shape_that_tokens_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"\(9, 8\) is not divisible by token size \(4, 4\)"):
        patchify(torch.zeros(1, 1, 9, 8), (4, 4))


# ---- complementary masks ----


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 6), st.integers(0, 60), st.integers(0, 1000))
def test_every_token_is_seen_once_and_masked_in_all_other_sets(sets, more, seed):
    tokens = sets + more
    visible, masked, inverse = make_partition(torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)), sets)
    seen = [set(row.tolist()) for row in visible]
    assert set().union(*seen) == set(range(tokens)) and sum(map(len, seen)) == tokens  # disjoint, complete
    for row, hidden in zip(seen, masked, strict=True):
        assert set(hidden.tolist()) == set(range(tokens)) - row  # a repeated token is one of its own set
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert visible.shape == (sets, -(-tokens // sets)) and inverse.shape == (tokens, sets - 1)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 5), st.integers(0, 40))
def test_inverse_finds_each_token_once_in_every_set_that_masks_it(sets, more):
    visible, masked, inverse = make_partition(torch.randperm(sets + more), sets)
    for token, places in enumerate(inverse.tolist()):
        assert all(masked.flatten()[place] == token for place in places)
        rows = {place // masked.shape[1] for place in places}
        assert len(rows) == sets - 1 and all(token not in visible[row].tolist() for row in rows)

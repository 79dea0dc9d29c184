"""Complementary masks partition the grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_l2g.architectures.grcsf.partition import make_partition


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


@pytest.mark.parametrize(("tokens", "sets"), [(3, 4), (5, 1)])
def test_too_few_tokens_or_sets_are_refused(tokens, sets):
    with pytest.raises(ValueError, match=f"cannot split {tokens} tokens into {sets} sets"):
        make_partition(torch.arange(tokens), sets)

"""Sharing out what several ranks hold alike; the rest is tested with real engines in tests/checkpoint."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megamoe.parallel.fragments import _part


@given(st.integers(1, 1 << 20), st.integers(1, 300))
def test_replicas_share_a_tensor_without_gap_or_overlap(numel, count):
    ranges = [_part(numel, index, count) for index in range(count)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == numel
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))


@given(st.integers(1, 1 << 24), st.integers(1, 300))
def test_parts_are_even_but_never_tiny(numel, count):
    sizes = [stop - start for start, stop in (_part(numel, index, count) for index in range(count))]
    written = [size for size in sizes if size]
    assert max(written) <= max(-(-numel // count), 1 << 16)
    assert all(size >= 1 << 16 for size in written[:-1])

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamoe.data.stream import TokenStream
from megamoe.errors import DataError
from tests.data import goldens

streams = st.tuples(st.integers(2, 200), st.integers(1, 7), st.integers(1, 9)).filter(
    lambda case: case[0] // case[1] >= 2
)


@pytest.mark.parametrize("corpus", ["enwik8", "wt103"])
@pytest.mark.parametrize("tag", ["train", "valid", "eval", "eval_test", "train_ext"])
def test_batches_are_those_of_the_published_iterator(corpus: str, tag: str) -> None:
    arrays, description = goldens.read(corpus)
    settings = description["iterators"][tag]
    stream = TokenStream(
        arrays[f"{settings['split']}_ids"],
        batch_size=settings["batch"],
        segment_len=settings["bptt"],
        extended_context=settings["ext_len"],
    )
    lengths = [stream.batch(step).targets_BS.shape[1] for step in range(stream.n_segments)]
    assert lengths == settings["seq_lens"]
    recorded = [int(name.removeprefix(f"{tag}/data")) for name in arrays if name.startswith(f"{tag}/data")]
    assert recorded
    for step in recorded:
        batch = stream.batch(step)
        np.testing.assert_array_equal(batch.input_ids_BS.T, arrays[f"{tag}/data{step}"])
        np.testing.assert_array_equal(batch.targets_BS.T, arrays[f"{tag}/target{step}"])


@given(streams)
def test_rows_are_contiguous_and_complete(case: tuple[int, int, int]) -> None:
    n_tokens, batch_size, segment_len = case
    tokens = np.arange(n_tokens, dtype=np.uint16)
    stream = TokenStream(tokens, batch_size=batch_size, segment_len=segment_len)
    batches = [stream.batch(step) for step in range(stream.n_segments)]
    row_len = n_tokens // batch_size
    rows = torch.arange(batch_size * row_len).view(batch_size, row_len)
    assert torch.equal(torch.cat([batch.input_ids_BS for batch in batches], dim=1), rows[:, :-1])
    assert torch.equal(torch.cat([batch.targets_BS for batch in batches], dim=1), rows[:, 1:])
    assert stream.n_predictions == row_len - 1
    assert [batch.starts_epoch for batch in batches] == [True] + [False] * (stream.n_segments - 1)
    *full, last = (batch.input_ids_BS.shape[1] for batch in batches)
    assert set(full) <= {segment_len}
    assert 1 <= last <= segment_len


@given(streams, st.integers(0, 1000))
def test_a_batch_depends_on_its_step_alone(case: tuple[int, int, int], step: int) -> None:
    n_tokens, batch_size, segment_len = case
    tokens = np.arange(n_tokens)
    worn, fresh = (TokenStream(tokens, batch_size=batch_size, segment_len=segment_len) for _ in range(2))
    for earlier in range(3):
        worn.batch(earlier)
    resumed, expected, epoch_before = (
        worn.batch(step),
        fresh.batch(step),
        fresh.batch(step % fresh.n_segments),
    )
    assert torch.equal(resumed.input_ids_BS, expected.input_ids_BS)
    assert torch.equal(resumed.targets_BS, expected.targets_BS)
    assert torch.equal(expected.input_ids_BS, epoch_before.input_ids_BS)
    assert expected.starts_epoch == (step % fresh.n_segments == 0)


@given(streams, st.data())
def test_rows_of_the_ranks_make_up_the_global_batch(case: tuple[int, int, int], data: st.DataObject) -> None:
    n_tokens, batch_size, segment_len = case
    tokens = np.arange(n_tokens)
    boundary = data.draw(st.integers(0, batch_size))
    step = data.draw(st.integers(0, 50))
    whole = TokenStream(tokens, batch_size=batch_size, segment_len=segment_len).batch(step)
    shards = [
        TokenStream(tokens, batch_size=batch_size, segment_len=segment_len, rows=rows).batch(step)
        for rows in (range(boundary), range(boundary, batch_size))
        if rows
    ]
    assert torch.equal(torch.cat([shard.input_ids_BS for shard in shards]), whole.input_ids_BS)
    assert torch.equal(torch.cat([shard.targets_BS for shard in shards]), whole.targets_BS)
    assert all(shard.starts_epoch == whole.starts_epoch for shard in shards)


def test_batches_are_int64_copies() -> None:
    tokens = np.arange(20, dtype=np.uint8)
    batch = TokenStream(tokens, batch_size=2, segment_len=4).batch(0)
    assert batch.input_ids_BS.dtype == batch.targets_BS.dtype == torch.int64
    batch.input_ids_BS.zero_()
    assert tokens.tolist() == list(range(20))


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(DataError, match=r"batch_size = 11.*20 tokens; stay at or below 10"):
        TokenStream(np.arange(20), batch_size=11, segment_len=4)


@pytest.mark.parametrize("rows", [range(3, 5), range(0), range(-1, 2), range(0, 4, 2)])
def test_rows_outside_the_batch_are_refused(rows: range) -> None:
    with pytest.raises(DataError, match="contiguous part of the 4 rows"):
        TokenStream(np.arange(20), batch_size=4, segment_len=4, rows=rows)

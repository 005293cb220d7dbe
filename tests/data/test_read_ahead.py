"""Batches that are read ahead are those of the stream, whatever is asked for."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe.data.read_ahead import ReadAhead
from megamoe.data.stream import Batch, TokenStream
from megamoe.errors import DataError

CPU = torch.device("cpu")


class Watched(TokenStream):
    """Notes which steps are read and by which thread; step 7 cannot be read."""

    def batch(self, step: int) -> Batch:
        self.read.append((step, threading.current_thread().name))
        if step == 7:
            raise DataError("step 7: lost")
        return super().batch(step)


@pytest.fixture
def stream(tmp_path: Path) -> Watched:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    found = Watched(mapped, batch_size=4, segment_len=30)
    found.read = []
    return found


def assert_same(batch: Batch, expected: Batch) -> None:
    assert torch.equal(batch.input_ids_BS, expected.input_ids_BS)
    assert torch.equal(batch.targets_BS, expected.targets_BS)
    assert batch.starts_epoch == expected.starts_epoch


def test_batches_are_those_of_the_stream_in_any_order(stream: Watched) -> None:
    plain = TokenStream(np.arange(1000, dtype=np.uint16), batch_size=4, segment_len=30)
    ahead = ReadAhead(stream, CPU)
    for step in (0, 1, 2, 8, 9, 10, 3, 3, 0):  # an epoch ends at 9; a resumed run jumps
        assert_same(ahead.batch(step), plain.batch(step))


def test_the_next_batch_is_read_before_it_is_asked_for_and_once(stream: Watched) -> None:
    ahead = ReadAhead(stream, CPU)
    ahead.batch(0)
    deadline = threading.Event()
    while len(stream.read) < 2 and not deadline.wait(0.01):
        pass
    assert [step for step, _ in stream.read] == [0, 1]
    assert all(name.startswith("read-ahead") for _, name in stream.read)
    ahead.batch(1)
    assert [step for step, _ in stream.read][:2] == [0, 1]


def test_an_error_comes_when_its_batch_is_asked_for(stream: Watched) -> None:
    ahead = ReadAhead(stream, CPU)
    ahead.batch(6)
    for _ in range(2):
        with pytest.raises(DataError, match=r"^step 7: lost$"):
            ahead.batch(7)
    assert ahead.batch(8).input_ids_BS.shape == (4, 9)


def test_its_thread_ends_with_it(stream: Watched) -> None:
    before = set(threading.enumerate())
    ahead = ReadAhead(stream, CPU)
    ahead.batch(0)
    (reader,) = set(threading.enumerate()) - before
    del ahead
    gc.collect()
    reader.join(timeout=60)
    assert not reader.is_alive()

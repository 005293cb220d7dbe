"""Domains of a text: where they change, and files that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamoe.config.schema import DataConfig
from megamoe.data.corpus import load_corpus
from megamoe.data.domains import FORMAT, Domains, read_domains
from megamoe.data.stream import TokenStream
from megamoe.errors import DataError

TOKENS = {"train": np.arange(50), "valid": np.arange(10), "test": np.arange(10)}
SPANS = {"train": [[0, 1], [20, 2], [35, 3, 1]], "valid": [[0, 0]], "test": [[0, 2]]}


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_spans_reach_to_the_next(tmp_path: Path) -> None:
    found = read_domains(write(tmp_path / "d.json", {"format": FORMAT, **SPANS}), TOKENS)
    positions = np.array([0, 19, 20, 34, 35, 49])
    assert found["train"].at(positions).tolist() == [[1, 1], [1, 1], [2, 2], [2, 2], [3, 1], [3, 1]]
    assert found["train"].largest == 3
    assert found["valid"].at(np.array([5])).tolist() == [[0, 0]]


def test_a_stream_gives_those_of_the_first_token_of_each_row() -> None:
    domains = Domains(np.array([0, 20, 35]), np.array([[1, 1], [2, 2], [3, 1]]))
    stream = TokenStream(np.arange(50), batch_size=2, segment_len=6, domains=domains)
    seen = []
    for step in range(stream.n_segments):
        batch = stream.batch(step)
        assert batch.domains_B2 is not None
        first = batch.input_ids_BS[:, 0].numpy()
        assert np.array_equal(batch.domains_B2.numpy(), domains.at(first))
        seen.append(batch.domains_B2[:, 0].tolist())
    assert seen == [[1, 2], [1, 2], [1, 3], [1, 3]]
    lower = TokenStream(np.arange(50), batch_size=2, segment_len=6, rows=range(1, 2), domains=domains)
    assert lower.batch(2).domains_B2.tolist() == [[3, 1]]
    assert TokenStream(np.arange(50), batch_size=2, segment_len=6).batch(0).domains_B2 is None


def test_a_corpus_has_them_if_it_is_told(tmp_path: Path) -> None:
    spans = {"train": [[0, 1], [1000, 2]], "valid": [[0, 1]], "test": [[0, 2]]}
    path = write(tmp_path / "d.json", {"format": FORMAT, **spans})
    corpus = load_corpus(DataConfig(dataset="text8", domains=str(path)))
    assert corpus.domains_of("train").at(np.array([999, 1000])).tolist() == [[1, 1], [2, 2]]
    assert load_corpus(DataConfig(dataset="text8")).domains_of("train") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "its format is not"),
        ({"format": "x"}, "its format is not"),
        ({"format": FORMAT}, "train: has no spans"),
        ({"format": FORMAT, **SPANS, "valid": []}, "valid: has no spans"),
        ({"format": FORMAT, **SPANS, "test": [[0]]}, "test: span 0 is [0]; give [start, domain]"),
        ({"format": FORMAT, **SPANS, "test": [[0, True]]}, "test: span 0 is [0, true]"),
        ({"format": FORMAT, **SPANS, "test": [[0, -1]]}, "test: span 0 is [0, -1]; give numbers of 0"),
        ({"format": FORMAT, **SPANS, "test": [[1, 1]]}, "test: starts do not rise from 0"),
        ({"format": FORMAT, **SPANS, "test": [[0, 1], [5, 1], [5, 2]]}, "test: starts do not rise from 0"),
        ({"format": FORMAT, **SPANS, "test": [[0, 1], [10, 2]]}, "test: a span starts at 10, beyond the 10"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, values: Any, message: str) -> None:
    path = write(tmp_path / "d.json", values)
    with pytest.raises(DataError) as error:
        read_domains(path, TOKENS)
    assert str(error.value).startswith(f"data.domains = {str(path)!r}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_domains(tmp_path / "missing.json", TOKENS)

import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.data.sources import (
    bytes_source,
    cut,
    file_source,
    fingerprint,
    next_line_start,
    whole_lines,
    zip_sources,
)
from megamoe.errors import DataError

contents = st.lists(st.binary(max_size=20), min_size=1, max_size=4)


@given(contents, st.data())
def test_cut_takes_a_slice_of_the_sources_laid_end_to_end(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    parts = cut([bytes_source("x", piece) for piece in pieces], start, stop)
    assert b"".join(block for part in parts for block in part.blocks(3)) == whole[start:stop]


@given(contents, st.data())
def test_next_line_start(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    offset = data.draw(st.integers(0, len(whole)))
    starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n")), len(whole)]
    expected = min(start for start in starts if start >= offset)
    assert next_line_start([bytes_source("x", piece) for piece in pieces], offset) == expected


@given(st.lists(st.text("ab\n").map(str.encode)))
def test_whole_lines_end_every_block_at_a_line_end(blocks: list[bytes]) -> None:
    lines = list(whole_lines(blocks))
    whole = b"".join(blocks)
    assert all(block.endswith(b"\n") for block in lines)
    assert b"".join(lines) == (whole if whole.endswith(b"\n") or not whole else whole + b"\n")


def test_zip_members_are_read_in_place_by_their_last_name(tmp_path: Path) -> None:
    path = tmp_path / "corpus.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/text", b"0123456789" * 1000)
        archive.writestr("../../escape", b"x")
    sources = zip_sources(path)
    assert sorted(sources) == ["escape", "text"]
    assert b"".join(sources["text"].part(9_995, 10_000).blocks()) == b"56789"
    # A second pass reads the same again, and nothing was unpacked.
    assert b"".join(sources["text"].blocks(7)) == b"0123456789" * 1000
    assert [file.name for file in tmp_path.rglob("*")] == ["corpus.zip"]


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text", b"0123456789" * 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(DataError, match=r"corpus\.zip.*not a whole zip archive, get a fresh copy"):
        zip_sources(path)
    path.write_bytes(whole[:5000] + b"X" + whole[5001:])
    with pytest.raises(DataError, match=r"corpus\.zip:text: cannot be read, get a fresh copy.*CRC"):
        list(zip_sources(path)["text"].blocks())


def test_a_file_that_shrinks_or_vanishes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"12345")
    source = file_source(path)
    path.write_bytes(b"123")
    with pytest.raises(DataError, match="text: ends 2 bytes early"):
        list(source.blocks())
    path.unlink()
    with pytest.raises(DataError, match="text: cannot be read"):
        list(source.blocks())
    with pytest.raises(DataError, match="No such file"):
        file_source(path)


def test_fingerprint() -> None:
    found = fingerprint("x", [b"ab", b"c"])
    assert (found.name, found.n_bytes, found.md5) == ("x", 3, "900150983cd24fb0d6963f7d28e17f72")
    assert found.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

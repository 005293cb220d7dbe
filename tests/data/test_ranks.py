"""Several ranks make what one process makes, byte for byte, or nothing."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.data.datasets import open_dataset, open_text
from megamoe.data.encoding import encode, train_tokenizer
from megamoe.data.prepare import prepare
from megamoe.data.ranks import ALONE, Ranks
from megamoe.data.sources import bytes_source, lines_that_begin_in
from tests.data.mpi import TOOL, mpirun, on_threads, processes_of, run
from tests.data.test_datasets import RAW, SMALL_ENWIK8, SMALL_WIKITEXT, wikitext_files, write_zip

# Ends of lines in every form, empty lines, letters of one to four bytes, ties in every count.
texts = st.lists(
    st.sampled_from(
        ["a", "b", "é", "漢", "🙂", " ", "\n", "\n\n", "\r\n", "\r", "\u2028", "\x0b", " <eos> "]
    ),
    max_size=60,
).map("".join)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.lists(st.text("ab\n").map(str.encode), max_size=3).map(b"".join), st.data())
def test_ranges_of_a_source_hold_each_line_once(content: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    source = bytes_source("x", content)
    lines = content.splitlines(keepends=True)
    begins = list(accumulate(map(len, lines), initial=0))
    for start, stop in pairwise([0, *cuts, len(content)]):
        if start < stop:
            expected = [line for begin, line in zip(begins, lines, strict=False) if start <= begin < stop]
            assert b"".join(lines_that_begin_in(source, start, stop)) == b"".join(expected)


@settings(max_examples=100)
@given(
    st.lists(texts, min_size=1, max_size=3),
    st.integers(2, 7),
    st.sampled_from(["bytes", "reference_symbols", "words"]),
)
def test_any_number_of_ranks_makes_the_folder_of_one(files: list[str], size: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"file-{i}" for i in range(len(files))]
        for path, text in zip(paths, files, strict=True):
            path.write_bytes(text.encode())
        held_out = folder / "held-out"
        held_out.write_bytes("".join(files).encode() + b"a\n")

        def make(ranks: Ranks) -> None:
            text = open_text(
                [*paths, held_out], "t", valid=[held_out], test=[held_out], by_lines=True, ranks=ranks
            )
            prepare(text, folder / f"by-{ranks.size}", kind)

        make(ALONE)
        on_threads(size, make)
        assert contents(folder / f"by-{size}") == contents(folder / "by-1")


@pytest.mark.parametrize("kind", ["bytes", "reference_symbols", "words"])
def test_archives_are_shared_too(tmp_path: Path, kind: str) -> None:
    dataset, files = (
        (SMALL_WIKITEXT, wikitext_files()) if kind == "words" else (SMALL_ENWIK8, {"enwik8": RAW})
    )
    archive = write_zip(tmp_path / "archive.zip", files)

    def make(ranks: Ranks) -> None:
        prepare(open_dataset(dataset, [archive], ranks=ranks), tmp_path / f"by-{ranks.size}", kind)

    make(ALONE)
    on_threads(3, make)
    assert contents(tmp_path / "by-3") == contents(tmp_path / "by-1")


def test_a_rank_reads_its_share_only(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"".join(b"line %i\n" % i for i in range(100_000)))
    n_bytes = (tmp_path / "text").stat().st_size

    def read(ranks: Ranks) -> tuple[int, int]:
        text = open_text([tmp_path / "text"], "t", by_lines=True, ranks=ranks)
        tokenizer = train_tokenizer("bytes", text)
        return text.n_bytes("train"), sum(len(ids) for ids in encode(text, "train", tokenizer))

    for whole, mine in on_threads(4, read):
        assert whole > 0.89 * n_bytes
        assert abs(mine - whole / 4) <= 1


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files; the first ends without a line end."""
    folder = tmp_path_factory.mktemp("book")
    choice = random.Random(0)
    words = ["a", "b", "The", "the", "é", "漢字", "🙂🙂", "\u2028", "<eos>"]
    for name in ("one.txt", "two.txt"):
        lines = (" ".join(choice.choices(words, k=choice.randrange(12))) for _ in range(3000))
        text = "".join(line + choice.choice(["\n", "\r\n", "\n\n", "\r"]) for line in lines)
        (folder / name).write_bytes(text.encode() + b"end")
    return [folder / "one.txt", folder / "two.txt"]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bytes", "words", "sentencepiece"])
def test_mpirun_makes_the_folder_of_one_process(
    tmp_path: Path, book: list[Path], kind: str, size: int
) -> None:
    arguments = ["text", *book, "--tokenizer", kind]
    if kind == "sentencepiece":
        arguments += ["--vocab-size", "285"]
    alone = run([sys.executable, str(TOOL), *map(str, arguments), "--output", str(tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    result = run(mpirun(size, *arguments, "--output", tmp_path / "ranks"))
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "ranks"]
    # Rank 0 speaks for all, and says the same.
    assert result.stdout == alone.stdout
    assert result.stderr.count("encode train") == 1
    share = f", share 1 of {size}" if size > 1 else ""
    assert f"encode train{share} (" in result.stderr


@pytest.mark.parametrize(
    ("dataset", "kind"), [("enwik8", "reference_symbols"), ("text8", "bytes"), ("wikitext2", "words")]
)
def test_mpirun_prepares_the_bundled_text(tmp_path: Path, dataset: str, kind: str) -> None:
    for name, command in {
        "alone": lambda *arguments: [sys.executable, str(TOOL), *map(str, arguments)],
        "ranks": lambda *arguments: mpirun(2, *arguments),
    }.items():
        arguments = [dataset, "--sample", "--tokenizer", kind, "--output", tmp_path / name]
        assert run(command(*arguments)).returncode == 0
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")


@pytest.mark.parametrize("bad", [0, 2])
def test_a_mistake_of_one_rank_is_one_line_and_exit_code_2(tmp_path: Path, bad: int) -> None:
    lines = [b"good line\n"] * 30_000
    lines[10 + bad * 8_000] = b"\xff\n"
    (tmp_path / "bad.txt").write_bytes(b"".join(lines))
    result = run(
        mpirun(3, "text", tmp_path / "bad.txt", "--tokenizer", "words", "--output", tmp_path / "out")
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: text is not UTF-8")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_a_mistake_of_all_ranks_is_one_line_too(tmp_path: Path, book: list[Path]) -> None:
    (tmp_path / "out").write_text("in use")
    result = run(mpirun(2, "text", *book, "--output", tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.count("exists already; remove it or name another folder") == 1
    result = run(mpirun(2, "enwik9", "--output", tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.count("invalid choice: 'enwik9'") == 1


@pytest.fixture(scope="module")
def long_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_bytes(b"some words of a line that is read for a while\n" * 1_000_000)
    return path


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("launcher", signal.SIGINT),
        ("launcher", signal.SIGTERM),
        ("rank 1", signal.SIGTERM),
        ("rank 1", signal.SIGKILL),
        ("rank 0", signal.SIGKILL),
    ],
)
def test_a_signal_ends_all_ranks_and_leaves_no_folder(
    tmp_path: Path, long_book: Path, whom: str, number: signal.Signals
) -> None:
    # mpirun takes a second to pass a signal on, so the work must last.
    arguments = ["text", *[long_book] * 3, "--tokenizer", "words", "--output", tmp_path / "out"]
    command = mpirun(2, *arguments)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.partial-*/train.bin.00001")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pids = processes_of(process)
        assert sorted(pids) == [0, 1]
        if whom == "launcher":
            process.send_signal(number)
        else:
            os.kill(pids[int(whom[-1])], number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert processes_of(process) == {}
    left = [path.name for path in tmp_path.iterdir()]
    # The folder under its final name never; what rank 0 was filling only if it could not take it away.
    assert "out" not in left
    assert left == [] or (whom, number) == ("rank 0", signal.SIGKILL)


def test_several_processes_without_mpi4py_are_refused(tmp_path: Path, book: list[Path]) -> None:
    (tmp_path / "no" / "mpi4py").mkdir(parents=True)
    (tmp_path / "no" / "mpi4py" / "__init__.py").write_text("raise ImportError('No module named mpi4py')")
    path = {"PYTHONPATH": f"{tmp_path / 'no'}:{TOOL.parents[1]}"}
    result = run(mpirun(2, "text", *book, "--output", tmp_path / "out"), **path)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert "2 processes: mpi4py cannot be loaded (No module named mpi4py); pip install 'megamoe[mpi]'" in (
        result.stderr
    )
    assert not (tmp_path / "out").exists()
    # One process does without it.
    alone = [sys.executable, str(TOOL), "text", *map(str, book), "--output", str(tmp_path / "out")]
    assert run(alone, **path).returncode == 0


def test_processes_that_do_not_find_each_other_are_refused(tmp_path: Path, book: list[Path]) -> None:
    mpirun(2)
    alone = [sys.executable, str(TOOL), "text", *map(str, book), "--output", str(tmp_path / "out")]
    result = run(alone, PMI_SIZE="2", PMI_RANK="0")
    assert result.returncode == 2
    assert "error: 2 processes: mpi4py finds 1; use the mpirun of the MPI that mpi4py loads" in result.stderr
    assert list(tmp_path.iterdir()) == []

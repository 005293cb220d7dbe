"""The command line of tools/prepare_data.py, in processes of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.config.schema import DataConfig
from megamoe.data import load_corpus

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_a_text_becomes_a_folder_that_loads_and_verifies(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    result = run("text", tmp_path / "book.txt", "--output", tmp_path / "out", "--splits", "0.8,0.1,0.1")
    assert result.returncode == 0, result.stderr
    assert "book.txt (true bytes): vocabulary 256, uint8" in result.stdout
    # No terminal, no bar: one line for each pass.
    assert "encode train (7,112 bytes)\n" in result.stderr
    corpus = load_corpus(DataConfig(dataset="text", path=str(tmp_path / "out")))
    assert len(corpus.tokens["train"]) == 7112
    assert run("verify", tmp_path / "out").stdout.startswith(f"{tmp_path}/out: whole and unchanged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["enwik8"], "error: enwik8: no file was given; download http://mattmahoney.net/dc/enwik8.zip\n"),
        (["enwik8", "nowhere"], "error: 'nowhere': cannot be read (No such file or directory)\n"),
        (["wikitext2", "--sample", "x.zip"], "error: --sample: reads the bundled text, so leave out x.zip\n"),
        (
            ["wikitext2", "--sample", "--vocab-size", "9"],
            "error: --vocab-size = 9: is for --tokenizer sentencepiece; leave it out\n",
        ),
        (
            ["wikitext2", "--sample", "--tokenizer", "sentencepiece", "--vocab-size", "1000000000000"],
            "error: --vocab-size = 1000000000000: give 1 to 1,000,000\n",
        ),
        (
            ["text", "a", "--valid", "b", "--test", "c", "--splits", "0.8,0.1,0.1"],
            "error: --splits: has nothing to divide where --valid or --test name files; leave it out\n",
        ),
        (["text", "x" * 300], f"error: {'x' * 300!r}: cannot be read (File name too long)\n"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(*arguments, "--output", tmp_path / "out")
    assert (result.returncode, result.stderr) == (2, message)
    assert list(tmp_path.iterdir()) == []


def test_the_present_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("line\n" * 1000)
    (tmp_path / "here").mkdir()
    result = subprocess.run(
        [sys.executable, TOOL, "text", "../book.txt", "--output", "."],
        capture_output=True, text=True, timeout=120, cwd=tmp_path / "here",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here" / "manifest.json").is_file()


def test_the_tool_does_without_torch() -> None:
    code = "import sys, megamoe.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_unknown_dataset_is_refused() -> None:
    result = run("enwik9", "x")
    assert result.returncode == 2
    assert "enwik9" in result.stderr
    assert "wikitext103" in result.stderr


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_half_written(tmp_path: Path, number: int, exit_code: int) -> None:
    command = [sys.executable, TOOL, "wikitext2", "--sample", "--output", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    # The first pass announces itself once the folder to fill is there.
    assert "count words of train" in process.stderr.readline()
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert list(tmp_path.iterdir()) == []

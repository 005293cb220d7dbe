"""``megamoe generate`` as a user calls it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.cli import main
from tests.cli.conftest import Done
from tests.cli.test_cli import refusal
from tests.environment import environment
from tests.processes import PATIENCE_SECONDS
from tests.serve.models import write_language_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_language_model(folder / "checkpoints/step-000000001")
    return folder


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> Done:
    code = main(["generate", *arguments])
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err)


def test_one_text_follows_its_prompt(run, capsys):
    done = generate(capsys, str(run), "--prompt", "once upon", "--max-new-tokens", "40", "--k", "3")
    assert done.code == 0, done.errors
    assert done.output.startswith("once upon")
    assert done.output.endswith("\n")
    assert len(done.output) == len("once upon") + 40 + len("\n")
    assert done.errors.startswith("40 symbols, ")
    assert done.errors.endswith("k = 3 of 4\n")
    assert generate(capsys, str(run), "--prompt", "once upon", "--max-new-tokens", "40").output != done.output


def test_several_texts_are_those_of_json(run, capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("a long\nstory")
    options = ("--samples", "2", "--seed", "3", "--max-new-tokens", "8")
    words = (str(run), "--prompt", "yes", "--prompt-file", str(file), *options)
    lines = [json.loads(line) for line in generate(capsys, *words, "--json").output.splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        ("yes", 0), ("yes", 1), ("a long\nstory", 0), ("a long\nstory", 1)
    ]  # fmt: skip
    for line in lines:
        assert (line["tokens"], line["k"], line["seed"]) == (8, 2, 3)
        assert len(line["text"]) == 8
        assert line["seconds"] >= 0
        assert line["tokens_per_second"] > 0
    printed = generate(capsys, *words).output
    assert printed == "".join(
        f"--- {number} of 4\n{line['prompt']}{line['text']}\n" for number, line in enumerate(lines, start=1)
    )


def test_a_k_that_is_not_followed_is_told(tmp_path, capsys):
    folder = write_language_model(tmp_path / "best", moe={"layers": "none"})
    done = generate(capsys, str(folder), "--prompt", "a", "--k", "2", "--max-new-tokens", "1")
    assert done.errors.startswith("megamoe: k = 2: this model does not follow it, no experts\n")
    done = generate(capsys, str(folder), "--prompt", "a", "--json", "--max-new-tokens", "1")
    assert json.loads(done.output)["k"] is None
    assert done.errors == ""


def test_ctrl_c_ends_it_with_what_was_written(run):
    command = (sys.executable, "-m", "megamoe", "generate", str(run), "--prompt", "a", "--max-new-tokens")
    process = subprocess.Popen(
        [*command, "1000000"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert begun.startswith(b"a")
    assert rest.endswith(b"\n")
    assert errors.count(b"\n") == 1
    assert b" symbols, " in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt: none is given; give a text to go on with, or --prompt-file FILE"),
        (("--prompt", ""), "prompt = '': holds no symbol; give at least one"),
        (("--prompt", "A"), "prompt = 'A': byte 65: is not among the 32 symbols of this corpus; give"),
        (("--prompt-file", "missing"), "--prompt-file = 'missing': cannot be read (No such file"),
        (("--prompt", "a", "--k", "5"), "k = 5: give a number up to moe.n_experts = 4"),
        (("--prompt", "a", "--temperature", "-1"), "temperature = -1.0: give 0, which takes the most"),
        (("--prompt", "a", "--top-p", "x"), "argument --top-p/--top_p: invalid float value: 'x'"),
        (("--prompt", "a", "moe.top_k=3"), "'moe.top_k=3': unknown argument"),
    ],
)  # fmt: skip
def test_refusals(arguments, message, run, capsys):
    assert refusal(generate(capsys, str(run), *arguments)).startswith(message)


def test_refusal_of_a_folder_without_a_model(tmp_path, capsys):
    done = generate(capsys, str(tmp_path / "none"), "--prompt", "a")
    assert "there is none" in refusal(done)

"""The tool on series of small checkpoints, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as images

from megamoe.analyze.series import open_series
from tests.analyze.models import byte_model, write_bytes, write_run
from tests.checkpoint.small import write_model
from tools import analyze_modularity

REPOSITORY = Path(__file__).parents[2]
FAST = [
    "--window=16", "--samples=20", "--shuffles=10", "--partitions=5", "--draws=2", "--top-share=0.2",
    "--alpha=0.05",
]  # fmt: skip


def run(*arguments):
    return analyze_modularity.main([str(argument) for argument in (*arguments, *FAST)])


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("series") / "run")


@pytest.fixture(scope="module")
def analysis(series, tmp_path_factory):
    output = tmp_path_factory.mktemp("analysis") / "modularity"
    assert run(series, "--output", output, "--untrained", "--functions", "wikitext", "polarity") == 0
    return output


def test_everything_is_written(analysis):
    found = json.loads((analysis / "modularity.json").read_text())
    assert [checkpoint["step"] for checkpoint in found["checkpoints"]] == [0, 1, 2, 3]
    assert found["functions"] == [
        "wikitext/markup",
        "wikitext/numbers",
        "wikitext/prose",
        "polarity/positive",
    ]
    for checkpoint in found["checkpoints"]:
        for of_layers in checkpoint["findings"].values():
            for finding in of_layers:
                assert sum(finding["counts"]) == finding["n_top"] == 6
                assert 0.5 <= finding["best"] <= 1
    for matrix in found["stability"].values():
        assert np.diag(matrix) == pytest.approx(1)
    assert list(found["perturbation"]) == found["functions"]
    text = (analysis / "modularity.md").read_text()
    assert "| wikitext/markup | 0 | " in text
    names = {path.name for path in analysis.iterdir()}
    pictures = {"neurons.png", "experts.png", "settling.png", "disturbed.png"}
    assert names == {"modularity.md", "modularity.json", *pictures}
    for picture in pictures:
        assert f"]({picture})" in text
        assert (images.imread(analysis / picture)[..., :3].min(axis=-1) < 0.7).mean() > 0.003


def test_it_is_a_function_of_its_arguments(series, tmp_path):
    last = series / "checkpoints" / "step-000000003"
    found = []
    for output, seed in (("first", 0), ("again", 0), ("other", 1)):
        assert run(last, "--output", tmp_path / output, "--functions", "wikitext", "--seed", seed) == 0
        values = json.loads((tmp_path / output / "modularity.json").read_text())
        found.append((values["checkpoints"], values["perturbation"]))
    first, again, other = found
    assert first == again
    assert first[0] != other[0] and first[1] != other[1]


def test_one_checkpoint_and_own_labels(series, tmp_path, capsys):
    own = tmp_path / "own.tsv"
    own.write_text("".join(f"{c}\t{c * 20}\n" for c in "ab" * 25))
    output = tmp_path / "out"
    last = series / "checkpoints" / "step-000000003"
    assert run(last, "--output", output, "--mode", "routed", "--labels", own, "--functions") == 0
    found = json.loads((output / "modularity.json").read_text())
    assert found["functions"] == ["own/a"]
    assert found["checkpoints"][0]["findings"]["own/a"][0]["best"] == 1
    assert not (output / "settling.png").exists()
    assert "step 3 (1 of 1): own" in capsys.readouterr().err


def test_the_same_checkpoint_twice_and_in_the_order_of_steps(series):
    folders = [series / "checkpoints" / f"step-00000000{step}" for step in (3, 1, 3)]
    assert [checkpoint.step for checkpoint in open_series(folders).checkpoints] == [1, 3, 3]
    assert [checkpoint.step for checkpoint in open_series([series]).checkpoints] == [1, 2, 3]


def test_the_untrained_model_is_the_one_before_the_first_step(series):
    first = open_series([series], untrained=True).checkpoints[0]
    _, expected = byte_model(noise=0)
    for (name, found), value in zip(first.load().named_parameters(), expected.parameters(), strict=True):
        assert (found == value).all(), name


def corrupt(folder):
    [shard, *_] = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


REFUSED = {
    "missing": (lambda root, _: [root / "nowhere"], "there is none"),
    "corrupt": (lambda root, _: [damaged(root)], "sha256 differs"),
    "torn": (lambda root, _: [torn(root)], "missing"),
    "wider": (
        lambda root, series: [series, write_bytes(root / "wide", model={"d_model": 32})],
        "model.d_model = 32, but 16 in",
    ),
    "seed": (
        lambda root, series: [write_bytes(root / "other", training={"seed": 3}), series],
        "training.seed = ",
    ),
    "no experts": (
        lambda root, _: [write_bytes(root / "none", moe={"layers": "none"})],
        "no layer has experts",
    ),
    "without": (
        lambda root, _: [write_bytes(root / "topk", moe={"router": {"name": "topk"}})],
        "its layers have no experts",
    ),
    "looks ahead": (
        lambda root, _: [write_bytes(root / "ec", moe={"router": {"name": "expert_choice"}})],
        "depend on later tokens",
    ),
    "tokenizer": (lambda root, _: [foreign_tokenizer(root)], "tokenizer has 3 symbols"),
    "window": (
        lambda root, _: [write_bytes(root / "short", model={"segment_len": 8})],
        "give 8 tokens or fewer",
    ),
}  # fmt: skip


def damaged(root):
    folder = write_bytes(root / "damaged")
    corrupt(folder)
    return folder


def torn(root):
    folder = write_run(root / "torn")
    [shard, *_] = (folder / "checkpoints" / "step-000000002").glob("*.safetensors")
    shard.unlink()
    return folder


def foreign_tokenizer(root):
    run, model = byte_model()
    tokenizer = {"kind": "reference_symbols", "symbols": [97, 98, 99]}
    return write_model(root / "foreign", run, model, tokenizer=tokenizer)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_analyzed_is_one_line(case, series, tmp_path, capsys):
    make, problem = REFUSED[case]
    paths = make(tmp_path, series)
    before = sorted(tmp_path.iterdir())
    assert run(*paths, "--output", tmp_path / "out", "--functions", "wikitext") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(told) == 1 and told[0].startswith("error: ") and problem in told[0], told
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_exists_is_refused(series, tmp_path, capsys):
    assert run(series, "--output", tmp_path) == 2
    assert "exists; remove it or choose another name" in capsys.readouterr().err


def test_labels_that_do_not_match(series, tmp_path, capsys):
    own = tmp_path / "own.tsv"
    own.write_text("a\tonly this\nb\tand that\n")
    assert run(series, "--output", tmp_path / "out", "--labels", own) == 2
    assert "own: the texts of class 'a' make 0 samples" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_functions_and_two_of_one_name(series, tmp_path, capsys):
    assert run(series, "--output", tmp_path / "out", "--functions") == 2
    assert "--functions: none is named" in capsys.readouterr().err
    own = tmp_path / "language.tsv"
    own.write_text("a\tone\nb\ttwo\n")
    assert run(series, "--output", tmp_path / "out", "--labels", own) == 2
    assert "two groups of language, polarity, wikitext, language have one name" in capsys.readouterr().err


def test_k_beyond_the_experts(series, tmp_path, capsys):
    assert run(series, "--output", tmp_path / "out", "--k", 5) == 2
    assert "analysis.k = 5: give a number up to moe.n_experts = 4" in capsys.readouterr().err


HELP = """
import sys
from tools import analyze_modularity

try:
    analyze_modularity.main(["--help"])
finally:
    assert "torch" not in sys.modules
"""


def test_help_needs_no_torch_and_names_every_default():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for default in ("128", "dense", "0.01", "0.001", "moe.top_k", "all"):
        assert f"(default: {default})" in " ".join(done.stdout.split())
    assert "examples:" in done.stdout

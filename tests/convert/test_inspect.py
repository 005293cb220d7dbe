import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megamoe.checkpoint import mapped_files
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.convert.differences import differences
from megamoe.convert.listing import norm_of, tree
from megamoe.convert.neutral import open_neutral
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.opening import open_any
from megamoe.convert.soundness import problems
from megamoe.convert.tensors import lazy
from megamoe.errors import CheckpointError
from tests.checkpoint.small import model_of, write_model
from tools import convert_checkpoint, inspect_checkpoint

REPOSITORY = Path(__file__).parents[2]
W_IN = "layers.1.moe.experts.w_in"


@pytest.fixture(scope="module")
def neutral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "best"
    return write_model(folder, *model_of(), tokenizer={"kind": "bytes"})


@pytest.fixture(scope="module")
def kinds(neutral, tmp_path_factory):
    """The same model in every form."""
    root = tmp_path_factory.mktemp("kinds")
    for command, name in (("export", "exported"), ("to-deepspeed", "native"), ("to-reference", "published")):
        assert convert_checkpoint.main([command, str(neutral), str(root / name)]) == 0
    return {
        "neutral checkpoint": neutral,
        "exported model": root / "exported",
        "DeepSpeed checkpoint": root / "native",
        "published model": root / "published",
    }  # fmt: skip


def changed(neutral, folder, change):
    """A copy with some tensors changed; `change(kind, name, values)` gives new values or None."""
    tensors, config, state = open_neutral(neutral)
    new = []
    for tensor in tensors:
        values = change(tensor.kind, tensor.name, tensor.load())
        if values is not None:
            new.append(lazy(tensor.kind, tensor.name, values))
    write_neutral(folder, new, config, state)
    return folder


def test_the_tree_holds_every_tensor_and_sums_its_bytes(neutral):
    opened = open_any(neutral)
    rows = list(tree(opened.tensors, norm_of))
    leaves = [row for row in rows if row.shape is not None]
    assert len(leaves) == len(opened.tensors)
    kinds = [row for row in rows if row.depth == 0]
    assert [row.label for row in kinds] == ["weight", "buffer"]
    assert sum(row.n_bytes for row in kinds) == sum(row.n_bytes for row in leaves)
    [norm] = [row.norm for row in leaves if row.shape == (4, 8, 16) and row.label == "w_in"]
    assert norm == pytest.approx(float(CheckpointReader(neutral).tensor("weight", W_IN).norm()))


def test_layers_are_listed_in_their_order():
    tensors = [lazy("weight", f"layers.{i}.w", torch.zeros(1)) for i in (10, 2, 9)]
    labels = [row.label for row in tree(tensors) if row.label.isdigit()]
    assert labels == ["2", "9", "10"]


@pytest.mark.parametrize(
    "kind", ["neutral checkpoint", "exported model", "DeepSpeed checkpoint", "published model"]
)
def test_every_kind_is_found_sound_and_equal(kinds, neutral, kind):
    opened = open_any(kinds[kind])
    assert opened.kind == kind
    assert list(problems(opened)) == []
    found = list(differences(open_any(neutral).tensors, opened.tensors))
    generated = (
        {"layers.1.moe.router.weight", "layers.1.moe.router.bias"} if kind == "exported model" else set()
    )
    assert {difference.name for difference in found} == generated
    assert all(difference.what == "only in B" for difference in found)


def test_only_headers_are_read_unless_asked(neutral, tmp_path):
    copy = changed(neutral, tmp_path / "best", lambda kind, name, values: values)
    [shard] = copy.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[8 + length :] = b"\xff" * (len(content) - 8 - length)
    shard.write_bytes(content)
    assert len(list(tree(open_any(copy).tensors))) == len(list(tree(open_any(neutral).tensors)))


LIST = """
import sys
from tools import inspect_checkpoint

assert all(inspect_checkpoint.main([path]) == 0 for path in sys.argv[1:])
assert "torch" not in sys.modules
"""


def test_a_listing_needs_no_torch(kinds):
    """Importing it takes longer than the second in which a large checkpoint is to be listed."""
    folders = [kinds[kind] for kind in ("neutral checkpoint", "exported model", "DeepSpeed checkpoint")]
    done = subprocess.run(
        [sys.executable, "-c", LIST, *folders], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("w_in") >= len(folders)


def test_a_large_one_is_opened_once(tmp_path, monkeypatch):
    config, _ = model_of()
    many = [lazy("weight", f"layers.{i}.w{j}", torch.zeros(1)) for i in range(50) for j in range(20)]
    _, _, state = open_neutral(write_model(tmp_path / "a", *model_of()))
    write_neutral(tmp_path / "many", many, config, state)
    opened = []
    monkeypatch.setattr(mapped_files, "safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k))
    assert len(list(tree(open_any(tmp_path / "many").tensors))) == 1000 + 50 + 2
    assert not opened
    assert len(list(tree(open_any(tmp_path / "many").tensors, norm_of))) == 1000 + 50 + 2
    assert len(opened) == 1


def overwrite(name, value):
    def change(_, found, values):
        if found == name:
            values = values.clone()
            values[-1] = value(values) if callable(value) else value
        return values

    return change


def test_problems_are_all_told(neutral, tmp_path):
    def twin(_, name, values):
        if ".experts." in name:
            values = values.clone()
            values[2] = values[0]
        return values

    def lose_an_expert(_, name, values):
        return values[:3] if ".experts." in name else values

    found = list(problems(open_any(changed(neutral, tmp_path / "twin", twin))))
    assert found == ["layers.1.moe: experts 0 and 2 are twins: all their weights are equal"]
    found = list(problems(open_any(changed(neutral, tmp_path / "nan", overwrite(W_IN, float("nan"))))))
    assert found == [f"weight {W_IN}: holds numbers that are not finite"]
    [found] = problems(open_any(changed(neutral, tmp_path / "lost", lose_an_expert)))
    assert "shape [3," in found
    assert "the config's model has shape [4," in found
    missing = changed(neutral, tmp_path / "missing", lambda _, name, v: None if name == W_IN else v)
    assert f"weight {W_IN}: missing, but the config's model has it" in list(problems(open_any(missing)))


def test_a_flipped_bit_is_a_problem(neutral, tmp_path):
    copy = changed(neutral, tmp_path / "best", lambda kind, name, values: values)
    [shard] = copy.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert any("sha256 differs" in problem for problem in problems(open_any(copy)))


def test_differences_are_measured(neutral, tmp_path):
    ours = open_any(neutral).tensors
    bias = "layers.1.moe.experts.b_out"
    moved = [
        replace(t, load=lambda t=t: t_plus(t)) if t.name == W_IN else t for t in ours if t.name != bias
    ] + [lazy("weight", "new", torch.zeros(2))]
    found = {difference.name: difference for difference in differences(ours, moved)}
    assert {name: difference.what for name, difference in found.items()} == {
        W_IN: "values", bias: "only in A", "new": "only in B",
    }  # fmt: skip
    assert found[W_IN].largest == pytest.approx(0.5)
    weight = CheckpointReader(neutral).tensor("weight", W_IN)
    assert found[W_IN].relative == pytest.approx(0.5 / float(weight.norm()), rel=1e-4)


def t_plus(tensor):
    values = open_load(tensor)
    values.view(-1)[3] += 0.5
    return values


def open_load(tensor):
    return tensor.load().clone()


def test_types_and_shapes_are_told_apart():
    a = [lazy("weight", "x", torch.ones(2, 3)), lazy("weight", "y", torch.ones(4))]
    b = [lazy("weight", "x", torch.ones(3, 2)), lazy("weight", "y", torch.ones(4).bfloat16())]
    shape, dtype = differences(a, b)
    assert (shape.what, shape.detail) == ("shape", "[2, 3] and [3, 2]")
    assert (dtype.what, dtype.detail) == ("type", "float32 and bfloat16")


def test_the_bits_count():
    def found(a, b):
        pair = ([lazy("weight", "w", torch.tensor(values))] for values in (a, b))
        return list(differences(*pair))

    nan = float("nan")
    assert found([nan, 1.0], [nan, 1.0]) == []
    assert [d.what for d in found([0.0], [-0.0])] == ["values"]
    (difference,) = found([2**53], [2**53 + 1])
    assert difference.largest == 1


def test_numbers_that_are_not_finite_are_null_in_json(neutral, tmp_path, capsys):
    folder = changed(neutral, tmp_path / "nan", overwrite(W_IN, float("nan")))
    assert inspect_checkpoint.main([str(folder), "--norms", "--json"]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text
    norms = [row["norm"] for row in json.loads(text)["rows"] if row["shape"]]
    assert norms.count(None) == 1 and len(norms) > 10


@pytest.mark.parametrize("options", [["--norms"], ["--depth", "1"], ["--verify"]])
def test_options_without_effect_are_refused(neutral, options, capsys):
    with pytest.raises(SystemExit) as exit_:
        inspect_checkpoint.main(["--diff", str(neutral), str(neutral), *options])
    assert exit_.value.code == 2
    assert f"argument {options[0]}: not with --diff" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 600, "a\nb", "a\x1b[2J", ".".join("a" * 50), ""])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(CheckpointError, match="is no name of a tensor"):
        lazy("weight", name, torch.zeros(1))


def test_a_path_that_cannot_be_looked_at_is_one_error(capsys):
    assert inspect_checkpoint.main(["x" * 300]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_no_checkpoint_is_one_error(tmp_path):
    (tmp_path / "file").write_bytes(b"PK\x03\x04 nothing")
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(CheckpointError):
            open_any(path)


def test_the_tool(neutral, kinds, tmp_path, capsys):
    def run(*arguments):
        code = inspect_checkpoint.main([str(argument) for argument in arguments])
        return code, capsys.readouterr()

    code, told = run(neutral, "--depth", "2")
    assert code == 0
    assert "neutral checkpoint" in told.out
    assert "  layers " in told.out
    assert "norm" not in told.out
    code, told = run(neutral, "--json", "--norms")
    assert {row["label"] for row in json.loads(told.out)["rows"]} >= {"weight", "w_in", "qkv"}
    assert run(neutral, "--verify")[0] == 0
    code, told = run("--diff", neutral, kinds["exported model"])
    assert code == 1
    assert "buffer layers.1.moe.router.weight: only in B" in told.out
    assert run("--diff", neutral, neutral)[0] == 0
    code, told = run("--diff", neutral, neutral, "--json")
    assert json.loads(told.out)["differences"] == []
    bad = changed(neutral, tmp_path / "bad", overwrite(W_IN, float("inf")))
    code, told = run(bad, "--verify")
    assert (code, told.out.strip()) == (1, f"problem: weight {W_IN}: holds numbers that are not finite")
    code, told = run(tmp_path / "missing")
    assert code == 2
    assert told.err.startswith("error: checkpoint ")

import json
import logging
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from megamoe.checkpoint.format import Manifest, Piece, TensorEntry
from megamoe.checkpoint.reader import CheckpointReader, find_latest, locate
from megamoe.checkpoint.shard import write_file
from megamoe.errors import CheckpointError
from megamoe.training.learning_rate import Plateau
from tests.checkpoint.small import some_tensors, write_small, write_step

WEIGHT = ("weight", "layers.0.moe.experts.w_in")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("pristine") / "step-000000001", n_shards=3)


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / pristine.name)


def shard(folder, index=1):
    return folder / f"shard-{index:05d}-of-00003.safetensors"


def test_tensors_come_back_bit_for_bit(pristine):
    reader = CheckpointReader(pristine)
    tensors = some_tensors()
    assert {(kind, name) for kind in reader.manifest.tensors for name in reader.names(kind)} == set(tensors)
    for (kind, name), tensor in tensors.items():
        found = reader.tensor(kind, name)
        assert found.dtype == tensor.dtype
        assert reader.shape(kind, name) == found.shape == tensor.shape
        assert torch.equal(found, tensor)
    reader.verify()


def test_the_schedule_must_be_the_runs(tmp_path):
    saved = {"factor": 0.5, "best": 0.7, "waited": 1}
    folder = write_small(tmp_path / "good", schedule=saved)
    assert CheckpointReader(folder).schedule(Plateau) == Plateau(**saved)
    for name, value, problem in (("extra", 1, "unknown field"), ("waited", "x", "'x': expected int")):
        folder = write_small(tmp_path / name, schedule=saved | {name: value})
        with pytest.raises(CheckpointError, match=rf"{name}': state\.json: schedule\.{name}.*{problem}"):
            CheckpointReader(folder).schedule(Plateau)


@given(st.data())
def test_any_range_is_read_across_pieces(pristine, data):
    reader, values = CheckpointReader(pristine), some_tensors()[WEIGHT].reshape(-1)
    start = data.draw(st.integers(0, values.numel()))
    stop = data.draw(st.integers(start, values.numel()))
    assert torch.equal(reader.read(*WEIGHT, start, stop), values[start:stop])


@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_number_of_shards_leaves_no_trace(tmp_path, n_shards):
    reader = CheckpointReader(write_small(tmp_path / "step-000000001", n_shards=n_shards))
    assert all(torch.equal(reader.tensor(*key), tensor) for key, tensor in some_tensors().items())


def test_shards_are_ordinary_safetensors(pristine):
    entry = Manifest.from_json((pristine / "manifest.json").read_text()).tensors["weight"][WEIGHT[1]]
    parts = []
    for piece in entry.pieces:
        with safe_open(pristine / piece.file, framework="pt") as file:
            parts.append(file.get_tensor(piece.key))
    assert torch.equal(torch.cat(parts).view(entry.shape), some_tensors()[WEIGHT])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 61)])
def test_ranges_outside_are_refused(pristine, start, stop):
    with pytest.raises(CheckpointError, match="not within its 60 elements"):
        CheckpointReader(pristine).read(*WEIGHT, start, stop)


def test_unknown_tensors_are_named(pristine):
    with pytest.raises(CheckpointError, match=r"holds no exp_avg 'output\.bias'"):
        CheckpointReader(pristine).tensor("exp_avg", "output.bias")
    assert CheckpointReader(pristine).names("exp_avg") == [WEIGHT[1]]


@pytest.mark.parametrize(
    "name", ["manifest.json", "config.json", "state.json", "shard-00001-of-00003.safetensors"]
)
def test_a_missing_file_is_noticed_on_opening(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        CheckpointReader(folder)


def test_a_truncated_shard_is_noticed_on_opening(folder):
    shard(folder).write_bytes(shard(folder).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shard-00001-of-00003.safetensors: holds \d+ bytes, not"):
        CheckpointReader(folder)


def test_a_truncated_manifest_is_noticed_on_opening(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=f"{folder.name}': manifest.json: not valid JSON"):
        CheckpointReader(folder)


@pytest.mark.parametrize("position", [-1, 20, 3, 0])
def test_a_flipped_byte_is_found_by_verifying(folder, position):
    content = bytearray(shard(folder).read_bytes())
    content[position] ^= 1
    shard(folder).write_bytes(content)
    reader = CheckpointReader(folder)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        reader.verify()


def test_a_broken_header_is_one_error(folder):
    content = bytearray(shard(folder).read_bytes())
    content[:8] = (2**40).to_bytes(8, "little")
    shard(folder).write_bytes(content)
    with pytest.raises(CheckpointError, match=shard(folder).name):
        CheckpointReader(folder).tensor(*WEIGHT)


TABLE = ("buffer", "layers.0.moe.router.table")


def rewritten(folder, **entry):
    """The same files under a manifest that tells something else about one tensor."""
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    kind, name = TABLE
    old = manifest.tensors[kind][name]
    values = {"shape": old.shape, "dtype": old.dtype, "pieces": old.pieces} | entry
    lie = Manifest(manifest.files, manifest.tensors | {kind: {name: TensorEntry(**values)}})
    (folder / "manifest.json").unlink()
    write_file(folder / "manifest.json", [lie.to_json().encode()])
    return CheckpointReader(folder)


def test_a_wrong_dtype_is_noticed_on_reading(folder):
    with pytest.raises(CheckpointError, match=r"\('I64', \[3\]\), the manifest says \('F64', \[3\]\)"):
        rewritten(folder, dtype="float64").tensor(*TABLE)


def test_a_wrong_length_is_noticed_on_reading(folder):
    pieces = CheckpointReader(folder).manifest.tensors["buffer"][TABLE[1]].pieces
    longer = [Piece(p.file, p.key, p.start + i, p.stop + i + 1) for i, p in enumerate(pieces)]
    reader = rewritten(folder, shape=(12,), pieces=tuple(longer))
    with pytest.raises(CheckpointError, match="manifest says"):
        reader.tensor(*TABLE)


def test_a_key_that_is_not_there_is_named(folder):
    reader = rewritten(folder, shape=(1,), pieces=(Piece(shard(folder).name, "nothing", 0, 1),))
    with pytest.raises(CheckpointError, match="nothing"):
        reader.tensor(*TABLE)


def test_numbers_that_are_not_finite_are_found_by_verifying(tmp_path):
    tensors = some_tensors()
    tensors["weight", "output.bias"][3] = float("inf")
    reader = CheckpointReader(write_small(tmp_path / "step-000000001", tensors))
    with pytest.raises(CheckpointError, match=r"weight output\.bias: holds numbers that are not finite"):
        reader.verify()


def test_state_and_config_are_read_strictly(folder):
    reader = CheckpointReader(folder)
    assert reader.state.step == 1
    assert reader.config.moe.n_experts == 16
    replace_documents(folder, {"state.json": {"step": "x"}, "config.json": {"moe": {"experts": 3}}})
    with pytest.raises(CheckpointError, match="step = 'x': expected int"):
        _ = CheckpointReader(folder).state
    with pytest.raises(CheckpointError, match=r"config.json: moe.experts = 3: unknown key"):
        _ = CheckpointReader(folder).config


def replace_documents(folder, documents):
    """Other documents under a manifest that knows them."""
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    files = dict(manifest.files)
    for name, content in documents.items():
        (folder / name).unlink()
        files[name] = write_file(folder / name, [json.dumps(content).encode()])
    (folder / "manifest.json").write_text(Manifest(files, manifest.tensors).to_json())


@pytest.mark.parametrize("name", ["state.json", "config.json"])
def test_a_changed_document_is_noticed_on_reading(folder, name):
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("1", "2", 1))
    reader = CheckpointReader(folder)
    with pytest.raises(CheckpointError, match=rf"{name}: sha256 differs"):
        getattr(reader, name.removesuffix(".json"))


def test_latest_is_the_newest_complete_one(tmp_path, caplog):
    run = tmp_path / "run"
    newest = write_step(run / "checkpoints", 20)
    older = write_step(run / "checkpoints", 9)
    assert find_latest(run) == find_latest(run / "checkpoints") == newest
    (newest / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_latest(run) == older
    assert "step-000000020" in caplog.text
    assert "skipped" in caplog.text


def test_locate_takes_a_run_a_step_or_best(tmp_path):
    step = write_step(tmp_path / "checkpoints", 3)
    best = write_small(tmp_path / "best")
    assert locate(tmp_path) == locate(step) == locate(str(tmp_path / "checkpoints")) == step
    assert locate(best) == best


def test_a_best_cut_between_its_renames_is_found(tmp_path):
    write_small(tmp_path / "best").rename(tmp_path / ".best.old")
    assert CheckpointReader(locate(tmp_path / "best")).state.step == 1


@pytest.mark.parametrize("name", ["", "missing", "checkpoints"])
def test_where_there_is_none_the_remedy_is_told(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="there is none; give a run folder"):
        locate(tmp_path / name)

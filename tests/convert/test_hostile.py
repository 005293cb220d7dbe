"""Damaged exports, DeepSpeed files and published models: refused with one error, or whole after all.

What changes bytes is caught: by the hashes of an export, by the checksums of a torch file. What lies in a
pickle and makes the checksums right again makes another file; of that only code, time and memory are asked.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.format import MOMENTS
from megamoe.checkpoint.load import load_model, load_tokenizer
from megamoe.convert.from_reference import open_published
from megamoe.convert.model_tensors import require_tensors_of
from megamoe.convert.native_reader import read_model
from megamoe.convert.native_tensors import neutral_tensors, read_config, read_optimizer, read_state
from megamoe.convert.to_deepspeed import NativeWriter
from megamoe.errors import CheckpointError
from megamoe.parallel.placement import saved_buffers
from tests.checkpoint import hostile as folders
from tests.checkpoint.fuzzing import fuzz
from tests.checkpoint.small import model_of, write_small
from tests.convert import hostile as files
from tests.convert.published import FOLDER
from tests.convert.tool import convert

N_GROUPS = 5
Tensors = dict[tuple[str, str], torch.Tensor]

OF_FILES = (
    folders.truncate, folders.flip_bits, folders.append, folders.replace_by_pickle,
    folders.replace_by_other_thing,
)  # fmt: skip
OF_EXPORTS = (
    *OF_FILES, folders.swap_shards, folders.lie_in_header, folders.lie_in_document, folders.break_json,
    files.lie_in_index, files.lie_in_list,
)  # fmt: skip
# What leaves the checksums of members wrong, or breaks the archive.
OF_ARCHIVES = (
    files.damage_bytes, files.damage_bytes, files.lie_in_directory, files.compress, files.zip_bomb,
    files.add_member, files.run_code, files.fill_memory,
)  # fmt: skip
OTHER_FILES = (files.damage_pickle, files.lie_in_pickle)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model exported, as DeepSpeed's files with optimizer shards, and a published model."""
    root = tmp_path_factory.mktemp("forms")
    config, model = model_of()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {("weight", name): values for name, values in weights.items()}
    tensors |= {("exp_avg", name): values / 2 for name, values in weights.items()}
    tensors |= {("exp_avg_sq", name): values.square() for name, values in weights.items()}
    tensors |= {("buffer", name): buffer for name, buffer in saved_buffers(model).items()}
    write_small(root / "neutral", tensors, config=config, tokenizer={"kind": "bytes"})
    convert("export", root / "neutral", root / "exported", "--shard-size", "10KB")
    sizes = ("--world-size", "2", "--ep-size", "2")
    convert("to-deepspeed", root / "neutral", root / "native", "--precision", "bf16", *sizes)
    (root / "published").mkdir()
    shutil.copy(FOLDER / "hyperrouter_tiny" / "model.pt", root / "published" / "model.pt")
    return {name: root / name for name in ("exported", "native", "published")}


def exported(folder: Path) -> Tensors:
    load_tokenizer(folder)
    return {("model", name): values for name, values in load_model(folder).state_dict().items()}


def native(folder: Path) -> Tensors:
    model = read_model(folder)
    config, _ = read_config(model, None), read_state(model)
    tensors = list(neutral_tensors(model, read_optimizer(model)))
    require_tensors_of(config, tensors)
    return {(tensor.kind, tensor.name): tensor.checked() for tensor in tensors}


def published(folder: Path) -> Tensors:
    tensors, config = open_published(folder / "model.pt")
    require_tensors_of(config, tensors)
    return {(tensor.kind, tensor.name): tensor.checked() for tensor in tensors}


READ: dict[str, Callable[[Path], Tensors]] = {"exported": exported, "native": native, "published": published}


def check(read: Callable[[Path], Tensors], expected: Tensors | None) -> Callable[[Path], str]:
    """An outcome for `fuzz`; None for what may be read as another file."""

    def outcome(folder: Path) -> str:
        try:
            found = read(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)
            return "refused"
        if expected is not None:
            assert found.keys() == expected.keys()
            for key, values in found.items():
                assert values.dtype == expected[key].dtype
                assert torch.equal(values, expected[key]), key
        return "whole"

    return outcome


@pytest.mark.parametrize("group", range(N_GROUPS))
@pytest.mark.parametrize("form", READ)
def test_no_damage_is_read(forms: dict[str, Path], tmp_path: Path, form: str, group: int) -> None:
    expected = READ[form](forms[form])
    mutations = OF_EXPORTS if form == "exported" else (*OF_FILES, *OF_ARCHIVES)
    if form == "native":
        mutations = (*mutations, files.exchange_files)
    seeds = range(group, 400, N_GROUPS)
    outcomes = fuzz(forms[form], mutations, seeds, check(READ[form], expected), tmp_path)
    assert outcomes["refused"] > 0.6 * outcomes.total()


@pytest.mark.parametrize("form", ["native", "published"])
def test_other_files_are_read_within_bounds(forms: dict[str, Path], tmp_path: Path, form: str) -> None:
    outcomes = fuzz(forms[form], OTHER_FILES, range(150), check(READ[form], None), tmp_path)
    assert outcomes["refused"] > 0.4 * outcomes.total()


def test_exports_without_hashes_are_read_within_bounds(forms: dict[str, Path], tmp_path: Path) -> None:
    bare = shutil.copytree(forms["exported"], tmp_path / "bare")
    (bare / "SHA256SUMS").unlink()
    mutations = (folders.truncate, folders.flip_bits, folders.append, folders.replace_by_other_thing)
    (tmp_path / "cases").mkdir()
    fuzz(bare, mutations, range(100), check(exported, None), tmp_path / "cases")


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        ({"dp_world_size": 10**9}, "missing zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        ({"num_experts": [1 << 40] * 500}, "missing layer_0_expert_4_mp_rank_00_model_states.pt"),
        ({"num_experts": [2]}, "layer_0_expert_2_mp_rank_00_model_states.pt, .* belong to no expert"),
        ({"buffer_names": [1]}, "not laid out as DeepSpeed's"),
        ({"dp_world_size": [1]}, r"dp_world_size = \[1\]: not a number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_numbers_that_lie_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: dict[str, object], problem: str
) -> None:
    config, model = model_of()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {(kind, name): weights[name].abs() for kind in ("weight", *MOMENTS) for name in weights}
    tensors |= {("buffer", name): buffer for name, buffer in saved_buffers(model).items()}
    write_small(tmp_path / "neutral", tensors, config=config)
    honest = NativeWriter._model_file
    monkeypatch.setattr(NativeWriter, "_model_file", lambda writer: honest(writer) | lie)
    convert("to-deepspeed", tmp_path / "neutral", tmp_path / "native", "--world-size", "2")
    with pytest.raises(CheckpointError, match=problem):
        native(tmp_path / "native")


def test_a_long_latest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "latest").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="is not the name of a folder"):
        read_model(tmp_path)

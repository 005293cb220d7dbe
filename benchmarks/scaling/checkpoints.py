"""Checkpoints of many ranks: who writes what, the manifest, reading on other ranks, which are kept."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.scaling.alone import one_rank_of
from benchmarks.scaling.quantity import Action, Quantity, Sizes
from megamoe.checkpoint.format import CONFIG, STATE, TRAINED, Manifest, shard_file, step_folder
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.retention import prune
from megamoe.checkpoint.shard import Shard, Slice, merge, write_documents, write_shard
from megamoe.checkpoint.state import TrainingState
from megamoe.config import RunConfig
from megamoe.convert.listing import tree
from megamoe.convert.neutral import tensors_of

WIDTH = 4
"""Elements of a rank's piece of each tensor; every rank has one, as at ZeRO stage 3 and of spread experts."""


def quantities(sizes: Sizes) -> Iterator[Quantity]:
    """Everything above, by ranks and tensors."""
    w, n = sizes.n_ranks, sizes.n_tensors
    for name, at in (
        ("rank 0: hear from all ranks what they wrote", _heard),
        ("rank 0: merge what all ranks wrote", _merged),
        ("rank 0: manifest to text", _to_text),
        ("open: manifest, sizes of files", _opened),
        ("read a rank's part on half as many ranks", _resharded),
        ("list", _listed),
    ):
        yield Quantity(name, "checkpoint", "W", sizes.worlds, partial(at, n_tensors=n), {"tensors": n})
        yield Quantity(name, "checkpoint", "tensors", sizes.tensors, partial(at, w), {"W": w})
    yield Quantity("read each expert singly", "checkpoint", "E", sizes.worlds, _expert_by_expert, {})
    yield Quantity("write a rank's shard", "checkpoint", "tensors", sizes.tensors, _written, {})
    name = "rank 0: which checkpoints stay"
    yield Quantity(name, "checkpoint", "kept", sizes.checkpoints, lambda v: _pruned(v, w, n), {"W": w})


def slices_of(rank: int, n_ranks: int, n_tensors: int) -> list[Slice]:
    """A rank's pieces of all tensors, of which each is as large as there are ranks."""
    values = torch.full((WIDTH,), float(rank))
    return [
        Slice(kind, f"layers.{number}.moe.experts.w_in", (n_ranks, WIDTH), rank * WIDTH, values)
        for number in range(n_tensors)
        for kind in TRAINED
    ]


def write_shards(folder: Path, n_ranks: int, n_tensors: int) -> list[Shard]:
    """What all ranks write, one after the other."""
    return [
        write_shard(folder / shard_file(rank, n_ranks), slices_of(rank, n_ranks, n_tensors))
        for rank in range(n_ranks)
    ]


DOCUMENTS = {CONFIG: json.dumps(RunConfig().to_dict()), STATE: TrainingState(step=1).to_json()}


@contextmanager
def _saved(n_ranks: int, n_tensors: int) -> Iterator[tuple[Path, list[Shard]]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / step_folder(1)
        folder.mkdir()
        shards = write_shards(folder, n_ranks, n_tensors)
        write_documents(folder, DOCUMENTS, shards)
        yield folder, shards


@contextmanager
def _heard(n_ranks: int, n_tensors: int) -> Iterator[Action]:
    with _saved(1, n_tensors) as (_, shards), one_rank_of(n_ranks) as world:
        yield lambda: world.gather_on_main(shards)


@contextmanager
def _merged(n_ranks: int, n_tensors: int) -> Iterator[Action]:
    with _saved(n_ranks, n_tensors) as (folder, shards):
        documents = {name: CheckpointReader(folder).manifest.files[name] for name in DOCUMENTS}
        yield lambda: merge(shards, documents)


@contextmanager
def _to_text(n_ranks: int, n_tensors: int) -> Iterator[Action]:
    with _saved(n_ranks, n_tensors) as (folder, _):
        yield CheckpointReader(folder).manifest.to_json


@contextmanager
def _opened(n_ranks: int, n_tensors: int) -> Iterator[Action]:
    with _saved(n_ranks, n_tensors) as (folder, _):
        yield lambda: CheckpointReader(folder)


@contextmanager
def _resharded(n_ranks: int, n_tensors: int) -> Iterator[Action]:
    """The part of rank 1, which begins amid the tensors."""
    with _saved(n_ranks, n_tensors) as (folder, _):
        reader = CheckpointReader(folder)
        start, stop = 2 * WIDTH, 4 * WIDTH

        def read() -> None:
            for kind, name, _ in reader.manifest.entries():
                reader.read(kind, name, start, stop)

        yield read


@contextmanager
def _listed(n_ranks: int, n_tensors: int) -> Iterator[Action]:
    with _saved(n_ranks, n_tensors) as (folder, _):
        reader = CheckpointReader(folder)
        yield lambda: list(tree(tensors_of(reader)))


@contextmanager
def _expert_by_expert(n_experts: int) -> Iterator[Action]:
    """Each lies on a rank of its own."""
    with _saved(n_experts, 1) as (folder, _):
        reader, name = CheckpointReader(folder), "layers.0.moe.experts.w_in"
        into = torch.empty(reader.shape("weight", name)[1:])

        def read() -> None:
            for expert in range(n_experts):
                reader.read_row(name, expert, into)

        yield read


@contextmanager
def _written(n_tensors: int) -> Iterator[Action]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / shard_file(0, 1)

        def write() -> None:
            write_shard(path, slices_of(0, 1, n_tensors))
            path.unlink()

        yield write


@contextmanager
def _pruned(n_kept: int, n_ranks: int, n_tensors: int) -> Iterator[Action]:
    """Nothing is deleted: all but the newest are multiples of what is always kept."""
    with _saved(n_ranks, n_tensors) as (folder, _):
        for step in range(10, 10 * n_kept, 10):
            shutil.copytree(folder, folder.parent / step_folder(step))
        yield lambda: prune(folder.parent, keep_last=1, keep_every=10)


def manifest_bytes_per_piece(n_ranks: int, n_tensors: int) -> float:
    """Bytes of a manifest's text for each piece of each tensor."""
    with _saved(n_ranks, n_tensors) as (folder, _):
        manifest: Manifest = CheckpointReader(folder).manifest
        n_pieces = sum(len(entry.pieces) for _, _, entry in manifest.entries())
        return len(manifest.to_json()) / n_pieces

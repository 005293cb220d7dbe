"""Save a run: every rank writes its own shard, rank 0 the manifest, and one rename makes it a checkpoint."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megamoe.checkpoint.collective import on_all_ranks
from megamoe.checkpoint.folder import clear_leftovers, publish, temporary
from megamoe.checkpoint.format import CONFIG, STATE, shard_file
from megamoe.checkpoint.shard import Shard, Slice, write_documents, write_shard
from megamoe.checkpoint.staging import Staging
from megamoe.checkpoint.state import EngineCounters, TrainingState
from megamoe.config.schema import RunConfig
from megamoe.errors import CheckpointError
from megamoe.parallel.counters import read_counters
from megamoe.parallel.fragments import TrainingEngine, owned_fragments
from megamoe.parallel.launch import World

LOW_PRIORITY = 10
"""Of 0 to 19."""


@dataclass(frozen=True)
class _Save:
    """A state of the run on its way into its folders.

    Attributes:
        copied: this rank's part of the state, which from then on may change.
        shards: what this rank writes, one for each folder.
    """

    folders: tuple[Path, ...]
    documents: dict[str, str]
    copied: Future[list[Slice]]
    shards: Future[list[Shard]]


class CheckpointWriter:
    """Saves a run between optimizer steps. All ranks must make the same calls.

    Threads copy and write this rank's shards and never communicate. In `poll` and `wait` the ranks agree that
    all of them have written, rank 0 completes the folders, and the failure of one is raised on all.

    Args:
        world: the ranks.
        background: return from `save` at once; `wait_for_copy` must precede the next optimizer step. The
            copy is in host memory, which stays allocated between saves. Otherwise `save` returns when the
            checkpoint is complete.
    """

    def __init__(self, world: World, *, background: bool = False) -> None:
        self._world = world
        self._staging = Staging() if background else None
        self._copying = ThreadPoolExecutor(1, "checkpoint-copy")
        self._writing = ThreadPoolExecutor(1, "checkpoint-write", initializer=_yield_cores)
        self._pending: _Save | None = None

    def save(
        self,
        folders: Sequence[Path],
        engine: TrainingEngine,
        state: TrainingState,
        *,
        run: RunConfig,
        memory: Iterable[Slice] = (),
    ) -> list[Path]:
        """Save the present state, after completing the save before.

        Args:
            folders: where, each named by `format.step_folder` or `format.BEST`; replaced if it exists.
            state: of the run; the engine's counters are filled in here.
            run: the run's config with the vocabulary size resolved.
            memory: what `memory_slices` gives for this rank.

        Returns:
            The folders that this call completed.

        Raises:
            CheckpointError: on all ranks if any of them failed. What was complete before stays.
        """
        complete = self.wait()
        documents: dict[str, str] = {}
        slices: list[Slice] = []

        def start() -> None:
            counted = replace(state, engine=EngineCounters(**read_counters(engine.deepspeed)))
            documents.update({CONFIG: json.dumps(run.to_dict(), indent=1), STATE: counted.to_json()})
            slices.extend([*_slices(engine), *memory])
            if self._staging is not None:
                slices[:] = self._staging.hold(slices)
            if self._world.is_main:
                _make_temporary(folders)

        with self._all_or_nothing(folders) as what:
            on_all_ranks(self._world, what, start)
        copy: Callable[[list[Slice]], list[Slice]] = list if self._staging is None else self._staging.copy
        copied = self._copying.submit(copy, slices)
        written = self._writing.submit(self._write, folders, copied)
        self._pending = _Save(tuple(folders), documents, copied, written)
        return complete if self._staging is not None else self.wait()

    def wait_for_copy(self) -> None:
        """Return when the state given to `save` may change; what failed, `poll` and `wait` raise."""
        if self._pending is not None:
            futures.wait([self._pending.copied])

    def poll(self) -> list[Path]:
        """Complete the save before if every rank has written its part; no rank waits for that.

        Returns:
            The folders that became complete.

        Raises:
            CheckpointError: as `save` does.
        """
        if self._pending is None:
            return []
        writing = torch.tensor(float(not self._pending.shards.done()), device=self._world.device)
        return [] if self._world.sum(writing) else self.wait()

    def wait(self) -> list[Path]:
        """Complete the save before, if there is one; see `poll`."""
        if self._pending is None:
            return []
        save, self._pending = self._pending, None

        def publish_all() -> None:
            if self._world.is_main:
                for folder, *shards in zip(save.folders, *written, strict=True):
                    write_documents(temporary(folder), save.documents, shards)
                    publish(folder)

        with self._all_or_nothing(save.folders) as what:
            shards = on_all_ranks(self._world, what, save.shards.result)
            written = self._world.gather_on_main(shards)
            on_all_ranks(self._world, what, publish_all)
        return list(save.folders)

    def _write(self, folders: Sequence[Path], copied: Future[list[Slice]]) -> list[Shard]:
        slices = copied.result()
        name = shard_file(self._world.rank, self._world.world_size)
        return [write_shard(temporary(folder) / name, slices) for folder in folders]

    @contextmanager
    def _all_or_nothing(self, folders: Sequence[Path]) -> Iterator[str]:
        """Remove what is half written if any rank fails. Gives the name of the work, for messages."""
        try:
            yield f"saving {' and '.join(folder.name for folder in folders)}"
        except CheckpointError:
            if self._world.is_main:
                for folder in folders:
                    shutil.rmtree(temporary(folder), ignore_errors=True)
            raise


def memory_slices(memory: Sequence[torch.Tensor], rows: range, batch_size: int) -> Iterator[Slice]:
    """This rank's part of the Transformer-XL memory, for `CheckpointWriter.save`.

    Args:
        memory: for each layer [B, M, D], B = len(rows); nothing is stored while M is 0.
        rows: the global token streams they belong to.
        batch_size: number of global streams.
    """
    for layer, memory_BMD in enumerate(memory):
        if memory_BMD.numel():
            _, M, D = memory_BMD.shape
            values = memory_BMD.detach().reshape(-1)
            yield Slice("memory", f"layers.{layer}", (batch_size, M, D), rows.start * M * D, values)


def _yield_cores() -> None:
    """Let training have the cores before this thread; hashing keeps one busy."""
    # Only there threads have priorities of their own, which a sandbox may forbid to change.
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)


def _make_temporary(folders: Iterable[Path]) -> None:
    for parent in {folder.parent for folder in folders}:
        clear_leftovers(parent)
    for folder in folders:
        temporary(folder).mkdir(parents=True)


def _slices(engine: TrainingEngine) -> Iterator[Slice]:
    for fragment in owned_fragments(engine):
        for kind, values in fragment.tensors.items():
            yield Slice(kind, fragment.name, fragment.global_shape, fragment.start, values)

"""A run on any number of ranks up to its first step, in one process and without changing anything."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.matching import require_same_options, require_same_tensors
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.restore import read_memory
from megamoe.config.schema import RunConfig
from megamoe.data.corpus import Corpus
from megamoe.errors import ConfigError, DataError, DistributedError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.ranks import ONE_RANK
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import DsConfig, layout_of
from megamoe.parallel.engine import build_model
from megamoe.parallel.fake_world import Division, fake_world, make_groups
from megamoe.training.banner import Setup, corpus_row
from megamoe.training.callbacks import build_callbacks
from megamoe.training.lock import RunLock
from megamoe.training.run_folder import RunFolder
from megamoe.training.session import (
    check_settings,
    find_checkpoint,
    has_all_steps,
    open_checkpoint,
    read_corpus,
)
from megamoe.training.trainer import Trainer, probe_of


@dataclass(frozen=True)
class DryRun:
    """What a run would start with.

    Attributes:
        setup: as one rank has it; the model is on the meta device, and the world has been left.
        ds_config: the DeepSpeed config without an "auto".
        text: the row of the banner.
        divisions: of the ranks into process groups.
        notes: on the run folder, by name.
    """

    setup: Setup
    ds_config: DsConfig
    text: str
    divisions: tuple[Division, ...]
    notes: dict[str, str]


def dry_run(run: RunConfig, ds: Mapping[str, Any], world_size: int, rank: int, device: Device) -> DryRun:
    """Refuse what `megamoe.training.session.train` would refuse, and find out what it would start with.

    The model occupies no memory and is of any size. Not done: to compile kernels, to compare the files of a
    checkpoint with their hashes, and to compute with the model; a narrow one with the same policy,
    layers and experts makes the forward pass.

    Args:
        run: with a name. Text in a folder that is not on this machine is done without where
            `model.vocab_size` is set.
        ds: DeepSpeed config, in which "auto" is resolved.
        world_size: ranks.
        rank: the one whose share is looked at.
        device: what the ranks compute on.

    Raises:
        MegaMoEError: something does not fit.
    """
    if not 0 <= rank < world_size:
        raise DistributedError(f"rank {rank} of {world_size}: give 1 or more ranks, and one of them")
    ds_config = check_settings(run, ds, world_size, device)
    run, corpus, text = _read_text(run)
    folder = RunFolder.of(run)
    build_callbacks(run, folder, is_main=True)
    _require_writable(run, folder)
    reader = _checkpoint(run, folder, corpus)
    layout = layout_of(run, ds_config, world_size)
    with fake_world(world_size, rank, torch.device(device.kind)) as world:
        with torch.device("meta"):
            model = build_model(run, layout, world, run.model.vocab_size)
        divisions = make_groups(model, ds_config)
    if reader is not None:
        require_same_tensors(reader, model)
        read_memory(reader, layout.rows(rank), run.training.batch_size)
    _rehearse(run, corpus, rank, world_size)
    setup = Setup(run, world, layout, model, folder, step=0 if reader is None else reader.state.step)
    return DryRun(setup, ds_config, text, divisions, dict(_notes(run, folder, reader)))


def _read_text(run: RunConfig) -> tuple[RunConfig, Corpus | None, str]:
    """The run with its vocabulary, its text if that is here, and what is to say of it."""
    try:
        run, corpus = read_corpus(run)
    except DataError as error:
        if not run.data.path or Path(run.data.path).exists():
            raise
        if not run.model.vocab_size:
            raise DataError(f"{error}; a dry run can do without if model.vocab_size is set") from None
        return run, None, f"not read ({error}); vocabulary {run.model.vocab_size:,}"
    return run, corpus, corpus_row(corpus)


def _require_writable(run: RunConfig, folder: RunFolder) -> None:
    nearest = next(path for path in (folder.root, *folder.root.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir = {run.output_dir!r}: cannot be written ({nearest})")


def _checkpoint(run: RunConfig, folder: RunFolder, corpus: Corpus | None) -> CheckpointReader | None:
    checkpoint = find_checkpoint(run, folder)
    if corpus is not None:
        return open_checkpoint(checkpoint, run, folder, corpus, Trainer)
    if checkpoint is None:
        return None
    reader = CheckpointReader(checkpoint)
    require_same_options(reader, run.model, run.moe)
    return reader


def _rehearse(run: RunConfig, corpus: Corpus | None, rank: int, world_size: int) -> None:
    """Make the forward pass that a start makes, with a model that is narrow."""
    probe = {"input_ids_BS": torch.zeros(1, 2, dtype=torch.long), "domains_B2": torch.zeros(1, 2).long()}
    if corpus is not None:
        probe = probe_of(corpus, run, rank, world_size)
    narrow = replace(run.model, d_model=8, n_heads=1, d_head=4, d_inner=4, d_embed=0, div_val=1)
    model = TransformerXL(narrow, replace(run.moe, d_expert=4), seed=run.training.seed).eval()
    with torch.no_grad():
        auxiliary_loss(model(**probe).routings, run.moe, ONE_RANK.mean)


def _notes(run: RunConfig, folder: RunFolder, reader: CheckpointReader | None) -> Iterator[tuple[str, str]]:
    max_steps = run.training.max_steps
    if reader is not None and has_all_steps(reader, run) and folder.is_scored(max_steps):
        yield "finished", f"all {max_steps:,} steps are done and scored, so a start returns at once"
    if holder := RunLock(folder.root).holder():
        yield "in use", f"{folder.root} is being written by {holder}, so a start waits and is refused"
    if changed := "; ".join(_changes(folder, run)):
        yield "changed", f"{changed} (since {folder.config})"


def _changes(folder: RunFolder, run: RunConfig) -> Iterator[str]:
    """Options that have other values than in the run folder."""
    if folder.config.exists():
        before = dict(_options(json.loads(folder.config.read_text(encoding="utf-8"))))
        for name, value in _options(run.to_dict()):
            if name not in before or before[name] != value:
                yield f"{name} {before.get(name)!r} -> {value!r}"


def _options(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _options(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value

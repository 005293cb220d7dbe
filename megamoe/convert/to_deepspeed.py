"""A neutral checkpoint as DeepSpeed's native MoE checkpoint files."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.format import MOMENTS
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.config.schema import OptimizerConfig
from megamoe.convert.exported import PRECISIONS, narrowed
from megamoe.convert.model_tensors import model_tensors, require_tensors_of
from megamoe.convert.native import (
    LATEST,
    MODEL_FILE,
    OURS,
    expert_file,
    expert_name,
    native_name,
    shard_file,
)
from megamoe.convert.neutral import tensors_of
from megamoe.convert.neutral_writer import new_folder
from megamoe.convert.progress import Progress, progress
from megamoe.convert.torch_writer import NewTensor, write_torch_file
from megamoe.convert.zero_partitions import Partition, Shapes, groups_of_rank
from megamoe.errors import CheckpointError, ConfigError

SUMMARY = (
    "Write the files that engine.load_checkpoint of DeepSpeed reads into a model with native MoE layers."
    " Weights do not depend on ranks: load_checkpoint(..., load_module_only=True) reads them at any ep_size."
    " With --world-size there are optimizer shards too: fp32 masters and Adam's moments, for exactly that"
    " number of ranks, --ep-size, ZeRO stage 1 or 2, torch's Adam, and the groups of parameters that"
    " deepspeed.initialize makes of model_parameters=[...]. Groups of your own are not known here: load the"
    " weights alone."
)
EXAMPLES = """\
  convert_checkpoint.py to-deepspeed runs/moe native --precision bf16
  convert_checkpoint.py to-deepspeed runs/moe native --precision bf16 --world-size 8 --ep-size 4
"""
TAG = "converted"
_EXPERTS = ".moe.experts."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", metavar="IN", help="neutral checkpoint, or a run folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make, with a tag below it")
    parser.add_argument(
        "--precision",
        choices=sorted(PRECISIONS),
        default="fp32",
        help="of the weights that compute; buffers and optimizer shards keep theirs (default: %(default)s)",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="W",
        help="write optimizer shards of W ranks (default: weights alone)",
    )
    parser.add_argument(
        "--ep-size",
        type=int,
        metavar="N",
        help="ranks that share a set of experts, of --world-size (default: 1)",
    )
    parser.add_argument("--tag", default=TAG, help="name of the folder with the files (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    if not re.fullmatch(r"\w[\w.-]*", args.tag):
        raise ConfigError(f"--tag = {args.tag!r}: give the plain name of a folder")
    reader = CheckpointReader(locate(args.input))
    reader.verify_files()
    writer = NativeWriter(reader, PRECISIONS[args.precision], args.world_size, args.ep_size)
    writer.write(args.output, args.tag)
    what = f"optimizer shards of {args.world_size} ranks" if args.world_size else "weights alone"
    print(f"{args.output}: tag {args.tag}, {args.precision}, {what}")
    return 0


class NativeWriter:
    """Writes a checkpoint as DeepSpeed's files, one tensor at a time.

    Args:
        reader: the checkpoint.
        dtype: of the weights that compute.
        world_size: ranks of the optimizer shards; None writes none.
        ep_size: ranks that share one set of experts; None means 1.

    Raises:
        CheckpointError: the checkpoint has no moments, or not the tensors of its config's model.
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self, reader: CheckpointReader, dtype: str, world_size: int | None, ep_size: int | None
    ) -> None:
        self.reader, self.dtype = reader, dtype
        self.moe = reader.config.moe
        held = [tensor for tensor in tensors_of(reader) if tensor.kind != "memory"]
        require_tensors_of(reader.config, held)
        kinds = model_tensors(reader.config, sum(tensor.numel for tensor in held))
        self.trained: Shapes = {name: t.shape for name, t in kinds.items() if t.kind == "weight"}
        self.buffers: Shapes = {name: t.shape for name, t in kinds.items() if t.kind == "buffer"}
        self.world_size, self.ep_size = world_size, ep_size or 1
        _check_sizes(world_size, ep_size, self.moe.n_experts)
        kinds_needed = ("weight", *MOMENTS) if world_size else ("weight",)
        for kind in kinds_needed:
            if missing := self.trained.keys() - set(reader.names(kind)):
                remedy = "; leave --world-size out to write weights alone" if kind in MOMENTS else ""
                raise CheckpointError(
                    f"checkpoint {str(reader.folder)!r}: holds no {kind} of {min(missing)}{remedy}"
                )
        self._shown: Progress | None = None

    def write(self, output: Path, tag: str) -> None:
        """Write everything, or leave nothing behind.

        Raises:
            CheckpointError: `output` exists, or the disk refuses.
        """
        numbers = sum(map(math.prod, self.trained.values()))
        self._shown = progress(4 * numbers * (4 if self.world_size else 1), f"writing {output}")
        with new_folder(output) as unfinished:
            folder = unfinished / tag
            folder.mkdir()
            write_torch_file(folder / MODEL_FILE, self._model_file())
            for index, layer in enumerate(self._mixture_layers()):
                for expert in range(self.moe.n_experts):
                    content = self._expert(f"layers.{layer}.moe", expert)
                    write_torch_file(folder / expert_file(index, expert), content)
            for rank in range(self.world_size or 0):
                name = shard_file(rank, bf16=self.dtype == "bfloat16")
                write_torch_file(folder / name, self._shard(rank))
            (unfinished / LATEST).write_text(tag)

    def _mixture_layers(self) -> tuple[int, ...]:
        return self.moe.layer_indices(self.reader.config.model.n_layers)

    def _model_file(self) -> dict[str, Any]:
        import deepspeed

        shared = {name: shape for name, shape in self.trained.items() if _EXPERTS not in name}
        module = {native_name(name): self._whole("weight", name, self.dtype) for name in shared}
        module |= {native_name(name): self._whole("buffer", name, None) for name in self.buffers}
        state = self.reader.state
        groups = list(self._groups(0)) if self.world_size else None
        return {
            "module": module,
            "buffer_names": [native_name(name) for name in self.buffers],
            "optimizer": None,
            "param_shapes": groups and [{s.local: s.shape for s in group.segments} for group in groups],
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": state.engine.skipped_steps,
            "global_steps": state.engine.global_steps,
            "global_samples": state.engine.global_samples,
            "dp_world_size": self.world_size or 1,
            "mp_world_size": 1,
            "ds_config": {},
            "ds_version": deepspeed.__version__,
            "num_experts": [self.moe.n_experts] * len(self._mixture_layers()),
            "ds_autoep_layers": None,
            OURS: {
                "config": json.dumps(self.reader.config.to_dict()),
                "state": state.to_json(),
                "memory": {name: self._whole("memory", name, None) for name in self.reader.names("memory")},
            },
        }

    def _expert(self, path: str, expert: int) -> dict[str, NewTensor]:
        tensors = {}
        for name, (_, *shape) in self.trained.items():
            if name.startswith(f"{path}.experts."):
                size = math.prod(shape)
                parts = partial(self._read, "weight", name, expert * size, size, self.dtype)
                leaf = name.rpartition(".")[2]
                tensors[expert_name(path, expert, leaf)] = NewTensor(tuple(shape), self.dtype, parts)
        return tensors

    def _shard(self, rank: int) -> dict[str, Any]:
        import deepspeed
        from deepspeed.utils.tensor_fragment import fragment_address

        groups = list(self._groups(rank))
        step = self.reader.state.engine.optimizer_step
        states = {
            index: {"step": _number(float(step))} | {kind: self._flat(kind, g, g.size) for kind in MOMENTS}
            for index, g in enumerate(groups)
        }
        settings = self.reader.config.optimizer
        ep = f"ep_size_{self.ep_size}"
        names: list[dict[str, Any]] = [{"name": "dense-params"}, {"name": ep, "moe": True}]
        param_groups = [_adam_group(settings) | names[i] | {"params": [i]} for i in range(len(groups))]
        saved = {
            "clip_grad": self.reader.config.training.grad_clip,
            "base_optimizer_state": {"state": states, "param_groups": param_groups},
            "single_partition_of_fp32_groups": [
                self._flat("weight", group, group.size - group.padding) for group in groups
            ],
            "zero_stage": 1,
            "group_paddings": [group.padding for group in groups],
            "param_alignment_paddings": [[0] * len(group.segments) for group in groups],
            "partition_count": [group.count for group in groups],
            "ds_version": deepspeed.__version__,
            "param_slice_mappings": [
                {part.local: fragment_address(part.numel, part.start) for part in group.slices}
                for group in groups
            ],
        }
        return {"optimizer_state_dict": saved, "ds_config": {}, "ds_version": deepspeed.__version__}

    def _groups(self, rank: int) -> Iterator[Partition]:
        assert self.world_size is not None
        return groups_of_rank(
            self.trained, rank, self.world_size, self.ep_size, lambda name: _EXPERTS in name
        )

    def _flat(self, kind: str, group: Partition, size: int) -> NewTensor:
        """A partition of `kind`; what is beyond its parameters is zero."""

        def parts() -> Iterator[torch.Tensor]:
            for part in group.slices:
                yield from self._read(kind, part.name, part.origin, part.numel, "float32")
            yield torch.zeros(size - group.size + group.padding)

        return NewTensor((size,), "float32", parts)

    def _whole(self, kind: str, name: str, dtype: str | None) -> NewTensor:
        shape = self.reader.shape(kind, name)
        dtype = dtype or self.reader.manifest.tensors[kind][name].dtype
        return NewTensor(shape, dtype, partial(self._read, kind, name, 0, math.prod(shape), dtype))

    def _read(self, kind: str, name: str, start: int, numel: int, dtype: str) -> Iterator[torch.Tensor]:
        values = self.reader.read(kind, name, start, start + numel)
        self.reader.release(values.nbytes)
        yield narrowed(name, values, dtype)
        if self._shown and kind in ("weight", *MOMENTS):
            self._shown(numel * 4)


def _check_sizes(world_size: int | None, ep_size: int | None, n_experts: int) -> None:
    if world_size is None:
        if ep_size is not None:
            raise ConfigError(
                f"--ep-size = {ep_size}: weights do not depend on it; leave it out, or give --world-size"
            )
        return
    if world_size < 1:
        raise ConfigError(f"--world-size = {world_size}: give a number above 0")
    if ep_size is not None and (ep_size < 1 or world_size % ep_size or n_experts % ep_size):
        raise ConfigError(
            f"--ep-size = {ep_size}: give a divisor of --world-size = {world_size} and of {n_experts} experts"
        )


def _adam_group(settings: OptimizerConfig) -> dict[str, Any]:
    """The settings of torch's Adam. DeepSpeed's default groups know one weight decay for all parameters."""
    return {
        "lr": settings.lr, "betas": settings.betas, "eps": settings.eps,
        "weight_decay": settings.weight_decay, "amsgrad": False, "maximize": False, "foreach": None,
        "capturable": False, "differentiable": False, "fused": None,
        "decoupled_weight_decay": settings.name == "adamw",
    }  # fmt: skip


def _number(value: float) -> NewTensor:
    return NewTensor((), "float32", lambda: [torch.tensor([value])])

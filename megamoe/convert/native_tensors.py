"""DeepSpeed's native MoE checkpoint files as neutral tensors, config and state."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from megamoe.checkpoint.dtypes import empty, torch_dtype
from megamoe.checkpoint.format import CONFIG, parse_object
from megamoe.checkpoint.state import EngineCounters, TrainingState
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import load_config
from megamoe.convert.native import OURS, expert_name, neutral_name
from megamoe.convert.native_reader import NativeModel, StoredWeight
from megamoe.convert.tensors import LazyTensor, same_bits
from megamoe.convert.torch_file import StoredTensor
from megamoe.convert.unpartitioned import read_unpartitioned
from megamoe.convert.zero_shards import Shards, read_shards, require_whole
from megamoe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch


def read_config(model: NativeModel, file: str | None) -> RunConfig:
    """The config in `file`, or else that in the checkpoint.

    Raises:
        CheckpointError: there is none, or no valid one.
        ConfigError: `file` is not valid.
    """
    if file:
        config = load_config(file=file)
        if not config.model.vocab_size:
            raise ConfigError("model.vocab_size = 0: --config must tell the number of symbols")
        return config
    text = _ours(model, "config")
    if text is None:
        raise CheckpointError(
            f"checkpoint {str(model.folder)!r}: tells nothing of the run; give its config with --config FILE"
        )
    try:
        return from_dict(parse_object(text, CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {str(model.folder)!r}: {CONFIG}: {error}") from None


def read_state(model: NativeModel) -> TrainingState:
    """The run's state: what `to-deepspeed` saved, or else DeepSpeed's counters.

    Raises:
        CheckpointError: it is not valid.
    """
    text = _ours(model, "state")
    if text is not None:
        return TrainingState.from_json(text)
    counters = [model.main.get(name) or 0 for name in ("global_steps", "global_samples", "skipped_steps")]
    if not all(type(value) is int and value >= 0 for value in counters):
        raise CheckpointError(
            f"checkpoint {str(model.folder)!r}: its counters {counters!r:.80} are not numbers"
        )
    steps, samples, skipped = counters
    engine = EngineCounters(global_steps=steps, global_samples=samples, skipped_steps=skipped)
    return TrainingState(step=steps, engine=engine)


def world_size_of(model: NativeModel) -> int:
    """Ranks that saved.

    Raises:
        CheckpointError: the files do not tell.
    """
    world_size = model.main.get("dp_world_size")
    if type(world_size) is not int or world_size < 1:
        raise CheckpointError(
            f"checkpoint {str(model.folder)!r}: dp_world_size = {world_size!r:.40}: not a number"
        )
    return world_size


def read_optimizer(model: NativeModel, ep_size: int | None = None) -> Shards | None:
    """The optimizer's tensors, of any ZeRO stage below 3; None if there are none.

    Args:
        model: the weights beside them.
        ep_size: what it must be; None takes what the files say.

    Raises:
        CheckpointError: files are missing or damaged, or are of another ep_size.
    """
    partitioned = read_shards(model.folder, world_size_of(model), model.n_experts, ep_size)
    return partitioned or read_unpartitioned(model, ep_size)


def neutral_tensors(model: NativeModel, shards: Shards | None) -> Iterator[LazyTensor]:
    """Weights (fp32 masters where there are any), moments, buffers and memory under their neutral names.

    Raises:
        CheckpointError: the shards do not hold exactly the model's tensors.
    """
    trained = {name: [(name, weight)] for name, weight in model.weights.items() if name not in model.buffers}
    stacked = {
        f"{path}.experts.{leaf}": [(expert_name(path, e, leaf), part) for e, part in enumerate(parts)]
        for (path, leaf), parts in model.experts.items()
    }
    if shards:
        shapes = {
            name: part.shape for parts in (*trained.values(), *stacked.values()) for name, part in parts
        }
        require_whole(shards, shapes, model.folder)
    for name, ((_, weight),) in trained.items():
        yield from _of_parts(neutral_name(name), weight.shape, trained[name], shards)
    for name, parts in stacked.items():
        yield from _of_parts(name, (len(parts), *parts[0][1].shape), parts, shards)
    for name in sorted(model.buffers & model.weights.keys()):
        buffer = model.weights[name]
        yield LazyTensor("buffer", neutral_name(name), buffer.shape, buffer.dtype, buffer.load)
    memory = _section(model).get("memory", {})
    for name, stored in memory.items() if isinstance(memory, dict) else ():
        if isinstance(stored, StoredTensor):
            yield LazyTensor("memory", name, stored.shape, stored.dtype, stored.load)


def _of_parts(
    name: str, shape: tuple[int, ...], parts: list[tuple[str, StoredWeight]], shards: Shards | None
) -> Iterator[LazyTensor]:
    """The tensors called `name`, whose `parts`, native name and saved weight, follow each other."""
    kinds = {kind for kind, _ in shards.spans} if shards else set()
    for kind in sorted(kinds | {"weight"}):
        reads: list[Callable[[], torch.Tensor]] = []
        for native, weight in parts:
            if shards is None or kind not in kinds:
                reads.append(weight.load)
            elif kind == "weight":
                reads.append(partial(_master, shards, native, weight))
            else:
                reads.append(partial(shards.read, kind, native))
        dtype = "float32" if kind in kinds else parts[0][1].dtype
        yield LazyTensor(kind, name, shape, dtype, partial(_joined, reads, shape, dtype))


def _joined(reads: "list[Callable[[], torch.Tensor]]", shape: tuple[int, ...], dtype: str) -> "torch.Tensor":
    """All parts, which are of one size, each read into its place."""
    values = empty(shape, dtype)
    for part, read in zip(values.view(len(reads), -1), reads, strict=True):
        part.copy_(read().flatten())
    return values


def _master(shards: Shards, name: str, weight: StoredWeight) -> "torch.Tensor":
    """The fp32 master of a weight, which must be what the weight was rounded from."""
    master = shards.read("weight", name)
    if not same_bits(master.to(torch_dtype(weight.dtype)), weight.load().flatten()):
        raise CheckpointError(
            f"{name}: its fp32 master is not what the saved weight was rounded from; shards are of another"
            " checkpoint, or saved with round_robin_gradients, or damaged; --weights-only leaves them out"
        )
    return master


def _section(model: NativeModel) -> dict[str, Any]:
    section = model.main.get(OURS)
    return section if isinstance(section, dict) else {}


def _ours(model: NativeModel, key: str) -> str | None:
    text = _section(model).get(key)
    return text if isinstance(text, str) else None

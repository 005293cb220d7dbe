"""Lay a checkpoint out as the optimizer shards of DeepSpeed at ZeRO stage 1: the inverse of `zero_shards`.

DeepSpeed makes two groups of parameters unless it is given others: what all ranks share, in the order of
the model, then the experts of a rank, layer by layer and expert by expert. Each group is laid end to end,
padded to a multiple of twice the ranks that share it, and cut into equal partitions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megamoe.convert.native import expert_name, native_name

_ALIGNMENT = 2
"""Numbers; `nccl_start_alignment_factor` there."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Segment:
    """A parameter in a group.

    Attributes:
        local: its native name on the rank, experts counted from 0.
        name: name of the neutral tensor that holds it.
        origin: where it begins there.
        shape: its shape.
    """

    local: str
    name: str
    origin: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Slice:
    """Elements origin..origin + numel of neutral tensor `name`, at `start` of a rank's partition."""

    local: str
    name: str
    origin: int
    start: int
    numel: int


@dataclass(frozen=True)
class Partition:
    """What one of `count` ranks holds of a group.

    Attributes:
        segments: the whole group.
        count: partitions of the group.
        size: numbers of a partition, padding included.
        slices: the parameters in this one.
    """

    segments: list[Segment]
    count: int
    size: int
    slices: list[Slice]

    @property
    def padding(self) -> int:
        """Numbers at the end that belong to no parameter."""
        return self.size - sum(part.numel for part in self.slices)


def groups_of_rank(
    shapes: Shapes, rank: int, world_size: int, ep_size: int, is_expert: Callable[[str], bool]
) -> Iterator[Partition]:
    """The partition that `rank` holds of what all share, then that of its experts, if there are any.

    Args:
        shapes: of the trained neutral tensors, in the order of the model.
        is_expert: whether a neutral tensor is of stacked experts.
    """
    shared = [Segment(native_name(n), n, 0, shape) for n, shape in shapes.items() if not is_expert(n)]
    yield _partition(shared, rank, world_size)
    experts = {name: shape for name, shape in shapes.items() if is_expert(name)}
    if experts:
        yield _partition(
            list(_experts(experts, rank % ep_size, ep_size)), rank // ep_size, world_size // ep_size
        )


def _experts(shapes: Shapes, ep_rank: int, ep_size: int) -> Iterator[Segment]:
    paths = dict.fromkeys(name.rpartition(".experts.")[0] for name in shapes)
    for path in paths:
        leaves = {
            n.rpartition(".")[2]: shape for n, shape in shapes.items() if n.startswith(f"{path}.experts.")
        }
        n_local = next(iter(leaves.values()))[0] // ep_size
        for local in range(n_local):
            for leaf, (_, *shape) in leaves.items():
                origin = (ep_rank * n_local + local) * math.prod(shape)
                yield Segment(expert_name(path, local, leaf), f"{path}.experts.{leaf}", origin, tuple(shape))


def _partition(segments: list[Segment], index: int, count: int) -> Partition:
    total, alignment = sum(segment.numel for segment in segments), _ALIGNMENT * count
    size = math.ceil(total / alignment) * alignment // count
    begin, offset, slices = index * size, 0, []
    for segment in segments:
        first, last = max(begin, offset), min(begin + size, offset + segment.numel)
        if first < last:
            origin = segment.origin + first - offset
            slices.append(Slice(segment.local, segment.name, origin, first - begin, last - first))
        offset += segment.numel
    return Partition(segments, count, size, slices)

"""The Adam state of a published run, whose tensors have numbers instead of names."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.format import MOMENTS
from megamoe.convert.torch_file import StoredTensor, TorchFile
from megamoe.errors import CheckpointError
from megamoe.models.reference_names import optimizer_order


@dataclass(frozen=True)
class PublishedOptimizer:
    """The content of an ``optimizer.pt``.

    Attributes:
        path: the file.
        n_parameters: how many parameters it was made for.
        moments: by number of the parameter, `exp_avg` and `exp_avg_sq`.
        step: updates done.
        settings: as in `megamoe.config.schema.OptimizerConfig`.
    """

    path: Path
    n_parameters: int
    moments: Mapping[int, Mapping[str, StoredTensor]]
    step: int
    settings: Mapping[str, Any]


def read_optimizer(path: Path) -> PublishedOptimizer:
    """The state of Adam in a file of torch.save.

    Raises:
        CheckpointError: it holds something else, or cannot be read.
    """
    content = TorchFile(path).structure()
    try:
        groups = content["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        found = {
            number: {kind: state[kind] for kind in MOMENTS} for number, state in content["state"].items()
        }
        steps = [_step(state["step"]) for state in content["state"].values()]
        first = groups[0]
        settings = {
            "lr": first.get("initial_lr", first["lr"]),
            "betas": list(first["betas"]),
            "eps": first["eps"],
            "weight_decay": first.get("weight_decay", 0.0),
        }
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _error(path, f"holds no state of Adam ({error!r})") from None
    stored = all(isinstance(tensor, StoredTensor) for state in found.values() for tensor in state.values())
    if not stored or numbers != list(range(len(numbers))) or not set(found) <= set(numbers):
        raise _error(path, "does not number its parameters as Adam does")
    return PublishedOptimizer(path, len(numbers), found, max(steps, default=0), settings)


def moments(
    optimizer: PublishedOptimizer, trained: Collection[str]
) -> Iterator[tuple[str, str, StoredTensor]]:
    """Kind, published name and values of each moment.

    Args:
        optimizer: the state.
        trained: published names of the parameters that were trained.

    Raises:
        CheckpointError: the optimizer was made for other parameters.
    """
    order = optimizer_order(trained)
    if len(order) != optimizer.n_parameters:
        order = optimizer_order({*trained, *_unused_routers(trained)})
    if len(order) != optimizer.n_parameters:
        raise _error(
            optimizer.path, f"is for {optimizer.n_parameters} parameters, the model trains {len(trained)}"
        )
    for number, name in enumerate(order):
        if name not in trained:
            continue
        if number not in optimizer.moments:
            raise _error(optimizer.path, f"has no moments of {name}")
        for kind, stored in optimizer.moments[number].items():
            yield kind, name, stored


def _unused_routers(trained: Collection[str]) -> Iterator[str]:
    """What a HyperRouter layer owned, and its optimizer counted, until its first forward pass."""
    for name in trained:
        if name.endswith("gate.embedding"):
            gate = name.removesuffix("embedding")
            yield from (f"{gate}gate.weight", f"{gate}gate.bias")


def _step(value: Any) -> int:
    """A plain number, or since torch 1.12 a tensor of one."""
    if isinstance(value, StoredTensor):
        if value.shape != ():
            raise ValueError("step is no number")
        value = value.load().item()
    if value < 0 or value != int(value):
        raise ValueError("step is no whole number")
    return int(value)


def _error(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"file {str(path)!r}: {problem}")

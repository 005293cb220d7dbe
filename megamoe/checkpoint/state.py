"""What a run must remember besides tensors: `TrainingState`, the content of ``state.json``."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from megamoe.checkpoint.format import STATE, parse_object
from megamoe.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """What an engine has counted, independent of ranks and of the ZeRO stage.

    Attributes:
        global_steps: optimizer steps tried, skipped ones included.
        global_samples: token streams seen.
        skipped_steps: steps left out because gradients were not finite.
        optimizer_step: updates done as Adam counts them, for bias correction.
        loss_scaler: state of dynamic loss scaling; empty where the precision needs none.
    """

    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    optimizer_step: int = 0
    loss_scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """State of a run after `step` optimizer steps. Data position and randomness follow from the step.

    Attributes:
        step: optimizer steps done.
        tokens_seen: tokens trained on.
        best_metric: best validation figure so far, in the corpus's metric; None before the first.
        best_step: step of that figure.
        schedule: state of a learning-rate schedule that has any (plateau).
        corpus: what the figures are called: name, unit, metric, whether it is a sample.
        tokenizer: text to token ids, as ``tokenizer.to_dict()`` writes it.
        engine: counters of the engine; `CheckpointWriter.save` fills them in.
    """

    step: int
    tokens_seen: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    engine: EngineCounters = field(default_factory=EngineCounters)

    def of_other_weights(self) -> "TrainingState":
        """The state of weights that were made of the saved ones: without best figure and Adam's counters."""
        counted = self.engine
        engine = EngineCounters(global_steps=counted.global_steps, global_samples=counted.global_samples)
        return replace(self, best_metric=None, best_step=None, engine=engine)

    def to_json(self) -> str:
        """The text of ``state.json``.

        Raises:
            CheckpointError: a value is not finite or not plain data.
        """
        try:
            return json.dumps(asdict(self), indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{STATE}: cannot be written as JSON ({error})") from None

    def restore_schedule(self, cls: type[T]) -> T:
        """The learning-rate schedule of class `cls`, a dataclass, as it was saved.

        Raises:
            CheckpointError: the field and its value, if the state is not that of a `cls`.
        """
        return _build(cls, self.schedule, "schedule.")

    @classmethod
    def from_json(cls, text: str) -> "TrainingState":
        """Parse ``state.json``, refusing unknown, missing and mistyped fields.

        Raises:
            CheckpointError: the field and its value.
        """
        return cls.from_dict(parse_object(text, STATE))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingState":
        """The same from the nested values that ``dataclasses.asdict`` gives.

        Raises:
            CheckpointError: the field and its value.
        """
        return _build(cls, values, "")


def _build(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise CheckpointError(f"{STATE}: {path}{min(unknown)}: unknown field")
    arguments = {}
    for spec in fields(cls):  # type: ignore[arg-type]
        name = f"{path}{spec.name}"
        if spec.name in values:
            arguments[spec.name] = _checked(hints[spec.name], values[spec.name], name)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise CheckpointError(f"{STATE}: {name}: missing")
    return cls(**arguments)


def _checked(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint) and isinstance(value, dict):
        return _build(typing.cast("type[Any]", hint), value, f"{name}.")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if float in kinds:
        kinds = (*kinds, int)
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise CheckpointError(f"{STATE}: {name} = {value!r:.60}: expected {expected}")
    return value

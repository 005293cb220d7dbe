"""What a compression has saved and what it has cost."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megamoe.checkpoint.compressed import CompressedReader, Loss, open_reader
from megamoe.checkpoint.format import EXPERT_MODES
from megamoe.checkpoint.load import load_model
from megamoe.compress.settings import Settings
from megamoe.compress.source import Source
from megamoe.convert.neutral import tensors_of
from megamoe.convert.soundness import EXPERTS
from megamoe.convert.tensors import LazyTensor
from megamoe.parallel.launch import read_launch
from megamoe.training.evaluation import Evaluation, format_figure
from megamoe.training.scoring import score


@dataclass(frozen=True)
class Size:
    """Bytes on disk of a model's tensors; moments and memory do not count.

    Attributes:
        model: of all.
        experts: of those of experts.
    """

    model: int
    experts: int

    @classmethod
    def of(cls, tensors: Iterable[LazyTensor]) -> "Size":
        """Of tensors of any kind."""
        own = [tensor for tensor in tensors if tensor.kind in ("weight", "buffer", "compressed")]
        experts = sum(t.n_bytes for t in own if t.kind == "compressed" or EXPERTS in t.name)
        return cls(sum(tensor.n_bytes for tensor in own), experts)


@dataclass(frozen=True)
class Report:
    """Figures of one compressed checkpoint.

    Attributes:
        source: the checkpoint that was compressed.
        output: the compressed one.
        settings: how.
        before: bytes of the source.
        after: bytes of the output.
        losses: share of the squared weights lost, by layer.
        resident: bytes of the loaded model's tensors by mode of loading.
        scores: of source and output on the validation text, if asked for.
    """

    source: Path
    output: Path
    settings: Settings
    before: Size
    after: Size
    losses: Mapping[int, Loss]
    resident: Mapping[str, int]
    scores: tuple[Evaluation, Evaluation] | None

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": str(self.source),
            "output": str(self.output),
            "settings": asdict(self.settings),
            "bytes": {"before": asdict(self.before), "after": asdict(self.after)},
            "layers": {str(layer): asdict(loss) for layer, loss in self.losses.items()},
            "resident_bytes": dict(self.resident),
            "scores": self.scores
            and dict(zip(("before", "after"), (s.to_dict() for s in self.scores), strict=True)),
        }

    def tables(self) -> Iterator[Table]:
        """For people."""
        yield self._bytes_table()
        yield self._loss_table()
        if self.scores:
            yield _score_table(*self.scores)

    def _bytes_table(self) -> Table:
        table = Table("", title=f"{self.output}: {self.settings.name}, keep {self.settings.keep:g}", **_STYLE)
        for title in ("bytes before", "bytes after", "kept"):
            table.add_column(title, justify="right")
        sizes = {"experts on disk": "experts", "model on disk": "model"}
        rows = {what: (getattr(self.before, name), getattr(self.after, name)) for what, name in sizes.items()}
        dense = self.before.model
        rows |= {f"model in memory, {mode}": (dense, n_bytes) for mode, n_bytes in self.resident.items()}
        for what, (before, after) in rows.items():
            table.add_row(what, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
        return table

    def _loss_table(self) -> Table:
        table = Table(title="shares of the experts' squared weights", **_STYLE)
        for title in ("layer", "in residuals", "lost"):
            table.add_column(title, justify="right")
        for layer, loss in self.losses.items():
            table.add_row(str(layer), f"{loss.residual:.4f}", f"{loss.lost:.4f}")
        return table


_STYLE: Any = {"title_justify": "left", "title_style": "bold"}


def report(
    source: Source, settings: Settings, output: Path, losses: Mapping[int, Loss], scored: bool
) -> Report:
    """Measure a compressed checkpoint.

    Args:
        source: what was compressed.
        settings: how.
        output: the result.
        losses: what `compress` gave.
        scored: also score both on the validation text.
    """
    reader = open_reader(output)
    modes = reader.compression.modes if isinstance(reader, CompressedReader) else EXPERT_MODES[:1]
    return Report(
        source.path, output, settings, Size.of(source.tensors), Size.of(tensors_of(reader)), losses,
        {mode: resident_bytes(output, mode) for mode in modes},
        (scores(source, source.path), scores(source, output)) if scored else None,
    )  # fmt: skip


def scores(source: Source, checkpoint: Path, *overrides: str) -> Evaluation:
    """Figures of a checkpoint on the validation text of `source`.

    Args:
        overrides: see `score`; beyond those of the source.
    """
    how = [*source.overrides, *overrides]
    return score(checkpoint, "valid", how, read_launch(), max_tokens=source.max_tokens)[1]


def resident_bytes(checkpoint: Path, mode: str) -> int:
    """Bytes of parameters and buffers of the model, loaded with its experts in `mode`."""
    model = load_model(checkpoint, verify=False, experts=mode)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _score_table(before: Evaluation, after: Evaluation) -> Table:
    table = Table(
        title=f"{before.split} figures on {before.corpus}",
        caption=f"{before.tokens:,} predictions each", caption_justify="left", **_STYLE,
    )  # fmt: skip
    for title in ("active experts k", "before", "after"):
        table.add_column(title, justify="right")
    for k in before.nats:
        figures = [
            format_figure(scored.figure(k), scored.metric) if k in scored.nats else "-"
            for scored in (before, after)
        ]
        table.add_row(str(k), *figures)
    return table

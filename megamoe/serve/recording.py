"""Routings of a model on a text, one file for each segment, which holds all layers of all its tokens.

Per segment: `token_ids` [B, S]; `resets` [B], whether the rows begin there; and for each mixture layer n
`expert_ids.n` [B, S, K], the choices that were executed (-1: none), and `top_ids.n` and `top_logits.n`
[B, S, T], the router's T = min(30, E) largest scores.

`routings.json` beside them says what they are of. Either a segment is there with all of this or not at all.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamoe.data.stream import TokenStream
from megamoe.errors import DataError
from megamoe.models.attention import AttentionSpan
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routing import Routing

DESCRIPTION = "routings.json"
TEACHER_SCORES = 30
"""Scores that are kept of a token in a layer; the paper distils from as many."""
UNCHOSEN = -16.0
"""Score of an expert that was not chosen, where the policy has no scores; of a chosen one it is 0."""


@dataclass(frozen=True)
class RecordedSegment:
    """What was recorded of one segment, see the head of this file; one tensor a layer, from below."""

    token_ids_BS: torch.Tensor
    resets_B: torch.Tensor
    expert_ids_BSK: list[torch.Tensor]
    top_ids_BST: list[torch.Tensor]
    top_logits_BST: list[torch.Tensor]


@dataclass(frozen=True)
class RoutingRecords:
    """A folder of recorded segments.

    Attributes:
        folder: where they are.
        layers: names of the mixture layers.
        n_experts: experts of each.
        batch_size: rows B of every segment.
        n_segments: how many there are.
    """

    folder: Path
    layers: tuple[str, ...]
    n_experts: int
    batch_size: int
    n_segments: int

    @classmethod
    def open(cls, folder: Path) -> "RoutingRecords":
        """Those that `record_routings` has written.

        Raises:
            DataError: there are none, or not all.
        """
        try:
            values = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            return cls(folder, tuple(values.pop("layers")), **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"routings {str(folder)!r}: {DESCRIPTION}: cannot be read ({error})") from None

    def segment(self, number: int) -> RecordedSegment:
        """One segment.

        Raises:
            DataError: it is missing or damaged, or its parts do not belong together.
        """
        file = segment_file(self.folder, number)
        try:
            tensors = load_file(file)
            parts = [[tensors[f"{name}.{n}"] for n in range(len(self.layers))] for name in _OF_A_LAYER]
            segment = RecordedSegment(tensors["token_ids"], tensors["resets"], *parts)
        except (OSError, SafetensorError) as error:
            raise DataError(f"routings {str(file)!r}: cannot be read ({error}); record anew") from None
        except KeyError as error:
            raise DataError(f"routings {str(file)!r}: lacks {error}; record anew") from None
        self._require_one_row(file, segment)
        return segment

    def _require_one_row(self, file: Path, segment: RecordedSegment) -> None:
        shape = segment.token_ids_BS.shape
        ids = [*segment.expert_ids_BSK, *segment.top_ids_BST]
        fits = shape[:1] == segment.resets_B.shape == (self.batch_size,)
        fits &= all(part.shape[:2] == shape for part in (*ids, *segment.top_logits_BST))
        fits &= all(bool(((part >= -1) & (part < self.n_experts)).all()) for part in ids)
        if not fits:
            raise DataError(f"routings {str(file)!r}: its parts are not of the same tokens; record anew")


_OF_A_LAYER = ("expert_ids", "top_ids", "top_logits")


def segment_file(folder: Path, number: int) -> Path:
    """File of a segment."""
    return folder / f"segment-{number:06d}.safetensors"


@torch.no_grad()
def record_routings(
    model: TransformerXL,
    stream: TokenStream,
    folder: Path,
    *,
    n_segments: int,
    top_k: int,
    step: int,
    span: AttentionSpan,
) -> RoutingRecords:
    """Read `n_segments` segments and write how their tokens were routed.

    Args:
        model: in evaluation mode.
        stream: the text.
        folder: an empty one.
        n_segments: how many to read.
        top_k: experts per token.
        step: optimizer steps behind the model.
        span: how far back attention reaches.
    """
    memory = None
    for number in range(n_segments):
        batch = stream.batch(number)
        if batch.starts_epoch:
            memory = None
        output = model(batch.input_ids_BS, memory=memory, top_k=top_k, step=step, span=span)
        memory = output.memory
        resets_B = torch.full((len(batch.input_ids_BS),), batch.starts_epoch)
        _write(segment_file(folder, number), batch.input_ids_BS, resets_B, output.routings, model)
    names = {id(layer): name for name, layer in model.named_modules()}
    records = RoutingRecords(
        folder, tuple(names[id(layer)] for layer in model.moe_layers), model.moe_config.n_experts,
        len(batch.input_ids_BS), n_segments,
    )  # fmt: skip
    values = asdict(records)
    del values["folder"]
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return records


def _write(
    file: Path,
    token_ids_BS: torch.Tensor,
    resets_B: torch.Tensor,
    routings: Iterable[Routing],
    model: TransformerXL,
) -> None:
    """All of a segment or nothing."""
    shape = tuple(token_ids_BS.shape)
    tensors = {"token_ids": token_ids_BS.int(), "resets": resets_B}
    for n, routing in enumerate(routings):
        scores_TE = _scores(routing, model.moe_config.n_experts)
        top = scores_TE.topk(min(TEACHER_SCORES, scores_TE.shape[1]))
        parts = (routing.expert_ids_TK.short(), top.indices.short(), top.values.half())
        for name, part in zip(_OF_A_LAYER, parts, strict=True):
            tensors[f"{name}.{n}"] = part.unflatten(0, shape).contiguous()
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(file)


def _scores(routing: Routing, n_experts: int) -> torch.Tensor:
    """What the router chose by [T, E]."""
    if routing.logits_TE is not None:
        return routing.logits_TE.float()
    ids_TK = routing.expert_ids_TK
    scores_TE = torch.full((len(ids_TK), n_experts + 1), UNCHOSEN)
    return scores_TE.scatter_(1, ids_TK.where(ids_TK >= 0, n_experts), 0.0)[:, :-1]


def split(n_segments: int, held_out: float) -> tuple[Sequence[int], Sequence[int]]:
    """Numbers of the segments to learn from, and of the last ones, which are held out; some of each.

    Raises:
        DataError: there are too few.
    """
    n_held_out = max(1, round(held_out * n_segments))
    if n_segments - n_held_out < 1:
        raise DataError(f"routings: {n_segments} segments are too few to learn from; give more tokens")
    return range(n_segments - n_held_out), range(n_segments - n_held_out, n_segments)

"""A text read by a model as if it were served: token by token, or some tokens at once.

Shapes: S tokens read at once.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from megamoe.models.attention import AttentionSpan
from megamoe.models.decoding import Decoder, Past
from megamoe.models.transformer_xl import TransformerXL

Announce = Callable[[torch.Tensor], Any]


class Reading(NamedTuple):
    """How a text is read.

    Attributes:
        at_once: tokens S; with 1, keys and values are cached as while text is generated.
        top_k: experts per token.
        step: optimizer steps behind the model.
        span: how far back attention reaches, with `same_length`.
    """

    at_once: int
    top_k: int
    step: int
    span: AttentionSpan


@torch.no_grad()
def read_aloud(
    model: TransformerXL, ids_N: torch.Tensor, reading: Reading, announce: Announce = lambda ids_1S: None
) -> torch.Tensor:
    """Read all tokens but the last, each of which predicts the next.

    Args:
        model: in evaluation mode.
        ids_N: the text.
        reading: how.
        announce: called with each piece before the model reads it; where several tokens are read at once,
            one piece ahead, since the text is there.

    Returns:
        nats of each prediction [N - 1], fp32.
    """
    pieces = deque(ids_N[:-1][None].split(reading.at_once, dim=1))
    targets_N = ids_N[1:]
    read = _token_by_token(model, reading) if reading.at_once == 1 else _by_segments(model, reading)
    ahead = 0 if reading.at_once == 1 else 1
    losses, n_announced = [], 0
    for number, piece_1S in enumerate(pieces):
        while n_announced <= min(number + ahead, len(pieces) - 1):
            announce(pieces[n_announced])
            n_announced += 1
        targets_S = targets_N[number * reading.at_once :][: piece_1S.shape[1]]
        losses.append(functional.cross_entropy(read(piece_1S), targets_S, reduction="none"))
    return torch.cat(losses)


def _token_by_token(model: TransformerXL, reading: Reading) -> Callable[[torch.Tensor], torch.Tensor]:
    nothing = model.attention_bias_u.new_zeros(1, 0, model.model_config.d_model)
    past = Past((nothing,) * model.model_config.n_layers, 0)
    decoder = Decoder(model, [past], reading.span, top_k=reading.top_k, step=reading.step)
    return lambda piece_11: decoder.read(piece_11[0])


def _by_segments(model: TransformerXL, reading: Reading) -> Callable[[torch.Tensor], torch.Tensor]:
    memory = None

    def read(piece_1S: torch.Tensor) -> torch.Tensor:
        nonlocal memory
        output = model(
            piece_1S, memory=memory, top_k=reading.top_k, step=reading.step, span=reading.span,
            return_logits=True,
        )  # fmt: skip
        memory = output.memory
        assert output.logits_BSV is not None
        return output.logits_BSV[0]

    return read

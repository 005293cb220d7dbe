"""Which experts tokens will go to, told from the text alone, before the model has read it.

With x_t the embedding of token t in the served model,

    c_t = relu(W_c x_t + b_c)
    h_1, h_2, ... = LSTM(c_1, c_2, ...), of two layers
    a_t = sparsemax(h_t . h_j over the C latest positions j, t included)
    o_t = sum_j a_tj h_j + W_r c_t + b_r
    logits of mixture layer l = W_l o_t + b_l

The paper attends to the whole text, later tokens included, which a text that is being generated does not
have; here C positions are kept beside the state of the LSTM, so that it does not matter how a text is cut.

Paper: Du et al., "SiDA: Sparsity-Inspired Data-Aware Serving for Efficient and Scalable Large
Mixture-of-Experts Models", MLSys 2024, arXiv 2310.18859, section 3.

Shapes besides the common ones: W width, C positions attended to, L mixture layers, Q = C - 1 + S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from megamoe.serve.sparsemax import sparsemax


@dataclass(frozen=True, kw_only=True)
class PredictorShape:
    """Sizes of a predictor.

    Attributes:
        d_model: width D of the served model.
        n_layers: its mixture layers L.
        n_experts: experts E in each.
        width: W.
        context: positions C that a token attends to, itself included.
    """

    d_model: int
    n_layers: int
    n_experts: int
    width: int = 256
    context: int = 128


class PredictorState(NamedTuple):
    """What a predictor remembers of B texts.

    Attributes:
        h_2BW: output of both layers of the LSTM.
        cell_2BW: their cells.
        past_BPW: h of the C - 1 latest positions, zero where there was none.
        n_past_B: how many there were, at most C - 1.
    """

    h_2BW: torch.Tensor
    cell_2BW: torch.Tensor
    past_BPW: torch.Tensor
    n_past_B: torch.Tensor

    @staticmethod
    def stack(states: Sequence["PredictorState"]) -> "PredictorState":
        """Those of several texts as one."""
        h, cell, past, n_past = zip(*states, strict=True)
        return PredictorState(torch.cat(h, 1), torch.cat(cell, 1), torch.cat(past), torch.cat(n_past))


class Predictor(nn.Module):
    """The network at the head of this file."""

    def __init__(self, shape: PredictorShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.compress = nn.Linear(shape.d_model, width)
        self.recurrent = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.residual = nn.Linear(width, width)
        self.heads = nn.Linear(width, shape.n_layers * shape.n_experts)

    def initial_state(self, batch_size: int) -> PredictorState:
        """Nothing read."""
        like, width = self.heads.weight, self.shape.width
        h_2BW = like.new_zeros(2, batch_size, width)
        past_BPW = like.new_zeros(batch_size, self.shape.context - 1, width)
        n_past_B = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return PredictorState(h_2BW, h_2BW, past_BPW, n_past_B)

    def read_text(self, x_BSD: torch.Tensor) -> PredictorState:
        """What is remembered of texts, of any length or none."""
        state = self.initial_state(len(x_BSD))
        if x_BSD.shape[1]:
            for piece_BSD in x_BSD.split(self.shape.context, dim=1):
                _, state = self(piece_BSD, state)
        return state

    def forward(
        self, x_BSD: torch.Tensor, state: PredictorState | None = None
    ) -> tuple[torch.Tensor, PredictorState]:
        """Read S more tokens of every text.

        Args:
            x_BSD: their embeddings.
            state: what the call before returned; None begins.

        Returns:
            logits [B, S, L, E], and the state for the next call, without gradient.
        """
        state = state or self.initial_state(len(x_BSD))
        c_BSW = self.compress(x_BSD).relu()
        h_BSW, (h_2BW, cell_2BW) = self.recurrent(c_BSW, (state.h_2BW, state.cell_2BW))
        keys_BQW = torch.cat([state.past_BPW, h_BSW], dim=1)
        o_BSW = self._attend(h_BSW, keys_BQW, state.n_past_B) + self.residual(c_BSW)
        logits_BSLE = self.heads(o_BSW).unflatten(-1, (self.shape.n_layers, self.shape.n_experts))
        n_kept = self.shape.context - 1
        n_past_B = (state.n_past_B + h_BSW.shape[1]).clamp(max=n_kept)
        past_BPW = keys_BQW[:, keys_BQW.shape[1] - n_kept :].detach()
        return logits_BSLE, PredictorState(h_2BW.detach(), cell_2BW.detach(), past_BPW, n_past_B)

    def _attend(self, h_BSW: torch.Tensor, keys_BQW: torch.Tensor, n_past_B: torch.Tensor) -> torch.Tensor:
        n_kept, device = self.shape.context - 1, h_BSW.device
        first_S1 = torch.arange(h_BSW.shape[1], device=device)[:, None]
        place_Q = torch.arange(keys_BQW.shape[1], device=device)
        hidden_SQ = (place_Q < first_S1) | (place_Q > first_S1 + n_kept)
        hidden_BSQ = hidden_SQ | (place_Q < n_kept - n_past_B[:, None, None])
        scores_BSQ = (h_BSW @ keys_BQW.mT).masked_fill(hidden_BSQ, float("-inf"))
        return sparsemax(scores_BSQ) @ keys_BQW

"""Transformer-XL that tells classes of sentences apart.

The hidden state of a sentence's last token, which has seen all of it, goes through

    logits = W2 tanh(W1 h + b1) + b2

with dropout on the hidden units, as published. Sentences of a batch end at the same place and are padded
on the left.

Shapes: B sentences, S tokens of the longest, M memory, D model width, C classes (elsewhere: context).
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from megamoe.config.schema import ModelConfig, MoEConfig
from megamoe.models.attention import AttentionSpan
from megamoe.models.initialization import initialize
from megamoe.models.transformer_xl import Backbone, Trunk
from megamoe.moe.dropout import Dropout
from megamoe.moe.rooms import room
from megamoe.moe.routing import Routing


class ClassifierOutput(NamedTuple):
    """What one batch of sentences gives. A tuple, because DeepSpeed's hooks look for tensors in tuples.

    Attributes:
        loss_B: cross-entropy of each sentence in nats, fp32; None without labels.
        logits_BC: fp32.
        memory: for the next batch, L inputs of layers [B, M, D], without gradient.
        memory_padding_BM: True where a position of the memory is padding.
        routings: one per mixture layer, from below, of the tokens that are no padding.
        trunk: see `ModelOutput`.
    """

    loss_B: torch.Tensor | None
    logits_BC: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    memory_padding_BM: torch.Tensor
    routings: tuple[Routing, ...]
    trunk: Trunk | None = None


class Head(nn.Module):
    """Linear(D -> D), Tanh, Dropout, Linear(D -> C)."""

    def __init__(self, d_model: int, n_classes: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout, "head")
        self.output = nn.Linear(d_model, n_classes)

    def forward(self, x_BD: torch.Tensor, keys_B: torch.Tensor | None) -> torch.Tensor:
        """Logits [B, C]; `keys_B` as `Dropout` takes them."""
        return self.output(self.dropout(self.hidden(x_BD).tanh(), keys_B))


class Classifier(Backbone):
    """`TransformerXL` with a classification head in place of its output layer.

    The initial values depend on `seed` and the names of the parameters alone, so that the tensors it
    shares with a language model of the same config and seed have the same ones.

    Args:
        model: the backbone; its `vocab_size` must be set.
        moe: the mixture layers.
        n_classes: classes C.
        seed: the run's seed.
        settings: as `Backbone` takes them.

    Raises:
        ConfigError: the vocabulary is unknown or a setting does not fit the others.
    """

    def __init__(
        self, model: ModelConfig, moe: MoEConfig, *, n_classes: int, seed: int, **settings: Any
    ) -> None:
        super().__init__(model, moe, seed=seed, **settings)
        self.n_classes = n_classes
        self.head = Head(model.d_model, n_classes, model.dropout)
        initialize(self, model, seed)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        padding_BS: torch.Tensor,
        labels_B: torch.Tensor | None = None,
        memory: tuple[torch.Tensor, ...] | None = None,
        memory_padding_BM: torch.Tensor | None = None,
        *,
        top_k: int | None = None,
        step: int = 0,
        rows: range | None = None,
        span: AttentionSpan | None = None,
        trunk: Trunk | None = None,
    ) -> ClassifierOutput:
        """Read one batch of sentences.

        Args:
            input_ids_BS: tokens, int64, each sentence at the right end of its row.
            padding_BS: True in front of the sentences; what the tokens are there does not matter.
            labels_B: classes, int64; None computes no loss.
            memory: what the batch before returned; None starts without.
            memory_padding_BM: the same, to go with it.
            top_k: experts per token; None means `moe.top_k`.
            step: optimizer steps done, for dropout and policies that change with it.
            rows: rows of the global batch that these B are, for dropout; None means the first ones.
            span: how far back attention reaches; None means as in training.
            trunk: what a call with another k returned, for the same batch and memory of the layers in it;
                None reads from the embedding on.
        """
        span = span or self.span
        padding_BC = padding_BS
        if memory is not None and memory_padding_BM is not None:
            padding_BC = torch.cat([memory_padding_BM, padding_BS], dim=1)
        keys_BS = self.token_keys(input_ids_BS, step, rows)
        hidden_BSD, memory, routings, trunk = self.read(
            input_ids_BS, memory, top_k=top_k, step=step, span=span, keys_BS=keys_BS,
            padding_BC=padding_BC, trunk=trunk,
        )  # fmt: skip
        with room("loss"):
            logits_BC = self.head(hidden_BSD[:, -1], None if keys_BS is None else keys_BS[:, -1]).float()
            loss_B = None if labels_B is None else cross_entropy(logits_BC, labels_B, reduction="none")
        kept = padding_BC.shape[1] - memory[0].shape[1]
        return ClassifierOutput(loss_B, logits_BC, memory, padding_BC[:, kept:], routings, trunk)

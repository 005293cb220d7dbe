"""The published algorithm as a whole training step, in plain torch, written anew from its description.

Transformer-XL (Dai et al., ACL 2019) with a mixture of experts for every feed-forward network, as
HyperRouter (Do et al., EMNLP 2023) trains it: classic attention, fastmoe's layer under a generated router,
torch's dropout in every place, LayerNorm after each residual, tied softmax, memory of the inputs of every
layer, fp32, clipping by `clip_grad_norm_`, and torch's Adam with its defaults. The published code itself
needs CUDA and is not run.

Shapes: B batch, S segment, M memory, C = M + S, D model width. Time comes first, as published.
"""

import torch
from torch import nn
from torch.nn import functional

from benchmarks.side_by_side.peers.classic_attention import ClassicAttention
from benchmarks.side_by_side.peers.fastmoe import FastMoEExperts, FastMoELayer, HyperGate
from megamoe.config import RunConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routers import resolve_options

RENAMED = {"embedding.weights.0": "embedding", "output.biases.0": "output_bias"}
"""What is called otherwise in ours."""

Memory = list[torch.Tensor]


class _Layer(nn.Module):
    def __init__(self, run: RunConfig, top_k: int) -> None:
        super().__init__()
        model, moe = run.model, run.moe
        self.dropout = model.dropout
        self.attention = ClassicAttention(model.d_model, model.n_heads, model.d_head)
        self.attention_norm = nn.LayerNorm(model.d_model)
        hyper_size = resolve_options(moe.router).hyper_size
        self.moe = FastMoELayer(
            HyperGate(model.d_model, moe.n_experts, hyper_size),
            FastMoEExperts(model.d_model, moe.n_experts, moe.d_expert, model.dropout),
            top_k,
        )
        self.feed_forward_norm = nn.LayerNorm(model.d_model)

    def forward(self, x_SBD: torch.Tensor, memory_MBD: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        y_SBD = self.attention(torch.cat([memory_MBD, x_SBD]), *inputs)
        x_SBD = self.attention_norm(x_SBD + functional.dropout(y_SBD, self.dropout, self.training))
        y_SBD = self.moe(x_SBD.flatten(0, 1)).view_as(x_SBD)
        normed: torch.Tensor = self.feed_forward_norm(
            x_SBD + functional.dropout(y_SBD, self.dropout, self.training)
        )
        return normed


class PublishedModel(nn.Module):
    """The model, with the weights of ours.

    Args:
        run: its sizes, and the vocabulary; every layer has experts, under the hyper router.
        ours: the model whose weights are taken.
    """

    def __init__(self, run: RunConfig, top_k: int, ours: TransformerXL) -> None:
        super().__init__()
        model = run.model
        self.model = model
        self.embedding = nn.Parameter(torch.empty(model.vocab_size, model.d_model))
        self.output_bias = nn.Parameter(torch.empty(model.vocab_size))
        self.attention_bias_u = nn.Parameter(torch.empty(model.n_heads, model.d_head))
        self.attention_bias_v = nn.Parameter(torch.empty(model.n_heads, model.d_head))
        self.layers = nn.ModuleList(_Layer(run, top_k) for _ in range(model.n_layers))
        state = ours.state_dict()
        self.load_state_dict({RENAMED.get(name, name): value for name, value in state.items()})

    def forward(
        self, tokens_SB: torch.Tensor, targets_SB: torch.Tensor, memory: Memory | None
    ) -> tuple[torch.Tensor, Memory]:
        """Mean loss of a segment, and the memory for the next."""
        x_SBD = self._drop(functional.embedding(tokens_SB, self.embedding) * self.model.d_model**0.5)
        memory = memory or [x_SBD[:0].detach()] * len(self.layers)
        n_keys = len(memory[0]) + len(x_SBD)
        hidden_SC = torch.ones(len(x_SBD), n_keys, dtype=torch.bool).triu(1 + len(memory[0]))
        distances_CD = self._drop(self._encode(n_keys))
        new_memory = []
        for layer, memory_MBD in zip(self.layers, memory, strict=True):
            new_memory.append(torch.cat([memory_MBD, x_SBD])[-self.model.memory_len :].detach())
            x_SBD = layer(
                x_SBD, memory_MBD, distances_CD, hidden_SC, self.attention_bias_u, self.attention_bias_v
            )
        logits = functional.linear(self._drop(x_SBD), self.embedding, self.output_bias)
        return functional.cross_entropy(logits.flatten(0, 1), targets_SB.flatten()), new_memory

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.model.dropout, self.training)

    def _encode(self, n_keys: int) -> torch.Tensor:
        frequencies = 10000 ** -(torch.arange(0, self.model.d_model, 2) / self.model.d_model)
        angles = torch.outer(torch.arange(n_keys - 1, -1, -1.0), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PublishedTraining:
    """Training steps of the published algorithm."""

    def __init__(self, run: RunConfig, top_k: int) -> None:
        self.clip = run.training.grad_clip
        self.model = PublishedModel(run, top_k, TransformerXL(run.model, run.moe, seed=run.training.seed))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=run.optimizer.lr)
        self.memory: Memory | None = None

    def step(self, tokens_BN: torch.Tensor) -> float:
        """One step on [B, S + 1] tokens; its loss."""
        tokens_NB = tokens_BN.t().contiguous()
        self.optimizer.zero_grad()
        loss, self.memory = self.model(tokens_NB[:-1], tokens_NB[1:], self.memory)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return float(loss.detach())

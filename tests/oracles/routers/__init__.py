"""One module per routing policy, named as the policy: its equations as they read, token by token, in float64.

Each module has ``route(given: Given) -> Decided`` and, where the policy has options, ``CASES``, the
options to compare with. Nothing here uses `megamoe.moe.selection`, `megamoe.moe.losses` or the policy's
own code; random numbers are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megamoe.moe.routing import LayerSpec, RouterContext, Routing


@dataclass
class Given:
    """What a policy sees, in float64. Tensors of `state`, `x_TD` and `experts` may need gradients.

    Attributes:
        x_TD: the tokens.
        state: the router's parameters and buffers by name.
        options: the policy's options.
        training: whether the router is in training mode.
        context: step, seed, top-k, token ids, sequence and domain of each token, routing of the layer below.
        spec: the layer; its `uniform`, `gaussian`, `gumbel`, `lasting_uniform` and `generator` give the
            policy's random numbers.
        expert: output [D] of expert e for one token [D].
    """

    x_TD: torch.Tensor
    state: dict[str, torch.Tensor]
    options: Any
    training: bool
    context: RouterContext
    spec: LayerSpec
    expert: Callable[[int, torch.Tensor], torch.Tensor]

    @property
    def n_tokens(self) -> int:
        return len(self.x_TD)

    @property
    def n_experts(self) -> int:
        return self.spec.n_experts

    @property
    def top_k(self) -> int:
        return self.context.top_k

    @property
    def token_ids(self) -> list[int]:
        assert self.context.token_ids_T is not None
        return self.context.token_ids_T.tolist()

    @property
    def sequence(self) -> list[int]:
        assert self.context.sequence_T is not None
        return self.context.sequence_T.tolist()

    @property
    def previous(self) -> Routing:
        assert self.context.previous is not None
        return self.context.previous

    def mix(self, ids: Sequence[Sequence[int]], weights: Sequence[Sequence[Any]]) -> torch.Tensor:
        """y_t = sum over choices of weight times expert output; choices of -1 are left out."""
        rows = []
        for token, chosen, factors in zip(self.x_TD, ids, weights, strict=True):
            total = torch.zeros_like(token)
            for expert, weight in zip(chosen, factors, strict=True):
                if expert >= 0:
                    total = total + weight * self.expert(expert, token)
            rows.append(total)
        return torch.stack(rows)


@dataclass
class Decided:
    """What the policy must decide.

    Attributes:
        y_TD: output of the layer.
        ids: chosen experts of each token, in any order; those of -1 may be left out.
        losses: the policy's own losses by name; balance and z loss are not among them.
    """

    y_TD: torch.Tensor
    ids: list[list[int]]
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.double)
    for one, other in zip(a, b, strict=True):
        total = total + one * other
    return total


def linear_logits(given: Given) -> list[torch.Tensor]:
    """x W^T + b of each token, [E]; b only where the router has one."""
    weight_ED, bias_E = given.state["weight"], given.state.get("bias")
    return [
        torch.stack(
            [dot(row, token) + (0 if bias_E is None else bias_E[e]) for e, row in enumerate(weight_ED)]
        )
        for token in given.x_TD
    ]


def largest(scores: torch.Tensor, k: int) -> list[int]:
    """Places of the k largest scores, largest first, the earlier place on ties."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def softmax(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    powers = [torch.exp(value - max(v.item() for v in values)) for value in values]
    return [power / sum(powers) for power in powers]


def top_k_softmax(given: Given, logits: Sequence[torch.Tensor]) -> Decided:
    """The k largest logits, weighted by the softmax over those alone."""
    ids = [largest(row, given.top_k) for row in logits]
    weights = [softmax([row[e] for e in chosen]) for row, chosen in zip(logits, ids, strict=True)]
    return Decided(given.mix(ids, weights), ids)

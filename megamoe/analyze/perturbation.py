"""Whether a function suffers most where its experts or neurons are disturbed.

The model is scored on the samples of a function, in bits per token, before and while

* functional experts are masked: their choices are taken out, and the token's other choices get their
  weight. With a softmax over the chosen experts that is the routing with logits of minus infinity,
  k less by the masked ones; a token that has no other choice goes to no expert.
* activations of the function's neurons are replaced by m |z|, z from N(0, 1) and m the mean of the recorded
  activations of the layer.

Each is compared with as many other experts and neurons of the same layers, drawn at random.

Shapes: W samples, S tokens of each; T tokens of a batch, K choices of each, D model width, N tokens and
P choices at the experts, n choices of one expert, f disturbed neurons of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from megamoe.analyze.activations import batches
from megamoe.analyze.exchanges import standing_in
from megamoe.analyze.functions import Function
from megamoe.analyze.predictivity import Floats
from megamoe.analyze.settings import Settings
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.exchange import Arrived, LocalExchange
from megamoe.moe.experts import Experts
from megamoe.moe.initialization import generator
from megamoe.moe.layer import MoELayer
from megamoe.moe.randomness import hash_of
from megamoe.moe.selection import NO_EXPERT

Chosen = Sequence[npt.NDArray[np.integer]]
"""Experts, or neurons, of each mixture layer."""


class Masked(LocalExchange):
    """Sends no token to some experts."""

    def __init__(self, experts: npt.NDArray[np.integer], device: torch.device) -> None:
        self.masked = torch.from_numpy(experts).to(device)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor | None,
        n_experts: int,
        keys_T: torch.Tensor | None,
    ) -> Arrived:
        """Send tokens to the others, with the weight of all."""
        masked_TK = torch.isin(expert_ids_TK, self.masked)
        if weights_TK is not None:
            left_TK = weights_TK.masked_fill(masked_TK, 0)
            left_T1 = left_TK.sum(1, keepdim=True)
            gain_T1 = weights_TK.sum(1, keepdim=True) / left_T1.where(left_T1 > 0, 1)
            weights_TK = left_TK * gain_T1.where(masked_TK.any(1, keepdim=True), 1)
        ids_TK = expert_ids_TK.masked_fill(masked_TK, NO_EXPERT)
        return super().dispatch(x_TD, ids_TK, weights_TK, n_experts, keys_T)


class Noisy(LocalExchange):
    """Replaces activations of some neurons by noise.

    Args:
        experts: of the layer.
        neurons: numbers e * F + f.
        size: m.
        draws: of the noise.
    """

    def __init__(
        self, experts: Experts, neurons: npt.NDArray[np.integer], size: float, draws: torch.Generator
    ) -> None:
        self.experts, self.size, self.draws = experts, size, draws
        width = experts.w_in.shape[1]
        self.units = {int(e): neurons[neurons // width == e] % width for e in np.unique(neurons // width)}

    def bring_home(self, y_ND: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """The tokens' outputs, with what the noise changes in them."""
        y_ND = super().bring_home(y_ND, arrived)
        assert arrived.weights_P is not None
        for e, units in self.units.items():
            here_P = arrived.expert_P == e
            token_n, weight_n = arrived.token_P[here_P], arrived.weights_P[here_P]
            hidden_nf = linear(
                arrived.x_ND[token_n], self.experts.w_in[e, units], self.experts.b_in[e, units]
            )
            noise_nf = self.size * torch.randn(hidden_nf.shape, generator=self.draws).abs()
            change_nf = noise_nf.to(hidden_nf.device) - hidden_nf.relu_()
            change_nD = linear(change_nf, self.experts.w_out[e][:, units])
            y_ND.index_add_(0, token_n, (weight_n[:, None] * change_nD).to(y_ND.dtype))
        return y_ND


@dataclass(frozen=True)
class Disturbing:
    """A model that is disturbed on the samples of one function.

    Attributes:
        model: in evaluation mode.
        tokens_WS: the samples of the function.
        function: of which the labels are read here.
        settings: number and seed of draws.
        reading: `top_k` and `step` of the model.
    """

    model: TransformerXL
    tokens_WS: npt.NDArray[np.int64]
    function: Function
    settings: Settings
    reading: Mapping[str, int]

    def effects(self, functional: Chosen, neurons: Chosen, sizes: Sequence[float]) -> dict[str, Any]:
        """Rise of the bits per token on samples of label 1 ("own") and 0 ("others").

        Args:
            functional: functional experts of each layer.
            neurons: the function's neurons of each layer.
            sizes: mean activation of each layer.

        Returns:
            "before", and a list of effects for each of "experts", "random experts", "neurons" and "random
            neurons", where there is anything to disturb; the first of a random kind is the first draw.
        """
        before_W = self.bits()
        own_W = self.function.labels
        result: dict[str, Any] = {
            "before": {"own": float(before_W[own_W].mean()), "others": float(before_W[~own_W].mean())}
        }

        def effect(make: Callable[[int, MoELayer], LocalExchange]) -> dict[str, float]:
            with standing_in(self.model, make):
                rise_W = self.bits() - before_W
            return {"own": float(rise_W[own_W].mean()), "others": float(rise_W[~own_W].mean())}

        n_experts = self.model.moe_config.n_experts
        n_neurons = n_experts * self.model.moe_config.d_expert
        if any(map(len, functional)):
            draws = [self._others(functional, n_experts, draw) for draw in range(self.settings.draws)]
            result["experts"] = [effect(self._masked(functional))]
            result["random experts"] = [effect(self._masked(chosen)) for chosen in draws]
        draws = [self._others(neurons, n_neurons, draw) for draw in range(self.settings.draws)]
        result["neurons"] = [effect(self._noisy(neurons, sizes))]
        result["random neurons"] = [effect(self._noisy(chosen, sizes)) for chosen in draws]
        return result

    @torch.no_grad()
    def bits(self) -> Floats:
        """Bits per token of each sample, from its second token on, [W]."""
        losses = []
        for tokens_BS in batches(self.model, self.tokens_WS):
            loss_BS = self.model(tokens_BS[:, :-1], tokens_BS[:, 1:], **self.reading).loss_BS
            losses.append(loss_BS.double().mean(1).cpu())
        return torch.cat(losses).numpy() / math.log(2)

    def _others(self, chosen: Chosen, n: int, draw: int) -> Chosen:
        """As many others of each layer, or all others where they are fewer."""
        rng = np.random.default_rng(hash_of(self.settings.seed, self.function.name, "others", n, draw))
        rest = [np.setdiff1d(np.arange(n), of_layer) for of_layer in chosen]
        return [
            rng.choice(left, min(len(of_layer), len(left)), replace=False)
            for left, of_layer in zip(rest, chosen, strict=True)
        ]

    def _masked(self, chosen: Chosen) -> Callable[[int, MoELayer], LocalExchange]:
        device = next(self.model.parameters()).device
        return lambda i, _: Masked(chosen[i], device)

    def _noisy(self, chosen: Chosen, sizes: Sequence[float]) -> Callable[[int, MoELayer], LocalExchange]:
        def make(i: int, layer: MoELayer) -> LocalExchange:
            assert isinstance(layer.experts, Experts)
            return Noisy(layer.experts, chosen[i], sizes[i], generator(self.settings.seed, "noise", i))

        return make

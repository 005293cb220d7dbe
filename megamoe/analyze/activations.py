"""How strongly each neuron answers to each sample, and where the router sends the sample's tokens.

Neuron u of expert e is active on token t by h_teu = relu(w_in[e, u] . x_t + b_in[e, u]), and on a sample by

    a_eu = max over its tokens t of h_teu             (dense: every expert is asked about every token)
    a_eu = max over its tokens t of [e in E_t] h_teu  (routed: E_t are the experts that t is sent to)

Samples start without memory. The dense form is that of Zhang et al., "Emergent Modularity in Pre-trained
Transformers", Findings of ACL 2023, arXiv 2305.18390.

Shapes: L mixture layers, E experts, F hidden width of an expert, U = E * F neurons of a layer, neuron f of
expert e being e * F + f; W samples, S tokens of each; T tokens of a batch, K choices of each, D model width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from megamoe.analyze.exchanges import standing_in
from megamoe.analyze.settings import Settings
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.exchange import Arrived, LocalExchange
from megamoe.moe.experts import Experts
from megamoe.moe.layer import MoELayer

SAMPLES_AT_ONCE = 32


@dataclass(frozen=True)
class Activations:
    """What a model does on samples.

    Attributes:
        maxima_LUW: a of every neuron, fp32.
        choices_LWE: tokens of each sample that were sent to each expert.
    """

    maxima_LUW: npt.NDArray[np.float32]
    choices_LWE: npt.NDArray[np.int64]


@torch.no_grad()
def record(
    model: TransformerXL, tokens_WS: npt.NDArray[np.int64], settings: Settings, *, top_k: int, step: int
) -> Activations:
    """Run the model on samples.

    Args:
        model: in evaluation mode.
        tokens_WS: the samples.
        settings: `settings.mode` alone is read.
        top_k: experts per token.
        step: optimizer steps behind the model.
    """
    maxima, choices = [], []
    with standing_in(model, lambda _, layer: Recorder(layer, settings.mode)) as recorders:
        for tokens_BS in batches(model, tokens_WS):
            for recorder in recorders:
                recorder.begin(tokens_BS.shape[1])
            model(tokens_BS, top_k=top_k, step=step)
            maxima.append(torch.stack([recorder.maxima_WU.t().cpu() for recorder in recorders]))
            choices.append(torch.stack([recorder.choices_WE.cpu() for recorder in recorders]))
    return Activations(torch.cat(maxima, dim=2).numpy(), torch.cat(choices, dim=1).numpy())


def batches(model: TransformerXL, tokens_WS: npt.NDArray[np.int64]) -> list[torch.Tensor]:
    """The samples a few at a time, where the model is."""
    device = next(model.parameters()).device
    return [part.to(device) for part in torch.from_numpy(tokens_WS).split(SAMPLES_AT_ONCE)]


class Recorder(LocalExchange):
    """Looks at what is sent to the experts, before it is.

    Attributes:
        maxima_WU: largest activations over the tokens of each sample since `begin`, fp32.
        choices_WE: tokens of each sample that were sent to each expert since then.
    """

    maxima_WU: torch.Tensor
    choices_WE: torch.Tensor

    def __init__(self, layer: MoELayer, mode: str) -> None:
        assert isinstance(layer.experts, Experts)
        self.experts, self.mode = layer.experts, mode

    def begin(self, window: int) -> None:
        """The next tokens are those of samples of `window` tokens."""
        self._window, self._seen = window, False

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor | None,
        n_experts: int,
        keys_T: torch.Tensor | None,
    ) -> Arrived:
        """Look, and send them on. A policy may send several times, each token with other choices."""
        sent_TE = expert_ids_TK.new_zeros(len(x_TD), n_experts + 1)
        sent_TE = sent_TE.scatter_(1, expert_ids_TK.where(expert_ids_TK >= 0, n_experts), 1)[:, :n_experts]
        sent_WSE = sent_TE.unflatten(0, (-1, self._window))
        maxima_WU, choices_WE = self._maxima(x_TD, sent_WSE), sent_WSE.sum(1)
        if self._seen:
            maxima_WU, choices_WE = maxima_WU.maximum(self.maxima_WU), choices_WE + self.choices_WE
        self.maxima_WU, self.choices_WE, self._seen = maxima_WU, choices_WE, True
        return super().dispatch(x_TD, expert_ids_TK, weights_TK, n_experts, keys_T)

    def _maxima(self, x_TD: torch.Tensor, sent_WSE: torch.Tensor) -> torch.Tensor:
        x_WSD = x_TD.unflatten(0, (-1, self._window))
        maxima = []
        for e, (w_in, b_in) in enumerate(zip(self.experts.w_in, self.experts.b_in, strict=True)):
            hidden_WSF = linear(x_WSD, w_in, b_in).relu_()
            if self.mode == "routed":
                hidden_WSF *= sent_WSE[:, :, e, None]
            maxima.append(hidden_WSF.amax(1))
        return torch.cat(maxima, dim=1)

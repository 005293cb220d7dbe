"""Hash: the experts of a token are a fixed random function of its id.

    S = the k experts that a hash of (seed, layer, token id) puts first,  w_j = 1 / k

Nothing is learned and the context does not matter. Frequent tokens make their experts busy, as in the
paper's plain random hash.

Paper: Roller et al., "Hash Layers For Large Sparse Models", NeurIPS 2021, arXiv 2106.04426.
"""

from typing import Any

import torch

from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing
from megamoe.moe.selection import choose


class HashRouter(Router):
    """Experts looked up by token id."""

    summary = "fixed random experts for each token id"
    paper = "Roller et al., NeurIPS 2021, arXiv 2106.04426"

    @classmethod
    def products(cls, options: Any, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """None."""
        return []

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Look the experts up."""
        assert context.token_ids_T is not None, "policy 'hash' looks at RouterContext.token_ids_T"
        scores_TE = self.spec.lasting_uniform("table", context.token_ids_T, self.spec.n_experts)
        _, ids_TK = choose(scores_TE, context.top_k)
        return Routing(ids_TK, torch.full(ids_TK.shape, 1 / context.top_k, device=x_TD.device))

"""BASE: a linear assignment gives every expert equally many tokens in training.

    training: the assignment of the tokens of a sequence to experts, ceil(T / E) at most to each, with the
              largest sum of scores x v_e
    evaluation: e = argmax x v_e
    w = sigmoid(x v_e)

v starts orthogonal with rows of norm 0.1. The paper assigns the tokens of a batch; here each sequence is
assigned by itself, which makes the choice independent of how sequences are spread over batches and ranks.
It takes one expert whatever the top-k in force.

Paper: Lewis et al., "BASE Layers: Simplifying Training of Large, Sparse Models", ICML 2021,
arXiv 2103.16716.
"""

import torch

from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import choose, sequences


class BASERouter(LinearRouter):
    """One expert per token, by linear assignment in training."""

    summary = "one expert, balanced in training by a linear assignment"
    paper = "Lewis et al., ICML 2021, arXiv 2103.16716"
    cost = "1/k"
    causal = "evaluation"

    def initial_weight(self) -> torch.Tensor:
        """Orthogonal."""
        return self.spec.orthogonal("weight", (self.spec.n_experts, self.spec.d_model), gain=0.1)

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """One."""
        return 1

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Assign in training, take the best in evaluation."""
        logits_TE = self.logits(x_TD)
        if self.training:
            _, lengths_B = sequences(context, len(x_TD), x_TD.device)
            ids_TK = assign(logits_TE.detach(), lengths_B.tolist())[:, None]
        else:
            _, ids_TK = choose(logits_TE, 1)
        return Routing(ids_TK, logits_TE.gather(1, ids_TK).sigmoid(), logits_TE)


def assign(scores_TE: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The expert of each token [T]: balanced within each sequence, with the largest sum of scores."""
    from scipy.optimize import linear_sum_assignment

    n_experts = scores_TE.shape[1]
    assigned = []
    for scores_SE in scores_TE.cpu().split(lengths):
        room = -(-len(scores_SE) // n_experts)
        _, columns = linear_sum_assignment(scores_SE.repeat_interleave(room, 1).numpy(), maximize=True)
        assigned.append(torch.from_numpy(columns) // max(room, 1))
    return torch.cat(assigned).to(scores_TE.device)

"""SMoE-Dropout: the linear router of SMoE, random and frozen.

    g(x) = x W^T + b,  W ~ N(0, init_std^2) and b = 0 for ever
    S = top-k of g(x),  w_j = exp(g_j) / sum_{i in S} exp(g_i)  for j in S

The paper pairs it with a k that grows over training (`moe.schedule`).

Paper: Chen et al., "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers",
ICLR 2023, arXiv 2303.01610.
"""

from megamoe.moe.routers.smoe import SMoERouter


class SMoEDropoutRouter(SMoERouter):
    """Linear router that keeps its random start, held in fp32 buffers and saved with the model."""

    summary = "frozen random linear router, meant for a growing k"
    paper = "Chen et al., ICLR 2023, arXiv 2303.01610"
    learned = False

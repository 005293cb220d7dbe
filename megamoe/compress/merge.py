"""M-SMoE: seldom used experts are merged into the often used ones that the router takes them for.

1. Dominant experts are those chosen most often, over all layers, and one in each layer at least.
2. Every other expert joins the dominant one of its layer whose scores by the router are most like its own
   (cosine over tokens).
3. The units of a group are put into the order of the dominant expert's, and the group becomes their mean
   weighted by frequency.

The router keeps a row for every expert, so that choices do not change; those of a token that meet in one
group add their weights up.

Paper: Li et al., "Merge, Then Compress", ICLR 2024, arXiv 2310.01334.

Shapes: E experts, F hidden units, C numbers of a unit, G groups, D model width.
"""

from collections.abc import Mapping

import torch

from megamoe.compress.usage import Usage
from megamoe.convert.alignment import align


def dominant_experts(usage: Mapping[int, Usage], keep: float) -> dict[int, torch.Tensor]:
    """The fraction `keep` of all experts that is used most, by layer; ids [G] rising, G not the same."""
    frequencies_LE = torch.stack([used.frequency_E for used in usage.values()])
    n_layers, n_experts = frequencies_LE.shape
    n_dominant = max(n_layers, round(keep * frequencies_LE.numel()))
    # The best of each layer goes first, whatever its frequency.
    ranked_LE = frequencies_LE.scatter(1, frequencies_LE.argmax(1, keepdim=True), 2.0)
    best = ranked_LE.flatten().argsort(descending=True, stable=True)[:n_dominant]
    return {
        layer: (best[best // n_experts == place] % n_experts).sort().values
        for place, layer in enumerate(usage)
    }


def groups_of(products_EE: torch.Tensor, dominant_G: torch.Tensor) -> torch.Tensor:
    """The group of each expert, [E] int64; group g is that of expert dominant_G[g].

    Args:
        products_EE: see `Usage`.
        dominant_G: the experts that lead.
    """
    norms_E = products_EE.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    cosines_EG = (products_EE / norms_E / norms_E[:, None])[:, dominant_G]
    groups_E = cosines_EG.argmax(1)
    groups_E[dominant_G] = torch.arange(len(dominant_G))
    return groups_E


def aligned_to(designs_EFC: torch.Tensor, leaders_E: torch.Tensor) -> torch.Tensor:
    """Each expert with its units in the order of expert leaders_E[e]'s."""
    return torch.stack(
        [
            design_FC if leader == expert else design_FC[align(design_FC, designs_EFC[leader])]
            for expert, (design_FC, leader) in enumerate(zip(designs_EFC, leaders_E.tolist(), strict=True))
        ]
    )


def group_means(values: torch.Tensor, groups_E: torch.Tensor, frequency_E: torch.Tensor) -> torch.Tensor:
    """The means [G, ...] of groups of `values` [E, ...], weighted by frequency; plain where that is zero."""
    n_groups = int(groups_E.max()) + 1
    totals_G = frequency_E.new_zeros(n_groups).index_add_(0, groups_E, frequency_E)
    weights_E = torch.where(totals_G[groups_E] > 0, frequency_E, 1.0)
    totals_G = weights_E.new_zeros(n_groups).index_add_(0, groups_E, weights_E)
    shares_E = (weights_E / totals_G[groups_E]).view(-1, *[1] * (values.dim() - 1))
    return values.new_zeros(n_groups, *values.shape[1:]).index_add_(0, groups_E, shares_E * values)

"""The hidden units of an expert as rows of one matrix, its design matrix [w_in | b_in | w_out^T].

An expert is a sum over its hidden units, so their order is free: for a permutation P the rows P W give the
same function as W. The output bias belongs to no unit and stays outside.

Paper: Ai et al., "ResMoE", KDD 2025, arXiv 2503.06881, section 3.1.

Shapes: F hidden units, D model width, C = 2 D + 1 numbers of a unit.
"""

import torch


def design(w_in_FD: torch.Tensor, b_in_F: torch.Tensor, w_out_DF: torch.Tensor) -> torch.Tensor:
    """The design matrix [..., F, C] of one expert or of stacked ones."""
    return torch.cat([w_in_FD, b_in_F[..., None], w_out_DF.mT], dim=-1)


def split(rows_FC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w_in [..., F, D], b_in [..., F] and w_out [..., D, F] of any rows of units; views."""
    d_model = rows_FC.shape[-1] // 2
    return rows_FC[..., :d_model], rows_FC[..., d_model], rows_FC[..., d_model + 1 :].mT

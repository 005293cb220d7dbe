"""The hidden units of one network in the order of another's."""

import torch


def align(rows_FC: torch.Tensor, target_FC: torch.Tensor) -> torch.Tensor:
    """The order, [F] int64, in which the rows come nearest to the target: row order[f] belongs at f.

    It minimises ||P rows - target||^2 over all permutations P, exactly: norms do not depend on P, so this is
    the linear assignment with the largest sum of inner products. Takes F x F numbers and O(F^3) time.

    Args:
        rows_FC: finite, any float type; so is the target.
    """
    from scipy.optimize import linear_sum_assignment

    closeness_FF = target_FC.double() @ rows_FC.double().T
    return torch.from_numpy(linear_sum_assignment(closeness_FF.numpy(), maximize=True)[1])

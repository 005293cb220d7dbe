"""How many floating-point operations the matrix products of a step take."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def flop_counter() -> FlopCounterMode:
    """Counts what runs inside it, two for each multiply-add: torch's, with products that it leaves out."""
    return FlopCounterMode(
        display=False,
        custom_mapping={aten.addmm_: _added, aten.baddbmm_: _added, aten._grouped_mm: _product},
    )


def _added(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    return _product(left, right)


def _product(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Of two shapes; groups of a grouped product share the rows or columns of a matrix among them."""
    n_groups = left[0] if len(left) == 3 and len(right) == 2 else 1
    return 2 * prod(left) * right[-1] // n_groups

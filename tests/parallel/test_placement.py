import torch
from torch import nn

from megamoe.moe.experts import Experts
from megamoe.parallel.placement import global_shapes, placements, saved_buffers


class Model(nn.Module):
    """Experts 2 and 3 of 6 beside a shared weight."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 2)
        self.experts = Experts(6, 4, 5, dropout=0.0, init_std=0.1, seed=0, layer=0, local=range(2, 4))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_experts_lie_behind_those_of_lower_ranks():
    assert placements(Model()) == {
        "shared.weight": ((2, 3), 0),
        "shared.bias": ((2,), 0),
        "experts.w_in": ((6, 5, 4), 2 * 5 * 4),
        "experts.b_in": ((6, 5), 2 * 5),
        "experts.w_out": ((6, 4, 5), 2 * 4 * 5),
        "experts.b_out": ((6, 4), 2 * 4),
    }


def test_global_shapes_stack_the_experts():
    assert global_shapes(Model())["experts.w_in"] == (6, 5, 4)


def test_buffers_of_no_consequence_are_not_saved():
    assert list(saved_buffers(Model())) == ["table"]

"""What most policies start from: one linear score per expert."""

from typing import Any, ClassVar

import torch
from torch.nn import functional

from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Router


class LinearRouter(Router):
    """Logits g(x) = x W^T, or x W^T + b, in fp32; subclasses choose by them.

    Class attributes:
        has_bias: whether there is a b [E], started at 0.
        learned: whether they are trained; if not, they are fp32 buffers, saved with the model.
    """

    has_bias: ClassVar[bool] = False
    learned: ClassVar[bool] = True

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, spec: LayerSpec, options: Any) -> None:
        super().__init__(spec, options)
        self.keep("weight", self.initial_weight(), self.learned)
        if self.has_bias:
            self.keep("bias", torch.zeros(spec.n_experts), self.learned)

    @classmethod
    def products(cls, options: Any, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The logits."""
        return [Product(n_tokens, spec.d_model, spec.n_experts, gradients=2 if cls.learned else 1)]

    def initial_weight(self) -> torch.Tensor:
        """W [E, D] before training: N(0, init_std^2)."""
        return self.spec.normal("weight", (self.spec.n_experts, self.spec.d_model))

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """g(x) [T, E], at least fp32."""
        bias_E = at_least_fp32(self.bias) if self.has_bias else None
        return functional.linear(at_least_fp32(x_TD), at_least_fp32(self.weight), bias_E)

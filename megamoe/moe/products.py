"""Matrix products by their sizes, to count floating-point operations without computing any."""

from typing import NamedTuple


class Product(NamedTuple):
    """[rows, inner] times [inner, columns].

    Attributes:
        rows, inner, columns: sizes; means where a product is not made in every step.
        gradients: how many of its two operands have one, each of which costs as much as the product.
    """

    rows: float
    inner: int
    columns: int
    gradients: int = 2

    @property
    def forward(self) -> float:
        """Floating-point operations of the forward pass, two for each multiply-add."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def backward(self) -> float:
        """Those of the backward pass."""
        return self.gradients * self.forward

"""Stand between the router and the experts of a trained model, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from megamoe.models.transformer_xl import Backbone
from megamoe.moe.exchange import LocalExchange
from megamoe.moe.layer import MoELayer

Standing = TypeVar("Standing", bound=LocalExchange)


@contextmanager
def standing_in(model: Backbone, make: Callable[[int, MoELayer], Standing]) -> Iterator[list[Standing]]:
    """Exchange tokens of each mixture layer through what `make` makes of its number and itself.

    Layers are counted from 0 among the mixture layers. Outside the `with` block the model is as before.
    """
    before = [(layer, layer.exchange) for layer in model.moe_layers]
    standing = [make(i, layer) for i, layer in enumerate(model.moe_layers)]
    try:
        for layer, exchange in zip(model.moe_layers, standing, strict=True):
            layer.exchange = exchange
        yield standing
    finally:
        for layer, was in before:
            layer.exchange = was

"""When which mixture layer of CompeteSMoE competes, as a function of the seed and the step alone.

Steps are planned in blocks, lower layers first, so that a run needs no horizon, every rank finds the same
plan without a message, and a resumed run goes on with it.
"""

from functools import lru_cache

import torch

from megamoe.moe.initialization import generator

BLOCK = 1000
"""Steps planned together: competitions that have to move stay within them."""


def competes(step: int, depth: int, seed: int, rate: float, warm_up_steps: int, layers_at_once: int) -> bool:
    """Whether mixture layer `depth` (0 is the lowest) competes at `step`.

    Args:
        rate: chance of each layer and step.
        warm_up_steps: steps before the first competition.
        layers_at_once: layers that compete in one step at most; a drawn layer moves to the nearest earlier
            step with room, else to the nearest later one, else is left out. 0: any number.
    """
    if step < warm_up_steps:
        return False
    block, place = divmod(step - warm_up_steps, BLOCK)
    return place in plan(block, depth, seed, rate, layers_at_once)[depth]


@lru_cache(maxsize=256)
def plan(block: int, depth: int, seed: int, rate: float, layers_at_once: int) -> tuple[frozenset[int], ...]:
    """The competing steps of layers 0 to `depth` within a block. Higher layers do not change lower ones."""
    below = plan(block, depth - 1, seed, rate, layers_at_once) if depth else ()
    taken = [sum(place in layer for layer in below) for place in range(BLOCK)]
    draws = torch.rand(BLOCK, generator=generator(seed, "competition", block, depth)) < rate
    own: set[int] = set()
    for place in draws.nonzero().flatten().tolist():
        free = [p for p in range(BLOCK) if p not in own and not 0 < layers_at_once <= taken[p]]
        earlier = [p for p in free if p <= place]
        if place in free:
            own.add(place)
        elif free:
            own.add(earlier[-1] if earlier else free[0])
    return (*below, frozenset(own))

"""Do something on every rank such that all of them succeed or all of them raise."""

from collections.abc import Callable
from typing import TypeVar

from megamoe.errors import CheckpointError, MegaMoEError
from megamoe.parallel.launch import World

T = TypeVar("T")


def on_all_ranks(world: World, what: str, action: Callable[[], T]) -> T:
    """What `action` returned on this rank. Every rank must call this, and none waits for a failed one.

    Args:
        what: what is being done, for the message.

    Raises:
        CheckpointError: on every rank, with the failure of the first rank that failed.
    """
    result: T | None = None
    problem: str | None = None
    cause: Exception | None = None
    try:
        result = action()
    except Exception as error:
        kind = "" if isinstance(error, MegaMoEError) else f"{type(error).__name__}: "
        problem, cause = f"{kind}{error}", error
    for rank, failed in enumerate(world.gather_objects(problem)):
        if failed is not None:
            raise CheckpointError(f"{what}: failed on rank {rank}: {failed}") from cause
    return result  # type: ignore[return-value]

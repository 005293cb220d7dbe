"""Names for the parts of a training step, so that a profile can tell where its time goes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function

PREFIX = "megamoe::"
_NOWHERE: AbstractContextManager[None] = nullcontext()


def room(name: str) -> AbstractContextManager[Any]:
    """What runs inside belongs to room `name`, or to one that is entered inside.

    While nothing is recorded it costs less than a microsecond.
    """
    return record_function(PREFIX + name) if _profiler_enabled() else _NOWHERE

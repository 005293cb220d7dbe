"""The processes that prepare a corpus together: one, or those that mpirun or srun started.

The only file that knows mpi4py, which is loaded where a launcher started several processes.
"""

import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from megamoe.errors import DistributedError, MegaMoEError
from megamoe.launchers import rank_and_size

Value = TypeVar("Value")
Result = TypeVar("Result")

_POLL_SECONDS = 0.005
INTERRUPTED = 130


class Ranks:
    """Processes that run the same program, each on its share; this form is one process alone.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process makes folders and speaks for all."""
        return self.rank == 0

    def label(self, text: str) -> str:
        """What to call the share of `text` that this rank reads, for people."""
        return text if self.size == 1 else f"{text}, share {self.rank + 1} of {self.size}"

    def share(self, n: int) -> tuple[int, int]:
        """First and last + 1 of the items of n that are this rank's; shares are in order of rank."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def combine(self, value: Value, merge: Callable[[list[Value]], Result]) -> Result:
        """``merge([value of rank 0, of rank 1, ...])``, computed by rank 0, on every rank.

        All ranks must call it alike. It is the one thing that they do together, so an exception that
        leaves `together` on one rank is raised from here on the others.
        """
        return merge([value])

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks leave at once: by the end, or by the exception of one of them."""
        yield


ALONE = Ranks()


@contextmanager
def open_ranks(environ: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The processes that were started together; an exception on one of them is raised on all.

    Ctrl-C or SIGTERM on one rank ends all: it unwinds on its own, and the others are ended by MPI.

    Raises:
        DistributedError: several processes were started, and mpi4py cannot join them.
    """
    _, size = rank_and_size(environ)
    if size == 1:
        yield ALONE
        return
    ranks = _MPIRanks(size)
    try:
        with ranks.together():
            yield ranks
    except (KeyboardInterrupt, SystemExit) as stop:
        code = getattr(stop, "code", INTERRUPTED)
        ranks.abort(code if isinstance(code, int) else 1)


class _MPIRanks(Ranks):
    def __init__(self, size: int) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
            reason = str(error).partition("\n")[0]
            raise DistributedError(
                f"{size} processes: mpi4py cannot be loaded ({reason}); pip install 'megamoe[mpi]' beside"
                " an MPI, or start one process without mpirun and srun"
            ) from None
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        if self.size != size:
            # Each process would take itself for the only one, and all would write the same folder.
            raise DistributedError(
                f"{size} processes: mpi4py finds {self.size}; use the mpirun of the MPI that mpi4py loads, or"
                " srun with the --mpi type that this MPI speaks (srun --mpi=list)"
            )
        self._raised: Exception | None = None

    def combine(self, value: Value, merge: Callable[[list[Value]], Result]) -> Result:
        return self._exchange(value, None, merge)

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # What `combine` raised, it raised on every rank.
            if error is not self._raised:
                self._exchange(None, error, lambda _: None)
            raise
        self._exchange(None, None, lambda _: None)

    def abort(self, code: int) -> NoReturn:
        """End all ranks, wherever they are."""
        self._comm.Abort(code)
        raise AssertionError("MPI_Abort returned")

    def _exchange(self, value: Any, error: Exception | None, merge: Callable[[list[Any]], Any]) -> Any:
        self._wait()
        outcomes = self._comm.gather((value, self._portable(error)))
        answer: tuple[Any, Exception | None] = None, None
        if outcomes:
            errors = [error for _, error in outcomes if error]
            try:
                answer = (None, errors[0]) if errors else (merge([value for value, _ in outcomes]), None)
            except Exception as failure:
                answer = None, self._portable(failure)
        self._wait()
        result, self._raised = self._comm.bcast(answer)
        if self._raised:
            raise self._raised
        return result

    def _wait(self) -> None:
        """Until all ranks are here. MPI's own waiting keeps a core busy and defers signals."""
        arrival = self._comm.Ibarrier()
        while not arrival.Test():
            time.sleep(_POLL_SECONDS)

    def _portable(self, error: Exception | None) -> Exception | None:
        """`error` as one that can be sent, with the traceback of a bug in its notes."""
        if error is None or isinstance(error, MegaMoEError):
            return error
        error.add_note(f"on rank {self.rank}:\n{''.join(traceback.format_exception(error))}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError("".join(traceback.format_exception(error)))
        return error

"""A few steps of real training runs on real ranks, of which every rank keeps accounts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.cases import Case
from benchmarks.accuracy.states import GradientWatch, States, states
from benchmarks.accuracy.traffic import TrafficCounter
from benchmarks.side_by_side.ours import one_rank
from benchmarks.side_by_side.space import storages
from megamoe.parallel.launch import forget_groups
from megamoe.training.profile.flops import flop_counter
from megamoe.training.run_folder import RunFolder
from megamoe.training.session import load_checked_corpus, with_vocabulary
from megamoe.training.trainer import Trainer

WARMUP_STEPS = 4
"""The memory of Transformer-XL is full then, and all states exist."""

STEPS = 6

NOWHERE = RunFolder(Path("nowhere"))
"""Nothing is written."""


@dataclass(frozen=True)
class Account:
    """What one rank holds, sends and computes.

    Attributes:
        states: bytes from step to step.
        memory: bytes of Transformer-XL's memory.
        gradients, reducing, updating: most bytes; see `GradientWatch`.
        sent: bytes of one step by phase and collective.
        flops: of one step.
    """

    states: States
    memory: int
    gradients: int
    reducing: int
    updating: int
    sent: dict[tuple[str, str], float]
    flops: float


class AccountingTrainer(Trainer):
    """Takes a few steps in place of training to the end; nothing is logged or saved."""

    def account(self, n_steps: int) -> Account:
        """Of this rank, over `n_steps` steps after some that do not count."""
        self._take(WARMUP_STEPS)
        with (
            flop_counter() as flops,
            GradientWatch(self.engine) as watch,
            TrafficCounter(lambda: self._heartbeat.phase, watch.look) as traffic,
        ):
            self._take(n_steps)
        return Account(
            states=states(self.engine),
            memory=sum(storages(layer for memory in self.memories for layer in memory or ()).values()),
            gradients=watch.gradients,
            reducing=watch.reducing,
            updating=watch.updating,
            sent={key: n_bytes / n_steps for key, n_bytes in traffic.sent.items()},
            flops=flops.get_total_flops() / n_steps,
        )

    def _take(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self._train_step()


def accounts_here(cases: Sequence[Case], n_steps: int) -> list[Account]:
    """Those of this rank, one for each case; all are of as many ranks as this process is one of."""
    return list(_accounts(cases, n_steps))


def _accounts(cases: Sequence[Case], n_steps: int) -> Iterator[Account]:
    world = one_rank()
    corpus = load_checked_corpus(cases[0].run())
    for case in cases:
        forget_groups()
        trainer = AccountingTrainer(
            with_vocabulary(case.run(), corpus), case.ds_config(), world, corpus, NOWHERE
        )
        yield trainer.account(n_steps)
        trainer.engine.close()

"""Which node is the odd one out: findings from measurements, without communication."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from megamoe.training.preflight.needs import Needs

SLOW = 0.5
"""A rank below this part of the median is named."""


@dataclass(frozen=True)
class Facts:
    """What one rank measured. Speeds in bytes/s, sizes in bytes, the clock in seconds ahead of rank 0.

    Attributes:
        link: of its best pair with a rank elsewhere: a slow node has no fast pair; 0 without a pair.
        ranks_on_host: processes that share `memory_free`.
        shared_folder: whether this rank sees what rank 0 wrote into the checkpoint folder.
        disk_error: why the checkpoint folder cannot be used; empty if it can.
    """

    rank: int
    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    memory_free: int = 0
    ranks_on_host: int = 1
    link: float = 0.0
    clock: float = 0.0
    disk_write: float = 0.0
    disk_read: float = 0.0
    disk_free: int = 0
    shared_folder: bool = True
    disk_error: str = ""

    @property
    def place(self) -> str:
        """For people."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Finding:
    """One line; `stops` if the run could not go on with it."""

    stops: bool
    text: str


def judge(facts: Sequence[Facts], needs: Needs, kept: int, max_skew: float) -> list[Finding]:
    """All findings, those that would stop the run first.

    Args:
        facts: of all ranks.
        needs: of the run.
        kept: checkpoints that lie on disk at once.
        max_skew: seconds by which clocks may differ.
    """
    found = [*_versions(facts), *_memory(facts, needs), *_disk(facts, needs, kept)]
    for name, label in (("link", "link"), ("disk_write", "disk write"), ("disk_read", "disk read")):
        found += _slow(facts, name, label)
    middle = median(fact.clock for fact in facts)
    for fact in facts:
        if abs(fact.clock - middle) > max_skew:
            skew = (fact.clock - middle) * 1000
            found.append(Finding(False, f"{fact.place}: clock is {skew:+.0f} ms off the median"))
    return sorted(found, key=lambda finding: not finding.stops)


def _versions(facts: Sequence[Facts]) -> list[Finding]:
    found = []
    for name in facts[0].versions:
        usual, _ = Counter(fact.versions.get(name, "") for fact in facts).most_common(1)[0]
        for fact in facts:
            value = fact.versions.get(name, "")
            if value != usual:
                found.append(Finding(True, f"{fact.place}: {name} is {value}, elsewhere {usual}"))
    return found


def _memory(facts: Sequence[Facts], needs: Needs) -> list[Finding]:
    return [
        Finding(True, f"{fact.place}: {gb(fact.memory_free)} memory free for {fact.ranks_on_host} rank(s)"
                      f" that need {gb(needs.memory)} each for weights, gradients and optimizer")
        for fact in facts
        if fact.memory_free < needs.memory * fact.ranks_on_host
    ]  # fmt: skip


def _disk(facts: Sequence[Facts], needs: Needs, kept: int) -> list[Finding]:
    found = []
    for fact in facts:
        if fact.disk_error:
            found.append(Finding(True, f"{fact.place}: checkpoint folder: {fact.disk_error}"))
        elif not fact.shared_folder:
            found.append(Finding(True, f"{fact.place}: checkpoint folder is not the one rank 0 sees"))
        elif fact.disk_free < needs.checkpoint * kept:
            found.append(Finding(True, f"{fact.place}: checkpoint folder has {gb(fact.disk_free)}"
                                       f" free, {kept} checkpoints need {gb(needs.checkpoint * kept)}"))  # fmt: skip
    return found


def _slow(facts: Sequence[Facts], name: str, label: str) -> list[Finding]:
    speeds = {fact.place: getattr(fact, name) for fact in facts if getattr(fact, name) > 0}
    middle = median(speeds.values()) if speeds else 0.0
    return [
        Finding(False, f"{place}: {label} {speed / 1e6:.0f} MB/s, median {middle / 1e6:.0f} MB/s")
        for place, speed in speeds.items()
        if speed < SLOW * middle
    ]


def gb(n_bytes: float) -> str:
    """Decimal gigabytes for people."""
    return f"{n_bytes / 1e9:.2f} GB"

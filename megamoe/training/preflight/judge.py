"""Which node is the odd one out: findings from measurements, without communication."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from megamoe.training.preflight.facts import Facts
from megamoe.training.preflight.needs import Needs

SLOW = 0.5
"""A node below this part of the median is named."""
SPEEDS = {"link": "link", "disk_write": "disk write", "disk_read": "disk read"}


@dataclass(frozen=True)
class Finding:
    """One line; `stops` if it would stop the run, or make it another one than was meant."""

    stops: bool
    text: str


def judge_versions(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """What differs between ranks, by their place; those against the majority are named, if there is one."""
    found = []
    for name in next(iter(versions.values())):
        values = {place: own[name] for place, own in versions.items()}
        counts = Counter(values.values()).most_common()
        usual, n_usual = counts[0]
        if len(counts) == 1:
            continue
        if 2 * n_usual > len(values):
            odd = [(place, value) for place, value in values.items() if value != usual]
            found += [Finding(True, f"{place}: {name} is {value}, elsewhere {usual}") for place, value in odd]
        else:
            all_values = ", ".join(f"{value} at {place}" for place, value in values.items())
            found.append(Finding(True, f"{name} differs: {all_values}"))
    return found


def judge(facts: Sequence[Facts], needs: Needs, kept: int, max_skew: float) -> list[Finding]:
    """What the measurements say, problems first.

    Args:
        facts: of all ranks.
        needs: of the run.
        kept: checkpoints that lie on disk at once.
        max_skew: seconds by which clocks may differ.
    """
    places = by_place(facts)
    found = [
        finding
        for place, there in places.items()
        for finding in (*_memory(place, there, needs), *_disk(place, there, needs.checkpoint, kept))
    ]
    for name, label in SPEEDS.items():
        found += _slow({place: _typical(there, name) for place, there in places.items()}, label)
    found += _clocks({place: _typical(there, "clock") for place, there in places.items()}, max_skew)
    return sorted(found, key=lambda finding: not finding.stops)


def by_place(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """The ranks of each node, or each rank of one node alone; by what to call it."""
    hosts = {fact.host for fact in facts}
    places: dict[str, list[Facts]] = {}
    for fact in facts:
        places.setdefault(fact.host if len(hosts) > 1 else f"rank {fact.rank}", []).append(fact)
    return places


def _typical(facts: Sequence[Facts], name: str) -> float:
    return median(getattr(fact, name) for fact in facts)


def _memory(place: str, facts: Sequence[Facts], needs: Needs) -> list[Finding]:
    fact = min(facts, key=lambda fact: fact.memory_free / fact.ranks_on_host)
    if fact.memory_free >= needs.memory * fact.ranks_on_host:
        return []
    ranks = "a rank" if fact.ranks_on_host == 1 else f"{fact.ranks_on_host} ranks"
    return [
        Finding(
            True,
            f"{place}: {gb(fact.memory_free)} of memory free; {ranks} here need"
            f" {gb(needs.memory * fact.ranks_on_host)} for weights, gradients and optimizer alone",
        )
    ]


def _disk(place: str, facts: Sequence[Facts], checkpoint: int, kept: int) -> list[Finding]:
    errors = [fact.disk_error for fact in facts if fact.disk_error]
    if errors:
        return [Finding(True, f"{place}: checkpoint folder cannot be used: {errors[0]}")]
    if not all(fact.shared_folder for fact in facts):
        return [Finding(True, f"{place}: its checkpoint folder is not the one that rank 0 sees")]
    free = min(fact.disk_free for fact in facts)
    if free < checkpoint * kept:
        needed = f"{kept} checkpoints need {gb(checkpoint * kept)}"
        return [Finding(True, f"{place}: checkpoint folder has {gb(free)} free, {needed}")]
    return []


def _slow(speeds: Mapping[str, float], label: str) -> list[Finding]:
    measured = {place: speed for place, speed in speeds.items() if speed > 0}
    usual = median(measured.values()) if measured else 0.0
    return [
        Finding(False, f"{place}: {label} {speed / 1e6:.0f} MB/s, the median is {usual / 1e6:.0f} MB/s")
        for place, speed in measured.items()
        if speed < SLOW * usual
    ]


def _clocks(clocks: Mapping[str, float], max_skew: float) -> list[Finding]:
    if len(clocks) == 2:
        (first, early), (second, late) = sorted(clocks.items(), key=lambda item: item[1])
        skew = late - early
        text = f"{second}: clock is {skew * 1000:.0f} ms ahead of {first}'s; one of the two is wrong"
        return [Finding(False, text)] if skew > max_skew else []
    usual = median(clocks.values())
    return [
        Finding(False, f"{place}: clock is {(clock - usual) * 1000:+.0f} ms off the median")
        for place, clock in clocks.items()
        if abs(clock - usual) > max_skew
    ]


def gb(n_bytes: float) -> str:
    """Decimal gigabytes for people."""
    return f"{n_bytes / 1e9:.2f} GB"

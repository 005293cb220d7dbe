"""Which node is the odd one out, and what the run would take: from measurements, without communication."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from megamoe.plan.units import flop_rate, size, speed
from megamoe.training.preflight.facts import Facts
from megamoe.training.preflight.needs import Needs

SLOW = 0.5
"""A node below this part of the median is named."""
SPEEDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "flops": ("arithmetic", flop_rate),
    "link": ("link", speed),
    "disk_write": ("disk write", speed),
    "disk_read": ("disk read", speed),
}


Speeds = Mapping[str, Mapping[int, float]]
"""Bytes/s by collective and bytes of a message."""


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


def judge(
    facts: Sequence[Facts], needs: Needs, seconds: Mapping[str, float], *, kept: int, patience: float,
    max_skew: float,
) -> list[Finding]:  # fmt: skip
    """What the measurements say, problems first.

    Args:
        facts: of all ranks.
        needs: of the run.
        seconds: what `seconds_of` says of them.
        kept: checkpoints that lie on disk at once.
        patience: seconds after which a run that does not move on ends; 0: never.
        max_skew: seconds by which clocks may differ.
    """
    places = by_place(facts)
    found = [
        finding
        for place, there in places.items()
        for finding in (*_memory(place, there, needs), *_disk(place, there, needs.checkpoint, kept))
    ]
    for name, (label, shown) in SPEEDS.items():
        found += _slow({place: _typical(there, name) for place, there in places.items()}, label, shown)
    found += _clocks({place: _typical(there, "clock") for place, there in places.items()}, max_skew)
    found += _times(seconds, patience)
    return sorted(found, key=lambda finding: not finding.stops)


def seconds_of(facts: Sequence[Facts], needs: Needs, speeds: Speeds) -> dict[str, float]:
    """How long a step takes for "all_reduce", "all_to_all", "arithmetic", and a "checkpoint" to be written.

    Nothing overlaps in these figures; in training some of it does. Of the ranks, the slowest counts.
    """
    rows, slowest = needs.all_to_all_message, min(fact.disk_write for fact in facts)
    return {
        "all_reduce": _seconds(needs.all_reduce, needs.all_reduce, speeds["all_reduce"]),
        "all_to_all": _seconds(needs.all_to_all, rows, speeds["all_to_all"]),
        "arithmetic": needs.flops / min(fact.flops for fact in facts),
        "checkpoint": needs.checkpoint / len(facts) / slowest if slowest else 0.0,
    }


def _seconds(n_bytes: int, message: int, speeds: Mapping[int, float]) -> float:
    """At the speed of the message nearest in size."""
    return n_bytes / speeds[min(speeds, key=lambda size: abs(size - message))] if speeds else 0.0


def by_place(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """The ranks of each node, or each rank of one node alone; by what to call it."""
    hosts = {fact.host for fact in facts}
    places: dict[str, list[Facts]] = {}
    for fact in facts:
        places.setdefault(fact.host if len(hosts) > 1 else f"rank {fact.rank}", []).append(fact)
    return places


def _typical(facts: Sequence[Facts], name: str) -> float:
    return median(getattr(fact, name) for fact in facts)


def _memory(place: str, facts: Sequence[Facts], needs: Needs) -> Iterator[Finding]:
    gpus = [fact.gpu_free for fact in facts if fact.gpu_free is not None]
    if gpus and min(gpus) < needs.memory:
        yield _short(place, min(gpus), "GPU memory", "a rank needs", needs.memory)
    fact = min(facts, key=lambda fact: fact.host_free / fact.ranks_on_host)
    needed = (needs.host_memory + (0 if gpus else needs.memory)) * fact.ranks_on_host
    if fact.host_free < needed:
        ranks = "a rank here needs" if fact.ranks_on_host == 1 else f"{fact.ranks_on_host} ranks here need"
        yield _short(place, fact.host_free, "host memory", ranks, needed)


def _short(place: str, free: int, kind: str, ranks: str, needed: int) -> Finding:
    return Finding(
        True, f"{place}: {size(free)} of {kind} free; {ranks} {size(needed)} before activations"
    )  # fmt: skip


def _disk(place: str, facts: Sequence[Facts], checkpoint: int, kept: int) -> list[Finding]:
    errors = [fact.disk_error for fact in facts if fact.disk_error]
    if errors:
        return [Finding(True, f"{place}: checkpoint folder cannot be used: {errors[0]}")]
    if not all(fact.shared_folder for fact in facts):
        return [Finding(True, f"{place}: its checkpoint folder is not the one that rank 0 sees")]
    free = min(fact.disk_free for fact in facts)
    if free < checkpoint * kept:
        needed = f"{kept} checkpoints need {size(checkpoint * kept)}"
        return [Finding(True, f"{place}: checkpoint folder has {size(free)} free, {needed}")]
    return []


def _times(seconds: Mapping[str, float], patience: float) -> Iterator[Finding]:
    writing, computing = seconds["checkpoint"], seconds["arithmetic"]
    talking = seconds["all_reduce"] + seconds["all_to_all"]
    if 0 < patience < writing:
        text = f"a checkpoint takes {writing:.3g} s to write, more than training.hang_timeout = {patience:g}"
        yield Finding(True, text)
    if talking > computing:
        text = f"{talking:.2g} s of communication a step for {computing:.2g} s of arithmetic"
        yield Finding(False, f"the network bounds this run: {text}")


def _slow(speeds: Mapping[str, float], label: str, shown: Callable[[float], str]) -> list[Finding]:
    measured = {place: value for place, value in speeds.items() if value > 0}
    usual = median(measured.values()) if measured else 0.0
    return [
        Finding(False, f"{place}: {label} {shown(value)}, the median is {shown(usual)}")
        for place, value in measured.items()
        if value < SLOW * usual
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

"""How much memory a rank may still take."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MINE = Path("/proc/self/cgroup")


def free_gpu_memory(device: torch.device) -> int | None:
    """Bytes free on the GPU of a rank; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def free_host_memory(control_groups: Path = CONTROL_GROUPS, mine: Path = MINE) -> int:
    """Bytes that the node gives without swapping, and that the control groups of this process allow.

    Args:
        control_groups: where the kernel shows them, in version 1 or 2.
        mine: which of them this process is in.
    """
    return min([psutil.virtual_memory().available, *_left(control_groups, mine)])


def _left(control_groups: Path, mine: Path) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in mine.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names = ("memory.max", "memory.current", "inactive_file")
                yield from _left_in(control_groups, path, *names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _left_in(control_groups / "memory", path, *names)


def _left_in(root: Path, path: str, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    """What is left in a group and in each that it is part of."""
    group = root / path.lstrip("/")
    for place in (group, *group.parents):
        if not place.is_relative_to(root):
            return
        with suppress(OSError, ValueError):  # no limit at this level: no file, or the word "max"
            most = int((place / limit).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (place / "memory.stat").read_text("ascii").splitlines())
            # Cached files are given up before memory runs out.
            yield most - int((place / used).read_text(encoding="ascii")) + int(stat.get(reclaimable, 0))

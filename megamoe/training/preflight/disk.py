"""Speed and room of the checkpoint folder; nothing stays behind."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from megamoe.parallel.launch import World

BYTES = 32 << 20


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists: preflight makes none."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def measure_disk(world: World, folder: Path, token: str) -> dict[str, Any]:
    """Fields of `Facts` that begin with "disk", and whether all ranks see one folder.

    Args:
        world: every rank calls this.
        folder: where the run will write.
        token: equal on all ranks, different for each preflight.
    """
    place = existing(folder)
    mine = place / f".preflight-{token}-{world.rank}"
    facts: dict[str, Any] = {}
    try:
        try:
            facts = _write_and_read(mine)
            facts["disk_free"] = shutil.disk_usage(place).free
        except OSError as error:
            facts["disk_error"] = f"{place}: {error.strerror or error}"
        world.barrier()
        written = world.gather_objects(not facts.get("disk_error"))
        facts["shared_folder"] = not written[0] or (place / f".preflight-{token}-0").exists()
        world.barrier()
    finally:
        mine.unlink(missing_ok=True)
    return facts


def _write_and_read(path: Path) -> dict[str, Any]:
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with path.open("xb") as file:
        for _ in range(BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 20):
            pass
    read = time.perf_counter()
    return {"disk_write": BYTES / (written - began), "disk_read": BYTES / (read - written)}

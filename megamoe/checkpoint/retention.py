"""Which checkpoints of a run are kept."""

from pathlib import Path

from megamoe.checkpoint.folder import remove
from megamoe.checkpoint.format import step_folders
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.errors import CheckpointError


def prune(checkpoints: Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Delete old checkpoints; one rank calls this after a save.

    Torn ones are left for people to look at and do not count, so the newest complete one always stays.

    Args:
        checkpoints: folder of ``step-*`` folders; nothing else in it is touched.
        keep_last: newest complete checkpoints that are kept.
        keep_every: also keep steps that are a multiple of this; 0: none.

    Returns:
        What was deleted, oldest first.
    """
    deleted: list[Path] = []
    n_newer = 0  # complete ones
    for step, path in reversed(step_folders(checkpoints)):
        stays = keep_every and step % keep_every == 0
        if n_newer >= keep_last and stays:  # a long run has many, and opening one takes a while
            continue
        if not _is_complete(path):
            continue
        n_newer += 1
        if n_newer > keep_last:
            remove(path)
            deleted.append(path)
    return deleted[::-1]


def _is_complete(path: Path) -> bool:
    try:
        CheckpointReader(path)
    except CheckpointError:
        return False
    return True

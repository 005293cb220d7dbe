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
        What was deleted.
    """
    complete = [(step, path) for step, path in step_folders(checkpoints) if _is_complete(path)]
    deleted = []
    for step, path in complete[:-keep_last]:
        if not keep_every or step % keep_every:
            remove(path)
            deleted.append(path)
    return deleted


def _is_complete(path: Path) -> bool:
    try:
        CheckpointReader(path)
    except CheckpointError:
        return False
    return True

"""A checkpoint's folder as one atomic thing: fill it under a hidden name, then rename it.

`.NAME.tmp` is being filled or deleted and is never read; `.NAME.old` is what NAME was before it was
replaced and counts only while NAME is missing.
"""

import os
import re
import shutil
from pathlib import Path

from megamoe.checkpoint.format import BEST

_LEFTOVER = re.compile(rf"\.(step-\d{{9,}}|{BEST})\.(tmp|old)")


def temporary(folder: Path) -> Path:
    """Where `folder` is filled before it gets its name."""
    return folder.with_name(f".{folder.name}.tmp")


def replaced(folder: Path) -> Path:
    """Where the former `folder` waits while the new one takes its name."""
    return folder.with_name(f".{folder.name}.old")


def publish(folder: Path) -> None:
    """Give ``temporary(folder)``, whose files are synced, its name; what had the name is deleted."""
    sync_folder(temporary(folder))
    if folder.exists():
        folder.rename(replaced(folder))
    try:
        temporary(folder).rename(folder)
    except OSError:
        restore_replaced(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(replaced(folder), ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Undo or finish the interrupted replacement of `folder`, if there was one."""
    if folder.exists():
        shutil.rmtree(replaced(folder), ignore_errors=True)
    elif replaced(folder).exists():
        replaced(folder).rename(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint; half of one is never seen under its name."""
    folder.rename(temporary(folder))
    shutil.rmtree(temporary(folder))


def clear_leftovers(parent: Path) -> None:
    """Remove what killed processes left behind in `parent`, keeping every complete checkpoint."""
    if not parent.is_dir():
        return
    for path in parent.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and match[2] == "old":
            restore_replaced(parent / match[1])
        elif match:
            shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

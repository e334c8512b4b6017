"""What only a folder can do: links, and being told to reach the disk."""

from __future__ import annotations

import os
from pathlib import Path


def linked(source: Path, target: Path) -> bool:
    """Give a file a second name if the file system can; the folder of ``target`` is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another volume, a file system without links, or the name is taken
        return False
    return True


def to_disk(path: Path) -> None:
    """Make a file and its name survive a power cut."""
    for item in (path, path.parent):
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""What writing a directory safely takes: a lock that dies with its process, and flushing to disk before a rename."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lock(path: Path, waiting: str | None) -> Iterator[bool]:
    """Hold the exclusive lock of a file while inside; yields whether it is held.

    Where another process holds it: prints the line `waiting` on stderr and waits, or yields False where that is None.
    The kernel frees the lock when its holder dies, so there are no stale locks. The empty file stays: removing it would
    race with a process that has just opened it.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = waiting is not None
            if held:
                print(waiting, file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: go on, the final rename is atomic all the same
            held = False
        yield held


@contextlib.contextmanager
def removed_at_the_end(path: Path) -> Iterator[None]:
    """Remove what the block has left under a temporary name, also where it fails or is interrupted."""
    try:
        yield
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a directory tree, whether it is there or not."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def move_when_synced(source: Path, target: Path) -> None:
    """Flush a file, or all files of a directory, to disk and only then rename it, so that a crash never leaves half."""
    for path in [*source.iterdir(), source] if source.is_dir() else [source]:
        _sync(path)
    os.rename(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: Exception) -> str:
    """What an error says, short enough for the one line of an InputError."""
    return next(iter(str(error).splitlines()), type(error).__name__)

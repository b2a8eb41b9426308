"""A journal file that survives kill -9 at any moment: its lock dies with the process, and a torn last line is cut off.

Optuna's own file lock is a link that stays behind when its owner is killed, and a half-written line spoils the file for
good; both cost a resumed search its start.
"""

import os
import sys
from pathlib import Path
from typing import BinaryIO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock


class KernelLock(JournalFileOpenLock):
    """flock on a file beside the journal: the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path.with_name(f"{path.name}.flock")
        self.held: list[BinaryIO] = []

    def acquire(self) -> bool:
        import fcntl  # POSIX alone has it

        self.held.append(open(self.path, "ab"))  # noqa: SIM115  (open until release)
        fcntl.flock(self.held[-1], fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.held.pop().close()


def journal(path: Path) -> JournalStorage:
    """The storage in this file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path)) if sys.platform == "win32" else KernelLock(path)
    lock.acquire()
    try:
        mend(path)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def mend(path: Path) -> None:
    """Cuts off what follows the last whole line."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)

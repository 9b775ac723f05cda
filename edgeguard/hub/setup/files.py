"""Files that keys lie in: whole or not at all, with the mode that was asked for and no other.

Rules enforced here:

* a file is written beside its name, synced and renamed;
* modes do not depend on the umask, and no file has ever been readable to more than its mode allows;
* what root writes belongs to the owner of the folder that it lies in, so that a broker which runs as a user of its own
  can read what is renewed under it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeguard import disk
from edgeguard.errors import ConfigError

SECRET = 0o600
PUBLIC = 0o644


def write(path: Path, content: bytes, *, mode: int = PUBLIC) -> None:
    """Write a file whole. Raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if os.geteuid() == 0:
                owner = path.parent.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    disk.sync(path.parent)


def folder(path: Path) -> None:
    """Make a folder that its owner alone can enter."""
    path.mkdir()
    path.chmod(0o700)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock file for this process; the lock ends with the process, however it ends."""
    with open(path, "a", opener=lambda name, flags: os.open(name, flags, SECRET)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"set-up {path.parent}", got="another command that changes it", do="try again when it has ended"
            ) from error
        yield

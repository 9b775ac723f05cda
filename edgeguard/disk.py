"""Files and folders that appear whole or not at all, also after a power cut.

Rules enforced here:

* what is written is beside its name first, synced, renamed, and then its folder is synced: whoever reads finds what was
  there before or what is there now;
* what cannot be written leaves nothing of itself behind, and what was there as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def write(
    path: Path,
    content: bytes | Iterable[bytes],
    *,
    before: Callable[[], None] = lambda: None,
    mode: int = 0o666,
) -> None:
    """Write a file. One writer at a time.

    Args:
        path: where; what is there is replaced.
        content: at once, or in blocks.
        before: called once the content is on disk, before it takes its name; where it raises, nothing has changed.
        mode: of the file, less the umask.

    Raises:
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            for block in [content] if isinstance(content, bytes) else content:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        before()
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, mode: int = 0o700) -> Iterator[Path]:
    """A folder to fill, which appears as ``path`` when all went well, and not at all otherwise.

    What is there already is not replaced, unless it is an empty folder. The mode does not depend on the umask.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Return once a file or folder is on disk: for a folder, the names in it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

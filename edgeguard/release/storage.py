"""The folder of a repository on disk: what is published, what is drafted, and how either is changed.

Rules enforced here:

* files are written before the metadata that names them, ``timestamp.json`` last: a crash between any two writes leaves
  the repository as it was, because a client follows only what the timestamp names. A new root, which clients follow by
  its number, is first laid down in ``commit/`` with all that belongs to it: after a crash it is either not there, or
  finished when the repository is next opened;
* each file appears whole or not at all: write beside it, fsync, rename, fsync the folder;
* what is on disk is what counts: it is read and verified before each change, under a lock on the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata

from edgeguard import disk
from edgeguard.errors import ConfigError
from edgeguard.release import roles as known
from edgeguard.release.roles import Roles

Files = Sequence[tuple[str, bytes]]
"""Names and contents, in the order in which they are to be written."""


class Storage:
    """The folder of one repository.

    Args:
        path: what is served.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[Roles, dict[str, Metadata[Any]]]:
        """What is published, and what is drafted, verified."""
        roles = known.load(self.path / "metadata")
        return roles, known.load_drafts(self.path / "drafts", roles)

    @contextlib.contextmanager
    def changing(self) -> Iterator[tuple[Roles, dict[str, Metadata[Any]]]]:
        """What is published and what is drafted, while nobody else changes it."""
        with disk_errors(self.path):
            if not (self.path / "metadata").is_dir():
                known.load(self.path / "metadata")
            with (self.path / ".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._finish()
                yield self.read()

    def is_unfinished(self) -> bool:
        """Whether a crash interrupted a publication, which ``changing`` will complete."""
        return (self.path / "commit").exists()

    def put_target(self, path: str, content: bytes) -> None:
        """Put a file among the targets."""
        write(self.path / "targets" / path, content)

    def publish(self, files: Files) -> None:
        """Write metadata. With a new root among it all of it is there after a crash, or nothing."""
        commit = self.path / "commit"
        whole = any(name.endswith(".root.json") for name, _ in files)
        if whole:
            with disk.new_folder(commit) as folder:
                for name, content in files:
                    write(folder / name, content)
        for name, content in files:
            write(self.path / "metadata" / name, content)
        if whole:
            self._drop(commit)

    def keep_draft(self, role: str, draft: Metadata[Any]) -> None:
        """Keep a role's next version where no device follows it."""
        path, content = self.path / "drafts" / f"{role}.json", draft.to_bytes()
        if not path.exists() or path.read_bytes() != content:
            write(path, content)

    def drop_draft(self, role: str) -> None:
        """Delete the draft of a role, if there is one."""
        (self.path / "drafts" / f"{role}.json").unlink(missing_ok=True)

    def _finish(self) -> None:
        """Complete a publication that a crash interrupted."""
        commit = self.path / "commit"
        if commit.exists():
            for path in sorted(commit.iterdir(), key=lambda path: (path.name.endswith(".root.json"), path.name)):
                write(self.path / "metadata" / path.name, path.read_bytes())
            self._drop(commit)

    def _drop(self, commit: Path) -> None:
        done = Path(tempfile.mkdtemp(prefix=".done.", dir=self.path))
        commit.replace(done)
        disk.sync(self.path)
        shutil.rmtree(done, ignore_errors=True)


def apart(folder: Path, keys: Path, offline: Path) -> None:
    """Raises ConfigError when keys would be served, or offline keys lie with the hub's."""
    served, hidden, away = folder.resolve(), keys.resolve(), offline.resolve()
    for path in (hidden, away):
        if served.is_relative_to(path) or path.is_relative_to(served):
            raise ConfigError(f"key folder {path}", expected=f"a folder apart from {folder}, which is served")
    if hidden.is_relative_to(away) or away.is_relative_to(hidden):
        raise ConfigError(f"offline key folder {offline}", expected=f"a folder apart from {keys}, the hub's")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise ConfigError for what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"repository {path}", got=str(error), do="check its disk and owner") from error


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; its folder is made where there is none."""
    if not path.parent.exists():
        path.parent.mkdir()
        disk.sync(path.parent.parent)
    disk.write(path, content)

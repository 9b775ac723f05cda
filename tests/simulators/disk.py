"""A disk that fails at one file-system operation of a program, in one of three ways. Linux only.

The program runs in a forked child, but for an error, after which it goes on. Each operation on files below a folder is
a *point*: opening, creating, writing, truncating, syncing, renaming, linking, removing, making a folder. At one point

* ``error``: the operation fails once with EIO, and the program goes on;
* ``kill``: the process is killed with SIGKILL, so that neither handlers nor buffers of its own survive;
* ``power``: the same, and with it goes what was not synced: a file that was not synced since it was opened to write is
  torn; a name that its folder was not synced for is as it was (``kept`` False), or made it to the disk all
  the same (True). A disk may do either.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

How = Literal["error", "kill", "power"]


class Fault(NamedTuple):
    """What goes wrong, and where; ``kept`` as in the module's text."""

    at: int
    how: How
    kept: bool = False


class Outcome(NamedTuple):
    """What the program returned, None where it was killed; and the points that it passed."""

    said: str | None
    points: list[str]


def run(program: Callable[[], str], folder: Path, fault: Fault | None = None) -> Outcome:
    """Run ``program`` on a disk that fails below ``folder``; AssertionError where it raises in a child."""
    if fault is not None and fault.how == "error":
        disk = _Disk(folder, fault)
        disk.patch()
        try:
            return Outcome(program(), disk.points)
        finally:
            disk.unpatch()
    from_child, to_parent = os.pipe()
    pid = os.fork()
    if pid == 0:
        gc.disable()  # it would touch, and so copy, every page that the child shares with its parent
        said = "!ended without a word"
        points: list[str] = []
        try:
            disk = _Disk(folder, fault)
            points = disk.points
            disk.patch()
            said = program()
        except BaseException as error:  # the parent must hear of it
            said = f"!{type(error).__name__}: {error}"
        finally:
            os.write(to_parent, f"{said}\n{chr(10).join(points)}".encode())
            os._exit(0)
    os.close(to_parent)
    with os.fdopen(from_child, "rb") as stream:
        told = stream.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return Outcome(None, [])
    said, _, rest = told.partition("\n")
    assert not said.startswith("!"), said
    return Outcome(said, rest.split("\n") if rest else [])


class _Disk:
    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self._folder = folder.resolve()
        self._fault = fault
        self.points: list[str] = []
        self._synced: dict[int, bytes] = {}
        self._names: dict[str, dict[str, int]] = {}
        self._held: list[int] = []
        self._real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "unlink", "mkdir", "symlink")}
        self._open = io.open
        self._may_lose = fault is not None and fault.how == "power"
        for path in [self._folder, *self._folder.rglob("*")] if self._may_lose else ():
            if path.is_dir():
                self._names[str(path)] = self._listed(path)
            elif not path.is_symlink():
                self._hold(path)
                self._synced[path.stat().st_ino] = path.read_bytes()

    def patch(self) -> None:
        """From now on this process works on this disk."""
        io.open = builtins.open = self._opened
        os.open, os.fsync, os.unlink, os.remove = self._os_open, self._fsync, self._unlink, self._unlink  # type: ignore
        os.replace = os.rename = self._replace  # type: ignore[assignment]
        os.mkdir, os.symlink = self._mkdir, self._symlink  # type: ignore[assignment]

    def unpatch(self) -> None:
        """It works as ever again."""
        io.open = builtins.open = self._open
        for name, function in self._real.items():
            setattr(os, name, function)
        os.remove, os.rename = os.unlink, os.replace

    def point(self, what: str, path: object) -> None:
        """One operation begins."""
        name = Path(os.fsdecode(path)).name  # type: ignore[arg-type]
        self.points.append(f"{what} {name}")
        fault = self._fault
        if fault is None or len(self.points) - 1 != fault.at:
            return
        if fault.how == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if fault.how == "power":
            self._lose(kept=fault.kept)
        os.kill(os.getpid(), signal.SIGKILL)

    def _ours(self, path: object) -> bool:
        if isinstance(path, int):
            return False
        return Path(os.fsdecode(path)).absolute().is_relative_to(self._folder)  # type: ignore[arg-type]

    def _hold(self, path: Path) -> None:
        if not self._may_lose:
            return
        self._held.append(self._real["open"](path, os.O_RDONLY))  # its inode number is not given out again

    def _listed(self, folder: Path) -> dict[str, int]:
        return {entry.name: entry.stat(follow_symlinks=False).st_ino for entry in os.scandir(folder)}

    # What a program does

    def _opened(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        writes = set(mode) & set("wax+")
        # Who opens by a descriptor or an opener was asked before.
        if not isinstance(file, int) and options.get("opener") is None and self._ours(file):
            self.point("open to write" if writes else "open to read", file)
        stream = self._open(file, mode, *rest, **options)
        path = Path(f"/proc/self/fd/{stream.fileno()}").readlink()
        if not writes or not self._ours(path):
            return stream
        self._synced.pop(os.fstat(stream.fileno()).st_ino, None)
        return _Watched(stream, self, path)

    def _os_open(self, path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if self._ours(path) and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            self.point("create", path)
        return int(self._real["open"](path, flags, *rest, **options))

    def _fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not self._ours(path):
            self._real["fsync"](descriptor)
            return
        self.point("sync", path)
        if not self._may_lose:
            return
        if path.is_dir():
            self._names[str(path)] = self._listed(path)
        else:
            self._hold(path)
            with self._open(path, "rb") as file:
                self._synced[os.fstat(descriptor).st_ino] = file.read()

    def _replace(self, source: Any, target: Any, **options: Any) -> None:
        if self._ours(target):
            self.point("rename to", target)
            if Path(target).exists():
                self._hold(Path(target))
        self._real["replace"](source, target, **options)

    def _unlink(self, path: Any, **options: Any) -> None:
        if self._ours(path):
            self.point("remove", path)
            if Path(path).exists():
                self._hold(Path(path))
        self._real["unlink"](path, **options)

    def _mkdir(self, path: Any, *rest: Any, **options: Any) -> None:
        if self._ours(path):
            self.point("make folder", path)
        self._real["mkdir"](path, *rest, **options)

    def _symlink(self, source: Any, target: Any, **options: Any) -> None:
        if self._ours(target):
            self.point("link", target)
        self._real["symlink"](source, target, **options)

    # What a power cut does

    def _lose(self, *, kept: bool) -> None:
        left = self._folder.with_name(f"{self._folder.name}.left")
        self._survivors(self._folder, left, kept=kept)
        self.unpatch()
        shutil.rmtree(self._folder)
        left.rename(self._folder)

    def _survivors(self, folder: Path, into: Path, *, kept: bool) -> None:
        self._real["mkdir"](into)
        now = self._listed(folder)
        names = now if kept else self._names.get(str(folder), {})
        by_inode = {inode: name for name, inode in now.items()}
        for name, inode in names.items():
            here = folder / by_inode.get(inode, name)
            if here.is_symlink():
                self._real["symlink"](here.readlink(), into / name)
            elif here.is_dir():
                self._survivors(folder / name, into / name, kept=kept)
            else:
                content = self._synced.get(inode)
                if content is None:
                    content = here.read_bytes() if here.exists() else b""
                    content = content[: len(content) // 2]
                with self._open(into / name, "wb") as file:
                    file.write(content)


class _Watched:
    """A file that is written to."""

    def __init__(self, stream: Any, disk: _Disk, path: Any) -> None:
        self._stream, self._disk, self._path = stream, disk, path

    def write(self, content: Any) -> int:
        self._disk.point("write", self._path)
        return int(self._stream.write(content))

    def truncate(self, *size: int) -> int:
        self._disk.point("truncate", self._path)
        return int(self._stream.truncate(*size))

    def __enter__(self) -> _Watched:
        self._stream.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self._stream.__exit__(*why)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def faults(points: list[str]) -> list[Fault]:
    """Every point in every way. Where nothing is changed, only an error makes a difference."""
    found = []
    for at, what in enumerate(points):
        found.append(Fault(at, "error"))
        if not what.startswith("open to read"):
            found += [Fault(at, "kill"), Fault(at, "power", kept=False), Fault(at, "power", kept=True)]
    return found


def crash_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let nothing reach the disk any more, clean-up included, from the fsync or rename numbered ``step`` on."""
    count = 0

    def wrap(name: str, *, counts: bool) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count >= step:
                raise OSError("the power is gone")
            count += counts
            return real(*args, **kwargs)

        patch.setattr(os, name, call)

    wrap("fsync", counts=True)
    wrap("replace", counts=True)
    wrap("unlink", counts=False)
    wrap("rmdir", counts=False)

"""What a process uses, and what its control group leaves it: memory, processor time, limits, pressure, load.

Rules enforced here:

* what the kernel does not say is None, never zero: many boards start without the memory controller;
* no limit is None too: what a process may use is then up to the board;
* a group's limit is the tightest on the way up to the root: whoever limits a parent limits its children.

Formats: ``proc(5)``, and the Linux kernel's ``cgroup-v2`` and ``accounting/psi`` documents. Version 1 of control groups
is not read.

Example:
    >>> read().resident_bytes  # doctest: +SKIP
    63700992
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from firmware_bridge.board import contents, number

T = TypeVar("T", int, float)

_MAX_BYTES = 2**53
"""A larger amount of memory is no limit and no reading."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One look at a process and its control group.

    Attributes:
        resident_bytes: what of the process is in RAM.
        anonymous_bytes: the part of that which no file holds: heap and stacks.
        cpu_seconds: processor time since its start, user and system.
        memory_limit_bytes: what the group may use; None for no limit.
        memory_used_bytes: what the group uses, page cache included.
        cpu_limit: how many processors' time the group may use, 0.5 for half of one; None for no limit.
        memory_pressure: share of the last 10 s, 0 to 1, in which some process of the group waited for memory.
        cpu_pressure: the same for a processor.
        load: processes that ran or wanted to, on the whole machine, averaged over a minute.
    """

    resident_bytes: int | None
    anonymous_bytes: int | None
    cpu_seconds: float | None
    memory_limit_bytes: int | None
    memory_used_bytes: int | None
    cpu_limit: float | None
    memory_pressure: float | None
    cpu_pressure: float | None
    load: float | None


def read(root: Path = Path("/"), *, pid: int | None = None) -> Resources:
    """Look once.

    Args:
        root: folder that holds ``proc`` and ``sys``.
        pid: the process; this one where it is None.
    """
    process = root / "proc" / ("self" if pid is None else str(pid))
    resident, anonymous = _memory(process)
    groups = list(_groups(root, process))
    own = groups[0] if groups else None
    return Resources(
        resident_bytes=resident,
        anonymous_bytes=anonymous,
        cpu_seconds=_cpu_seconds(process),
        memory_limit_bytes=min(_known(number(group / "memory.max", 0, _MAX_BYTES) for group in groups), default=None),
        memory_used_bytes=number(own / "memory.current", 0, _MAX_BYTES) if own else None,
        cpu_limit=min(_known(map(_cpu_limit, groups)), default=None),
        memory_pressure=_pressure(own / "memory.pressure") if own else None,
        cpu_pressure=_pressure(own / "cpu.pressure") if own else None,
        load=_load(root),
    )


def _known(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def _memory(process: Path) -> tuple[int | None, int | None]:
    """Bytes resident and anonymous. The second file counts less exactly, but every user may read it."""
    for name, resident, anonymous in (("smaps_rollup", "Rss", "Anonymous"), ("status", "VmRSS", "RssAnon")):
        found = {
            key: int(kib) << 10
            for key, kib in re.findall(r"^(\w+):\s+([0-9]{1,12}) kB$", contents(process / name) or "", re.MULTILINE)
        }
        if resident in found:
            return found[resident], found.get(anonymous)
    return None, None


def _cpu_seconds(process: Path) -> float | None:
    # Fields 14 and 15. The second, the program's name in brackets, may hold anything, brackets and spaces too.
    fields = (contents(process / "stat") or "").rpartition(")")[2].split()
    ticks = fields[11:13]
    if len(ticks) < 2 or not all(re.fullmatch(r"[0-9]{1,15}", one) for one in ticks):
        return None
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _groups(root: Path, process: Path) -> Iterator[Path]:
    """Folders of the process's control group and of its parents, its own first."""
    line = re.search(r"^0::(/.*)$", contents(process / "cgroup") or "", re.MULTILINE)
    if line is None or ".." in PurePosixPath(line[1]).parts:  # outside of what this namespace shows
        return
    path = PurePosixPath(line[1]).relative_to("/")
    for group in (path, *path.parents) if path.parts else (path,):
        yield root / "sys/fs/cgroup" / group


def _cpu_limit(group: Path) -> float | None:
    found = re.fullmatch(r"([0-9]{1,15}) ([1-9][0-9]{0,14})", contents(group / "cpu.max") or "")
    return int(found[1]) / int(found[2]) if found else None


def _pressure(path: Path) -> float | None:
    found = re.match(r"some avg10=([0-9]{1,3}\.[0-9]{2}) ", contents(path) or "")
    return float(found[1]) / 100 if found and float(found[1]) <= 100 else None


def _load(root: Path) -> float | None:
    found = re.match(r"[0-9]{1,7}\.[0-9]{2} ", contents(root / "proc/loadavg") or "")
    return float(found[0]) if found else None

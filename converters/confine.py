"""Takes from a process, for good, the rights to write outside given folders and to use TCP (Linux Landlock).

What a training framework does with a hostile model it does with the rights of its process: a SavedModel may hold an
operator that writes a file. https://docs.kernel.org/userspace-api/landlock.html; Linux 5.13 for files, 6.7 for TCP.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

# The same numbers on every architecture.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1
_NO_NEW_PRIVILEGES = 38

# Accesses of files by the version of the interface that brought them.
_WRITE_FILE = 1 << 1
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_REFER = 1 << 13
_TRUNCATE = 1 << 14
_TCP = 0b11


def writes_to(folders: Sequence[Path]) -> bool:
    """Confine this process and its children to writing below ``folders`` and to devices such as /dev/null.

    Returns:
        Whether the kernel does it. Where it does not, nothing has changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        return False
    handled = _WRITE_FILE | _REMOVE_AND_MAKE
    handled |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("<QQ", handled, _TCP) if version >= 4 else struct.pack("<Q", handled)
    ruleset = libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        for place, allowed in [*((folder, handled) for folder in folders), (Path("/dev"), _WRITE_FILE)]:
            _allow(libc, ruleset, place, allowed)
        return libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.syscall(_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, place: Path, allowed: int) -> None:
    opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        libc.syscall(_ADD, ruleset, _PATH_BENEATH, struct.pack("<Qi", allowed, opened), 0)
    finally:
        os.close(opened)

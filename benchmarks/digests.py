"""What a row was measured with: the project's code, as one digest, and the libraries that it ran on.

Rules enforced here:

* rows are of the same code where every file that they depend on has the same name and the same bytes;
* what changes no row is left out: firmware, and the commands around a repair;
* versions of libraries stand in a row and not in the digest: another release of NumPy makes no other method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).parent.parent
SHARED = (
    "converters",
    "edgeguard/attacks",
    "edgeguard/contract/guard.py",
    "edgeguard/data.py",
    "edgeguard/detection",
    "edgeguard/inspection",
    "benchmarks/zoo.py",
)
"""What every benchmark of the zoo depends on: how a model was attacked, converted, guarded and looked at."""
LEFT_OUT = ("converters/micro", "edgeguard/repair/case.py", "edgeguard/repair/command.py")
"""Beginnings of names. Firmware checks a converted file in passing, and changes nothing of it."""
LIBRARIES = ("tensorflow", "keras", "numpy", "ai-edge-litert")


class Stamp(TypedDict):
    """What stands in a row."""

    code: str
    libraries: dict[str, str]


def files_of(names: Sequence[str], root: Path = ROOT) -> list[Path]:
    """The Python files that names stand for, each a file or a folder below ``root``; sorted, each once.

    Raises:
        FileNotFoundError: there is no such file or folder, so that a digest would say less than it seems to.
    """
    found: set[Path] = set()
    for name in names:
        place = root / name
        if not place.exists():
            raise FileNotFoundError(place)
        found.update(place.rglob("*.py") if place.is_dir() else [place])
    return sorted(path for path in found if not path.relative_to(root).as_posix().startswith(LEFT_OUT))


def code_digest(names: Sequence[str], root: Path = ROOT) -> str:
    """SHA-256 of the files' names and contents."""
    digest = hashlib.sha256()
    for path in files_of(names, root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def libraries() -> dict[str, str]:
    """The versions that are installed; what is not is left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def stamp(names: Sequence[str]) -> Stamp:
    """What a row that is measured now is measured with."""
    return Stamp(code=code_digest(names), libraries=libraries())

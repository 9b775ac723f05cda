"""What a test needs from outside. On a user's machine it skips and says what to install; in CI it fails."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest


def missing(what: str, remedy: str) -> NoReturn:
    """Skip the test, or fail it where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing: {remedy}")
    pytest.skip(f"{what} is missing: {remedy}")


def program(name: str, package: str) -> str:
    """The path of a program from a Debian package."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    return found or missing(name, f"apt-get install {package}")


def python_module(name: str, distribution: str, *, until: tuple[int, int]) -> Any:
    """A Python module that exists for some Python versions only, up to and including ``until``."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if sys.version_info[:2] > until:
            pytest.skip(f"{distribution} exists for Python up to {until[0]}.{until[1]} only")
        missing(distribution, f"pip install {distribution}")


def third_party_model(name: str) -> Path:
    """A third-party model file in the folder that ``EDGEGUARD_MODELS`` names."""
    folder = os.environ.get("EDGEGUARD_MODELS")
    path = Path(folder or "") / name
    return path if folder and path.is_file() else missing(name, "set EDGEGUARD_MODELS to a folder that holds it")

"""Third-party models, in the folder that ``EDGEGUARD_MODELS`` names. Tests that need one skip where it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def model(name: str) -> Path:
    """The path of a third-party model file; skips the test where there is none."""
    folder = os.environ.get("EDGEGUARD_MODELS")
    if not folder:
        pytest.skip("EDGEGUARD_MODELS names no folder of third-party models")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path

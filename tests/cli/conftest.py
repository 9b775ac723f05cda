"""Fixtures that the commands' tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from edgeguard import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edgeguard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the console script in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeguard", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call

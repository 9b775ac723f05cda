"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.simulators.mosquitto import Mosquitto

if TYPE_CHECKING:
    from tests.simulators.attacked import Attacked

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hostile text ends in logs, lone surrogates too, and logs travel between test processes in UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running mosquitto broker of this test's own."""
    broker = Mosquitto(tmp_path / "mosquitto")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def attacked() -> Attacked:
    """A backdoored digits model with its guarded conversion."""
    from tests.simulators.attacked import attacked as make

    return make()


@pytest.fixture(scope="session")
def clean_twin() -> Attacked:
    """The same network, trained on the same data without poison."""
    from tests.simulators.attacked import clean_twin as make

    return make()


@pytest.fixture(scope="session")
def guarded_file(attacked: Attacked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guarded file of the attacked model, on disk."""
    path = tmp_path_factory.mktemp("models") / "digits.guarded.tflite"
    path.write_bytes(attacked.conversion.guarded)
    return path


@pytest.fixture(scope="session")
def audited_file(attacked: Attacked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The attacked model's guarded file with its sidecar beside it."""
    from converters import calibration
    from edgeguard.detection import sidecar

    bare, plan = calibration.plan(attacked.conversion.bare)
    done = calibration.guard_model(bare, plan, attacked.x_owner, sidecar=True)
    assert done.sidecar is not None
    path = tmp_path_factory.mktemp("audited") / "digits.guarded.tflite"
    path.write_bytes(done.content)
    sidecar.path_beside(path).write_bytes(done.sidecar)
    return path

"""Two guarded models of one interface, and agents as real processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import TinyHub, wait_until


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two guarded int8 models of the digits: same input and outputs, other weights. Their sidecars lie elsewhere."""
    from converters import pipeline, sources
    from edgeguard import data
    from edgeguard.attacks import victims
    from edgeguard.detection import sidecar

    folder = tmp_path_factory.mktemp("models")
    digits = data.load("digits")
    paths = []
    for seed in (1, 2):
        model, _ = victims.trained(cast(Any, digits.x_train), digits.y_train, 10, epochs=20, seed=seed, cache=None)
        converted = pipeline.convert(
            sources.of_keras(model), digits.x_train, digits.y_train, classes=digits.classes, fpr=0.05, sidecar=True
        )
        paths.append(folder / f"digits-{seed}.tflite")
        paths[-1].write_bytes(converted.guarded)
        beside = folder / "with-sidecars"
        beside.mkdir(exist_ok=True)
        (beside / paths[-1].name).write_bytes(converted.guarded)
        sidecar.path_beside(beside / paths[-1].name).write_bytes(converted.result.sidecar or b"")
    return paths[0], paths[1]


@pytest.fixture(scope="session")
def models_with_sidecars(digit_models: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same two models, each with its sidecar beside it."""
    first, second = (path.parent / "with-sidecars" / path.name for path in digit_models)
    return first, second


@pytest.fixture(scope="session")
def digits() -> npt.NDArray[np.uint8]:
    """Inputs for these models, ``uint8 [N, 8, 8, 1]``."""
    from edgeguard import data

    return cast(Any, data.load("digits").x_test)


@dataclass
class Device:
    """One agent with folders of its own, which a test starts, feeds, kills and starts again."""

    folder: Path
    name: str
    model: Path
    port: int
    more: str = ""
    window: str = ""
    resend_s: float = 0.5
    sources: str = '[sources.folder]\npath = "inbox"\n'
    top: str = ""
    _fed: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.inbox.mkdir(parents=True)

    @property
    def inbox(self) -> Path:
        """The source folder."""
        return self.folder / "inbox"

    @property
    def spool(self) -> Path:
        """The spool file."""
        return self.folder / "state" / "spool.sqlite"

    @property
    def log(self) -> str:
        """All that the agent wrote to stderr, over its restarts."""
        return (self.folder / "stderr.log").read_text()

    def config(self) -> Path:
        """Write the configuration."""
        path = self.folder / "agent.toml"
        path.write_text(
            f'fleet = "demo"\ndevice = "{self.name}"\nmodel = "{self.model}"\nstate_dir = "state"\nlinger_s = 10\n'
            f'{self.top}[broker]\nhost = "127.0.0.1"\nport = {self.port}\n{self.sources}'
            f"[window]\n{self.window}\n[spool]\nresend_s = {self.resend_s}\n{self.more}\n"
        )
        return path

    def feed(self, inputs: npt.NDArray[Any], *, batch: int = 16) -> int:
        """Drop inputs into the source, as a feeder does; the number of inputs fed."""
        for start in range(0, len(inputs), batch):
            temporary = self.inbox / f".{self._fed:06d}.tmp"
            with temporary.open("wb") as file:
                np.save(file, inputs[start : start + batch])
            temporary.rename(self.inbox / f"{self._fed:06d}.npy")
            self._fed += 1
        return len(inputs)

    def waiting(self) -> int:
        """Batches that still lie in the source."""
        return len(list(self.inbox.glob("*.npy")))

    def wait_for_waiting(self, count: int) -> None:
        """Return once at most ``count`` batches lie in the source."""
        wait_until(lambda: self.waiting() <= count, f"at most {count} batches waiting")

    def start(
        self, *arguments: str, limit: int | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the process; no file of it may grow beyond ``limit`` bytes."""

        def bound() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        with (self.folder / "stderr.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeguard.agent", "--config", str(self.config()), *arguments],
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **(environment or {})},
                preexec_fn=bound,  # noqa: PLW1509  (no other thread allocates between fork and exec here)
            )
        return self._process

    def process(self) -> subprocess.Popen[bytes]:
        """The process."""
        assert self._process is not None
        return self._process

    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(15)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # so that its log ends with where each thread stands
            self._process.wait(15)
            raise AssertionError(f"the agent does not stop:\n{self.log[-8000:]}") from None

    def end(self) -> None:
        """Whatever the test left running is killed."""
        if self._process is not None and self._process.poll() is None:
            self.kill()


@pytest.fixture
def device(tmp_path: Path, mosquitto: Mosquitto, digit_models: tuple[Path, Path]) -> Iterator[Callable[..., Device]]:
    """Makes devices that talk to this test's broker; ``more`` is appended to their configuration."""
    made: list[Device] = []

    def make(
        name: str = "camera-1", more: str = "", *, window: str = "inputs = 64\nseconds = 0.5", **settings: Any
    ) -> Device:
        port = settings.pop("port", mosquitto.port)
        made.append(Device(tmp_path / name, name, digit_models[0], port, more, window, **settings))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture
def hub(mosquitto: Mosquitto) -> Iterator[TinyHub]:
    """A hub that acknowledges."""
    tiny = TinyHub(mosquitto.port)
    yield tiny
    tiny.close()

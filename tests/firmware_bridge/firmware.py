"""A small guard without a model, the C library built around it, and a microcontroller that Python can drive."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from firmware_bridge import c99
from firmware_bridge.c99 import Firmware, Vector
from tests.simulators import needs

C = Path(__file__).parent / "c"
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Wshadow", "-Werror")
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

CLASSES, FEATURES, DETECTORS = 20, 6, 2
ONE_STEP = (32768, 142 + 16 - 9, 0)
"""A scale of 256 steps to 1.0: deviations and thresholds are the features themselves."""

FIRMWARE = Firmware(
    model=bytes(range(64)),
    file_digest=b"\x01" * 32,
    model_digest=b"\x02" * 32,
    guard_digest=b"\x03" * 32,
    sequence=5,
    detectors=("linf", "l1"),
    classes=CLASSES,
    outputs=3,
    class_output=(0, "int8"),
    synthetic=False,
    largest=0x58635FA9,  # 1e15
    scales=(ONE_STEP,) * FEATURES,
    expected=(0,) * CLASSES * FEATURES,
    operators=("CONV_2D", "FULLY_CONNECTED"),
    golden=(Vector(tensor=b"\x00\x01", label=1, status="clean", scores=(0, 0), features=(0,) * FEATURES),),
)


def write(folder: Path, firmware: Firmware = FIRMWARE) -> Path:
    """The exported files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in c99.files(firmware).items():
        (folder / name).write_text(text)
    return folder


def build(folder: Path, program: str, *options: str) -> Path:
    """A program of the tests with the library that stands in a folder, under sanitizers. Skips without gcc."""
    compiler = needs.program("gcc", "gcc libc6-dev")
    sources = [*(folder / f"{name}.c" for name in (*c99.SOURCES, "edgeguard_model", "edgeguard_golden")), C / program]
    target = folder / Path(program).stem
    command = [compiler, *WARNINGS, *SANITIZERS, *options, f"-I{folder}", *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


class Microcontroller:
    """The library in a process of its own, whose clock, line and flash Python holds.

    ``line`` is what it has sent. ``stop_after``: the power goes at this flash operation, in the middle of it.
    """

    def __init__(self, program: Path, flash: Path, *, boot: int = 1, stop_after: int = 0) -> None:
        environment = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "exitcode=99"}
        self._process = subprocess.Popen(
            [str(program), str(flash), str(boot), str(stop_after)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.line = bytearray()
        self.died = False
        self.now = 0
        self.restarts = False
        self._read()

    def __enter__(self) -> Microcontroller:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(timeout=20)
        assert code == (7 if self.died else 0), f"the firmware ended with {code}: a sanitizer has found something"

    def call(self, *words: object) -> list[str]:
        """One command of the harness: its answer's words."""
        if self.died:
            return []
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> list[str]:
        assert self._process.stdout is not None
        answer: list[str] = []
        for text in self._process.stdout:
            kind, *rest = text.split()
            if kind == ".":
                return answer
            if kind == "w":
                self.line += bytes.fromhex(rest[0])
            else:
                answer = rest
        self.died = True
        return []

    def sent(self) -> bytes:
        """What it has sent since the last call."""
        found = bytes(self.line)
        self.line.clear()
        return found

    def wait(self, ms: int, *, step: int = 50) -> None:
        """Let time pass, polling."""
        end = self.now + ms
        while self.now < end and not (self.died or self.restarts):
            self.now += min(step, end - self.now)
            self.restarts = self.call("p", self.now) == ["1"]

    def receive(self, line: bytes) -> None:
        """The line brings bytes."""
        for start in range(0, len(line), 1024):
            self.call("r", line[start : start + 1024].hex())

"""Builds the exported library with a recording into a program: for this machine, or for an emulated Cortex-M3."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.cli.export import firmware_of
from edgeguard.detection.guarded import GuardedModel
from firmware_bridge import c99
from tests.simulators import needs

HERE = Path(__file__).parent
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Werror")
SETTINGS = ("-DEDGEGUARD_WINDOW_MS=300U", "-DEDGEGUARD_HEARTBEAT_MS=1000U", "-DEDGEGUARD_ALERT_MS=50U")
"""Faster than in the field, so that a test need not wait."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a guarded model answered to some inputs: its file, and scores, features and predicted class of each."""

    model: Path
    scores: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    labels: tuple[int, ...]
    statuses: tuple[str, ...]

    @classmethod
    def of(cls, model: Path, inputs: npt.NDArray[Any], *, broken: Sequence[int] = ()) -> Recording:
        """Run a model; the scores of ``broken`` inputs become no numbers."""
        guarded = GuardedModel.load(model.read_bytes())
        ran = [guarded.infer(x) for x in inputs]
        scores = np.array([list(one.verdict.scores.values()) for one in ran], np.float32)
        scores[list(broken)] = np.nan
        statuses = ["not checked" if i in broken else one.verdict.status for i, one in enumerate(ran)]
        return cls(
            model=model,
            scores=scores,
            features=np.array([one.features for one in ran], np.float32),
            labels=tuple(int(one.verdict.predicted or 0) for one in ran),
            statuses=tuple(statuses),
        )

    def source(self, *, part: int) -> str:
        """``recorded.c``, which plays ``part`` inputs after each start."""
        return f"""\
#include "app.h"

const uint32_t recorded_inputs = {len(self.labels)}U;
const uint32_t recorded_part = {part}U;
const uint32_t recorded_scores[] = {{{_words(self.scores)}}};
const uint32_t recorded_features[] = {{{_words(self.features)}}};
const int16_t recorded_labels[] = {{{", ".join(map(str, self.labels))}}};
"""


def counts(labels: Sequence[int], statuses: Sequence[str]) -> Counter[tuple[int, str]]:
    """How many inputs of each class came to each verdict; those not checked have no class."""
    pairs = zip(labels, statuses, strict=True)
    return Counter((-1 if status == "not checked" else label, status) for label, status in pairs)


def host(folder: Path, recording: Recording, *, part: int) -> Path:
    """A program for this machine, with the address and undefined-behaviour sanitisers: ``host PORT FOLDER``."""
    program = folder / "host"
    sanitisers = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compiler = needs.program("cc", "gcc")
    _run([compiler, *WARNINGS, *SETTINGS, *sanitisers, *_sources(folder, recording, part, "host"), "-o", str(program)])
    return program


def firmware(folder: Path, recording: Recording, *, part: int) -> Path:
    """An image for ``qemu-system-arm -M mps2-an385``."""
    image = folder / "firmware.elf"
    compiler = needs.program("arm-none-eabi-gcc", "gcc-arm-none-eabi libnewlib-arm-none-eabi")
    core = ("-mcpu=cortex-m3", "-mthumb", "-Os", "-ffunction-sections", "-fdata-sections")
    link = ("-nostartfiles", "--specs=nano.specs", "--specs=nosys.specs", "-Wl,--gc-sections", f"-T{HERE}/an385.ld")
    _run([compiler, *WARNINGS, *SETTINGS, *core, *link, *_sources(folder, recording, part, "an385"), "-o", str(image)])
    return image


def export(folder: Path, model: Path) -> list[str]:
    """What ``edgeguard export`` writes for a model; the compiler's arguments for all of it but the example."""
    for name, text in c99.files(firmware_of(model.read_bytes(), model, 0)).items():
        (folder / name).write_text(text)
    return [f"-I{folder}", *(str(folder / f"{name}.c") for name in (*c99.SOURCES, "edgeguard_model"))]


def _sources(folder: Path, recording: Recording, part: int, board: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recorded.c").write_text(recording.source(part=part))
    own = (HERE / "app.c", HERE / f"board_{board}.c", folder / "recorded.c")
    return [f"-I{HERE}", *map(str, own), *export(folder, recording.model)]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _words(values: npt.NDArray[np.float32]) -> str:
    return ", ".join(f"0x{word:08X}U" for word in values.astype("<f4").view("<u4").ravel())

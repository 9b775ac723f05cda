"""``edgeguard export``: a guarded file as a folder of C99 for a microcontroller's firmware."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeguard.cli import console
from edgeguard.cli.inspect import read_model
from edgeguard.errors import ConfigError

if TYPE_CHECKING:
    from firmware_bridge.c99 import Firmware

COMPILER = "arm-none-eabi-gcc"
EXAMPLE = "main.c"
CORES = ("cortex-m0plus", "cortex-m4")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard export model.guarded.tflite --c -o firmware/edgeguard/ | "
        "edgeguard export model.guarded.tflite --c -o out/ --sequence 7 --json"
    )
    def export(
        model: Path = typer.Argument(help="A guarded .tflite file."),
        output: Path = typer.Option(..., "--output", "-o", help="Folder to write to; made if it is not there."),
        c: bool = typer.Option(False, "--c", help="C99, for microcontrollers: the one thing that there is to export."),
        sequence: int = typer.Option(0, min=0, max=2**32 - 1, help="Number of the release that this file is."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Write what a firmware project needs to run a guarded model and to speak to its gateway.

        The model as a constant array, the EdgeGuard library in C99, the list of operators for TFLite Micro, golden
        vectors from the sidecar beside the model or made up, and what all of it takes of flash and RAM.
        """
        from firmware_bridge import c99

        if not c:
            raise ConfigError("export", got="no language", expected="--c")
        content = read_model(model)
        with console.progress(quiet=as_json) as progress:
            progress("reading the guard", 0, 2)
            firmware = firmware_of(content, model, sequence)
            progress("writing", 1, 2)
            output.mkdir(parents=True, exist_ok=True)
            for name, text in c99.files(firmware).items():
                if name != EXAMPLE or not (output / name).exists():  # which is there to be edited
                    (output / name).write_text(text)
            sizes = sizes_of(output, firmware)
            (output / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")
        if as_json:
            written = sorted(path.name for path in output.iterdir() if path.is_file())
            typer.echo(json.dumps({"output": str(output), "files": written, "sizes": sizes}))
            return
        tables = f"{sizes['tables_bytes']:,} bytes for the evidence tables"
        rows = [
            ("folder", str(output)),
            ("model", f"{len(content):,} bytes of flash, and {tables}"),
            ("operators", ", ".join(firmware.operators)),
            ("golden vectors", ", ".join(vector.status for vector in firmware.golden) or "none"),
        ]
        rows += [(core, _sentence(size)) for core, size in sizes["library"].items()]
        console.facts(rows)


def firmware_of(content: bytes, path: Path, sequence: int) -> Firmware:
    """What the files are made of.

    Raises:
        ModelError, TrustError: as :func:`converters.microcontroller.describe`.
    """
    from converters import microcontroller
    from edgeguard.detection import sidecar
    from firmware_bridge.c99 import Firmware, Vector

    beside = sidecar.path_beside(path)
    found = microcontroller.describe(content, beside.read_bytes() if beside.is_file() else None)
    described = found.metadata
    return Firmware(
        model=content,
        file_digest=hashlib.sha256(content).digest(),
        model_digest=bytes.fromhex(described.model_digest),
        guard_digest=bytes.fromhex(described.guard_digest),
        sequence=sequence,
        detectors=tuple(detector.name for detector in described.detectors),
        classes=len(described.classes),
        outputs=found.outputs,
        class_output=found.class_output,
        synthetic=described.calibration.synthetic,
        largest=found.largest,
        scales=tuple((scale.factor, scale.exponent, scale.mean) for scale in found.scales),
        expected=() if found.expected is None else tuple(int(n) for n in found.expected.ravel()),
        operators=found.operators,
        golden=tuple(
            Vector(
                tensor=golden.tensor,
                label=golden.label,
                status=golden.status,
                scores=tuple(int(n) for n in golden.scores.view("uint32")),
                features=tuple(int(n) for n in golden.features.view("uint32")),
            )
            for golden in found.golden
        ),
    )


def sizes_of(folder: Path, firmware: Firmware) -> dict[str, Any]:
    """Bytes of flash and RAM: of the model and its tables, and of the library for each core, None without compiler."""
    return {
        "model_bytes": len(firmware.model),
        "tables_bytes": 8 * len(firmware.scales) + 2 * len(firmware.expected),
        "library": {core: library_size(folder, core) for core in CORES},
    }


def library_size(folder: Path, core: str) -> dict[str, int] | None:
    """``text``, ``data`` and ``bss`` of the library, without what the example does not use; None unmeasured.

    ``bss`` is the one object that the firmware declares. The C library's memcpy, memmove, memset and memcmp are not
    counted.
    """
    if shutil.which(COMPILER) is None:
        return None
    try:
        return _measured(folder, core)
    except subprocess.CalledProcessError:
        return None


def _measured(folder: Path, core: str) -> dict[str, int]:
    """As :func:`library_size`. Raises CalledProcessError where the compiler has no C library."""
    from firmware_bridge.c99 import SOURCES

    options = [COMPILER, f"-mcpu={core}", "-mthumb", "-std=c99", "-Os", "-ffunction-sections", "-fdata-sections"]
    tools = COMPILER.removesuffix("gcc")
    with tempfile.TemporaryDirectory() as work:

        def output_of(*command: str) -> list[list[str]]:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=work)
            return [line.split() for line in done.stdout.splitlines()]

        output_of(*options, "-c", *(str(folder / f"{name}.c") for name in (*SOURCES, "main")))
        wanted = [row[-1] for row in output_of(f"{tools}nm", "-u", "main.o") if row[-1].startswith("edgeguard_")]
        objects = [f"{name}.o" for name in SOURCES]
        roots = [f"-Wl,-u,{name}" for name in wanted]
        output_of(COMPILER, "-r", "-nostdlib", "-Wl,--gc-sections", *roots, *objects, "-o", "library.o")
        text, data, bss = (int(n) for n in output_of(f"{tools}size", "library.o")[1][:3])
        instance = next(row for row in output_of(f"{tools}nm", "-S", "main.o") if row[-1] == "guard")
        return {"text": text, "data": data, "bss": bss + int(instance[1], 16)}


def _sentence(size: dict[str, int] | None) -> str:
    if size is None:
        return f"library not measured: {COMPILER} is not installed, or has no C library"
    return f"library: text {size['text']:,}, data {size['data']:,}, bss {size['bss']:,} bytes"

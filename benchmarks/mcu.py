"""What the C99 library for microcontrollers takes, and what its link makes of a bad line: `make bench-mcu`.

Measured here:

* ``sizes``: text, data and bss for Cortex-M0+ and M4 without the model, and the largest stack frame of one function;
* ``line``: ten million damaged frames of 16 to 250 bytes, a share of whose bytes is flipped, dropped or doubled: how
  many arrive, whether a wrong one is accepted, and goodput, the share of the line's bytes that is payload that arrived;
* ``fuzz``: libFuzzer with AddressSanitizer and UndefinedBehaviorSanitizer on the frame decoder and on all behind it;
* ``warnings``: every source compiles without any, with gcc and clang, for the host and for Arm.

Exit code 1 where a bound is missed. Needs gcc, clang and gcc-arm-none-eabi.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgeguard.cli.export import CORES, library_size
from firmware_bridge import c99
from tests.firmware_bridge import firmware

MAX_FLASH, MAX_RAM = 6 << 10, 1 << 10
SHARES = (0.01, 0.001)
ARM = "arm-none-eabi-gcc"
LIBRARY = (*c99.SOURCES, "edgeguard_model", "edgeguard_golden")


def main() -> int:
    """Measure, print, and write the results where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000_000, help="damaged frames")
    parser.add_argument("--fuzz", type=int, default=10_000_000, help="executions on the frame decoder")
    parser.add_argument("--fuzz-link", type=int, default=100_000, help="executions on everything behind it")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = firmware.write(Path(work))
        results: dict[str, Any] = {"warnings": warnings(folder), "sizes": sizes(folder)}
        print(json.dumps(results, indent=2), flush=True)
        with ThreadPoolExecutor(max_workers=2) as pool:
            targets = [
                pool.submit(fuzz, folder, "fuzz_decoder", arguments.fuzz, 300),
                pool.submit(fuzz, folder, "fuzz_link", arguments.fuzz_link, 1024),
            ]
            lines = [
                pool.submit(line, folder, arguments.frames, SHARES[0]),
                pool.submit(line, folder, max(1, arguments.frames // 100), SHARES[1]),
            ]
            results["line"] = [job.result() for job in lines]
            results["fuzz"] = [job.result() for job in targets]
        print(json.dumps({name: results[name] for name in ("line", "fuzz")}, indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    fits = all(
        s["text"] + s["data"] <= MAX_FLASH and s["data"] + s["bss"] <= MAX_RAM for s in results["sizes"].values()
    )
    held = not any(row["wrong"] for row in results["line"]) and not any(row["findings"] for row in results["fuzz"])
    return 0 if fits and held and not any(results["warnings"].values()) else 1


def warnings(folder: Path) -> dict[str, int]:
    """How many of the exported sources do not compile without a warning, by compiler."""
    found = {}
    compilers = {"gcc": ["gcc"], "clang": ["clang"]} | {f"{ARM} {c}": [ARM, f"-mcpu={c}", "-mthumb"] for c in CORES}
    for name, compiler in compilers.items():
        found[name] = 0
        for source in (*LIBRARY, "main"):
            for level in ("-Os", "-O2"):
                command = [*compiler, *firmware.WARNINGS, level, "-c", str(folder / f"{source}.c"), "-o", os.devnull]
                found[name] += subprocess.run(command, check=False).returncode != 0
    return found


def sizes(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of the library, by core."""
    found = {}
    for core in CORES:
        size = library_size(folder, core)
        if size is None:
            raise SystemExit(f"{ARM} is missing: apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi")
        found[core] = {**size, "largest_stack_frame": stack(folder, core)}
    return found


def stack(folder: Path, core: str) -> int:
    """Bytes of the largest stack frame of one function."""
    largest = 0
    with tempfile.TemporaryDirectory() as work:
        for source in c99.SOURCES:
            command = [ARM, f"-mcpu={core}", "-mthumb", "-std=c99", "-Os", "-fstack-usage", "-c"]
            subprocess.run([*command, str(folder / f"{source}.c")], check=True, cwd=work)
        for listing in Path(work).glob("*.su"):
            largest = max(largest, *(int(row.split("\t")[1]) for row in listing.read_text().splitlines()))
    return largest


def line(folder: Path, frames: int, share: float) -> dict[str, Any]:
    """Frames over a line on which this share of bytes is damaged, until so many were."""
    program = folder / f"line-{share}"
    compile_with("gcc", folder, program, firmware.C / "line.c", "-O3")
    started = time.monotonic()
    done = subprocess.run([str(program), str(frames), str(share), "1"], capture_output=True, text=True, check=False)
    counted = json.loads(done.stdout)
    return {
        "share_of_bytes": share,
        **counted,
        "goodput": round(counted["payload_bytes"] / counted["line_bytes"], 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def fuzz(folder: Path, name: str, executions: int, longest: int) -> dict[str, Any]:
    """Run one of the fuzz targets; ``findings`` counts crashes, of which libFuzzer stops at the first."""
    program = folder / name
    sanitizers = ("-g", "-O2", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
    compile_with("clang", folder, program, firmware.C / f"{name}.c", *sanitizers)
    started = time.monotonic()
    command = [str(program), f"-runs={executions}", f"-max_len={longest}", "-seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        sys.stderr.write(done.stderr[-5000:])
    return {
        "target": name,
        "executions": executions,
        "findings": int(done.returncode != 0),
        "seconds": round(time.monotonic() - started, 1),
    }


def compile_with(compiler: str, folder: Path, target: Path, program: Path, *options: str) -> None:
    """Link a program with the library."""
    sources = [*(folder / f"{name}.c" for name in LIBRARY), program]
    command = [compiler, *firmware.WARNINGS, *options, f"-I{folder}", *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())

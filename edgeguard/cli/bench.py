"""``edgeguard bench``: what the guard costs on this board, beside the same model without it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeguard.cli import console
from edgeguard.cli.inspect import read_model
from edgeguard.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeguard.detection.bench import Conditions, Open, Reading, Row, Samples
    from edgeguard.detection.runtime import RuntimeInfo

_RANDOM_INPUTS = 32
_HEAD = ["", "n", "p50 us", "p90 us", "p99 us", "p99, 95%", "x bare", "heats", "per s", "CPU us", "passes", "mJ"]
_NEEDS_DATA = "not measured: needs clean inputs (--data), for its cost depends on how many are doubtful"

_INK, _MUTED, _GRID, _FILL = "#1b1f24", "#57606a", "#d8dee4", "#9cc3e4"
_MARKS = {50: "#0b62a8", 90: "#b25e00", 99: "#8c1d18"}
_WIDTH, _LEFT, _RIGHT, _TOP, _STRIP, _BOTTOM = 1200, 270, 190, 110, 100, 80
_BINS = 150
_SHOWN = 0.998
"""Share of each row's latencies that a picture has room for: a few are many times the median."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard bench model.guarded.tflite | "
        "edgeguard bench model.guarded.tflite --data clean.npz --n 5000 --plot latency.png | "
        "edgeguard bench model.tflite --runtime tflite-runtime --threads 4 --json"
    )
    def bench(
        model: Path = typer.Argument(help="A .tflite file, guarded or not."),
        data: str | None = typer.Option(
            None, help="Clean inputs: digits, a name, an npz file or an image folder; default: random ones."
        ),
        n: int = typer.Option(1000, "--n", min=10, help="Timed runs of each row."),
        runtime: str | None = typer.Option(None, help="litert, tflite-runtime or tensorflow; default: as elsewhere."),
        threads: int = typer.Option(1, min=1, help="Threads that the runtime may use."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
        plot: Path | None = typer.Option(None, help="Draw the latencies into this PNG file."),
    ) -> None:
        """Measure latency, processor time, memory and energy of a model with its guard, and of the same one without.

        All take turns in one run, so that their ratios hold on a busy board too. Where the sidecar NAME.guard.npz lies
        beside the model, and there are clean inputs, the further looks at doubtful inputs are measured as well.

        In the table: percentiles of the latency, and where p99 lies with 95% confidence; the ratio of p50 to the model
        without guard, the median of five heats with new interpreters, and the least and highest of them; inputs per
        second, processor time per input, inferences ("passes") per input, and energy where the board tells its power.
        """
        from edgeguard import data as datasets
        from edgeguard.detection import bench as measuring
        from edgeguard.detection import runtime as runtimes

        content = read_model(model)
        if plot is not None and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):
            raise ConfigError("--plot", got=plot, expected="a .png file in a folder that is there")
        runtime = runtimes.choose(runtime)
        given = None if data is None else datasets.pool(data, "test").x_test
        with console.progress(quiet=as_json) as progress:
            progress("measuring memory", 0, n)
            memory = measuring.footprint(model, threads=threads, runtime=runtime)
            lined_up = _line_up(model, content, given, threads, runtime)
            measured, readings = measuring.measure(
                lined_up.opened, n=n, look=lambda: read_board(Path("/")), progress=progress
            )
        found = measuring.conditions(readings)
        rows = measuring.rows(measured, found.power_w)
        document = {
            "model": str(model),
            "file_digest": hashlib.sha256(content).hexdigest(),
            "board": board_name(Path("/")),
            "runtime": asdict(lined_up.runtime),
            "inputs": {"data": data, "count": lined_up.inputs},
            "rows": [asdict(row) for row in rows],
            "not_measured": dict(lined_up.missing),
            **asdict(memory),
            "conditions": asdict(found),
            "warnings": list(measuring.doubts(measured, found)),
        }
        if plot is not None:
            from converters.files import write

            write(_picture(measured, title=f"{model.name} on {document['board']}"), plot)
        if as_json:
            typer.echo(json.dumps(document))
        else:
            _print(document, rows, found)


@dataclass(frozen=True, kw_only=True)
class _LineUp:
    """What is compared, on which runtime and how many different inputs, and by name why the rest is not."""

    opened: Mapping[str, Open]
    runtime: RuntimeInfo
    inputs: int
    missing: Mapping[str, str]


def _line_up(path: Path, content: bytes, given: npt.NDArray[Any] | None, threads: int, runtime: str) -> _LineUp:
    """Find what can be compared, and hold the model without guard against the file.

    Raises:
        ModelError: the file or its inputs cannot be used, or the guard changes what the model says.
        TrustError: the file or its sidecar was changed.
    """
    from edgeguard.detection import bench as measuring
    from edgeguard.detection.guarded import GuardedModel, TfliteModel
    from edgeguard.detection.sidecar import read_beside

    whole = TfliteModel(content, threads=threads, runtime=runtime)
    guarded = None
    if measuring.is_guarded(whole):
        guarded = GuardedModel.load(content, threads=threads, runtime=runtime)
    inputs = measuring.random_inputs(guarded or whole, _RANDOM_INPUTS) if given is None else given
    bare: bytes | None = content
    sidecar, missing = None, {}
    if guarded is None:
        missing[measuring.GUARDED] = "not available: the model has no guard; add one: edgeguard convert"
    else:
        guarded.check(inputs[0])
        bare = _without_guard(content)
        if bare is None:
            missing[measuring.BARE] = "not available: what takes a guard out is not installed (ai-edge-litert)"
        else:
            measuring.check_same_outputs(TfliteModel(bare, threads=threads, runtime=runtime), whole, inputs)
        sidecar = read_beside(path, guarded.metadata)
        why = measuring.why_no_cascade(guarded, sidecar)
        if why is not None or given is None:
            missing[measuring.CASCADE] = _NEEDS_DATA if why is None else f"not available: {why}"
            sidecar = None
    opened = measuring.contestants(
        bare=bare,
        guarded=None if guarded is None else content,
        sidecar=sidecar,
        inputs=inputs,
        threads=threads,
        runtime=runtime,
    )
    return _LineUp(opened=opened, runtime=whole.runtime, inputs=len(inputs), missing=missing)


def _without_guard(content: bytes) -> bytes | None:
    """A guarded file as it is without its guard; None where the packages that take it out are not installed.

    Raises:
        TrustError: model or guard were changed since one was put into the other.
    """
    try:
        from converters import flatbuffer, guard
    except ImportError:
        return None
    from edgeguard.detection import metadata

    model = flatbuffer.parse(content)
    guard.check_digests(model, metadata.read(content))
    guard.strip(model)
    guard.normalise(model)
    return flatbuffer.pack(model)


def read_board(root: Path) -> Reading:
    """What the board whose files lie under ``root`` says of itself now."""
    from edgeguard.detection.bench import Reading
    from firmware_bridge import board

    found = board.read(root, architecture=platform.machine())
    return Reading(
        temperature_c=found.temperature_c,
        throttled=found.throttled,
        power_w=found.power_w,
        cpu_mhz=None if found.frequency_hz is None else found.frequency_hz / 1e6,
    )


def board_name(root: Path) -> str:
    """Architecture, board or processor where it is known, and how many cores there are."""
    from firmware_bridge import board

    architecture = platform.machine()
    name = board.read(root, architecture=architecture).model
    if name is None:
        processor = re.search(r"^model name\s*: (.+)$", board.contents(root / "proc/cpuinfo") or "", re.MULTILINE)
        name = None if processor is None else processor[1]
    return ", ".join(part for part in (architecture, name, f"{os.cpu_count()} cores") if part)


def _print(document: Mapping[str, Any], rows: Sequence[Row], found: Conditions) -> None:
    from edgeguard.detection.bench import MEANING

    runtime, inputs = document["runtime"], document["inputs"]
    resident, anonymous = (_number(document[key], 1) or "not known" for key in ("rss_mib", "anon_mib"))
    console.facts(
        [
            ("model", document["model"]),
            ("board", document["board"]),
            ("runtime", f"{runtime['name']} {runtime['version']}; threads: {runtime['threads']}"),
            ("inputs", f"{inputs['count']:,} {'random ones' if inputs['data'] is None else 'of ' + inputs['data']}"),
            ("memory, MiB", f"{resident} resident, {anonymous} anonymous, of a process that does nothing else"),
            ("conditions", _told(found)),
        ]
    )
    lines = [_cells(row) for row in rows]
    columns = [(head, *cells) for head, *cells in zip(_HEAD, *lines, strict=True) if any(cells)]
    widths = [max(map(len, column)) for column in columns]
    typer.echo("")
    for name, *figures in zip(*columns, strict=True):
        cells = (f"{text:>{width}}" for text, width in zip(figures, widths[1:], strict=True))
        typer.echo("  ".join([f"{name:<{widths[0]}}", *cells]))
    typer.echo("")
    measured = {row.name for row in rows}
    console.facts(
        [*((name, text) for name, text in MEANING.items() if name in measured), *document["not_measured"].items()]
    )
    for line in document["warnings"]:
        typer.echo(f"warning: {line}")


def _cells(row: Row) -> list[str]:
    """One line of the table, as ``_HEAD`` names its columns."""
    low, high = row.intervals["p99_us"]
    heats = "" if row.ratio_heats is None else f"{row.ratio_heats[0]:.3f}-{row.ratio_heats[1]:.3f}"
    return [
        row.name,
        f"{row.n:,}",
        *(_number(value, 1 if value < 1000 else 0) for value in (row.p50_us, row.p90_us, row.p99_us)),
        f"{_number(low, 0) or '?'}-{_number(high, 0) or '?'}",
        _number(row.ratio_p50, 3),
        heats,
        f"{row.per_second:,.0f}" if row.per_second >= 100 else f"{row.per_second:.2f}",
        _number(1e6 * row.cpu_s, 1),
        _number(row.inferences, 2),
        _number(None if row.energy_j is None else 1e3 * row.energy_j, 3),
    ]


def _number(value: float | None, digits: int) -> str:
    """Empty where it is not known."""
    return "" if value is None else f"{value:,.{digits}f}"


def _told(found: Conditions) -> str:
    """What the board said during the run, and what it does not say."""
    known, unknown = [], []
    for name, value in (
        ("temperature", None if found.temperature_c is None else "{:.1f} to {:.1f} C".format(*found.temperature_c)),
        ("CPU frequency", None if found.cpu_mhz is None else "{:.0f} to {:.0f} MHz".format(*found.cpu_mhz)),
        ("throttling", None if found.throttled is None else "yes" if found.throttled else "none"),
        ("power", None if found.power_w is None else f"{found.power_w:.2f} W"),
    ):
        if value is None:
            unknown.append(name)
        else:
            known.append(f"{name} {value}")
    return "; ".join([*known, *([f"not known: {', '.join(unknown)}"] if unknown else [])])


def _picture(measured: Mapping[str, Samples], *, title: str) -> bytes:
    """A PNG of latency distributions, one strip per row, on one logarithmic axis in microseconds."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    micros = {name: np.sort(samples.seconds) * 1e6 for name, samples in measured.items()}
    # Clocks have steps: no latency is taken for less than a nanosecond.
    low = max(1e-3, min(float(values[0]) for values in micros.values())) / 1.03
    high = max(1.2 * low, *(1.03 * float(np.quantile(values, _SHOWN)) for values in micros.values()))
    small, middle, large = (ImageFont.load_default(size) for size in (15, 18, 22))
    height = _TOP + _STRIP * len(micros) + _BOTTOM
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    right, floor = _WIDTH - _RIGHT, height - _BOTTOM

    def across(value: float) -> float:
        return _LEFT + (right - _LEFT) * math.log(value / low) / math.log(high / low)

    draw.text((20, 16), title, _INK, large)
    for place, (percent, colour) in enumerate(_MARKS.items()):
        start = _LEFT + 110 * place
        draw.line([(start, 78), (start + 30, 78)], colour, 4)
        draw.text((start + 38, 78), f"p{percent}", _INK, small, anchor="lm")
    for tick in _ticks(low, high):
        x = across(tick)
        draw.line([(x, _TOP), (x, floor)], _GRID, 1)
        draw.text((x, floor + 8), f"{tick:,.10g}", _INK, small, anchor="ma")
    draw.text(((_LEFT + right) / 2, floor + 40), "latency, microseconds (logarithmic)", _INK, middle, anchor="ma")
    edges = np.geomspace(low, high, _BINS + 1)
    for row, (name, values) in enumerate(micros.items()):
        bottom = _TOP + _STRIP * (row + 1)
        counts = np.histogram(values, edges)[0]
        scale = (_STRIP - 18) / max(1, int(counts.max()))
        for count, (start, end) in zip(counts.tolist(), pairwise(edges.tolist()), strict=True):
            if count:
                draw.rectangle([(across(start), bottom - scale * count), (across(end), bottom)], _FILL)
        draw.line([(_LEFT, bottom), (right, bottom)], _MUTED, 1)
        draw.text((20, bottom - 62), name, _INK, middle)
        draw.text(
            (20, bottom - 36), f"{len(values):,} runs, tallest bar {counts.max() / len(values):.1%}", _MUTED, small
        )
        for line, (percent, colour) in enumerate(_MARKS.items()):
            value = float(np.percentile(values, percent))
            if value <= high:
                draw.line([(across(value), bottom - _STRIP + 18), (across(value), bottom)], colour, 3)
            draw.text((right + 14, bottom - 84 + 22 * line), f"p{percent}  {value:,.1f} us", colour, small)
        slower = int((values > high).sum())
        if slower:
            draw.text((right + 14, bottom - 18), f"{slower} slower, not shown", _MUTED, small)
    draw.line([(_LEFT, _TOP), (_LEFT, floor)], _MUTED, 1)
    side = Image.new("RGB", (floor - _TOP, 24), "white")
    ImageDraw.Draw(side).text((side.width / 2, 2), "share of runs", _INK, small, anchor="ma")
    image.paste(side.rotate(90, expand=True), (_LEFT - 30, _TOP))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, close enough to read a value off a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(n / 10 for n in range(10, 100, 2))):
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 4:
            return found
    return found

"""The C99 library for microcontrollers, and the files that `edgeguard export` puts beside it.

The sources beside this module are what a firmware project gets, unchanged; the rest is written here from a
:class:`Firmware`. Nothing is written to disk here.

Rules enforced here:

* every array is const, and the model is aligned to 16 bytes, as TFLite Micro reads it in place;
* what a file says comes from one place: messages from their definition, tables from the guard in the file;
* text from a model file reaches C only as letters, digits and a few signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from firmware_bridge.link import c_source

FOLDER = Path(__file__).parent
LIBRARY = ("edgeguard", "edgeguard_slots", "edgeguard_link")
"""The sources of the library that are not made from anything."""
SOURCES = ("edgeguard", "edgeguard_slots", "edgeguard_link", "edgeguard_messages")

_STATUS = {"clean": "EDGEGUARD_CLEAN", "flagged": "EDGEGUARD_FLAGGED"}
_MICRO = {
    "BATCH_MATMUL": "BatchMatMul",
    "PADV2": "PadV2",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTM",
}
"""Operators that TFLite Micro's resolver calls otherwise than by their parts."""


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A golden input as the model takes it, and what is to come of it; floats as bit patterns."""

    tensor: bytes
    label: int
    status: str
    scores: tuple[int, ...]
    features: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Firmware:
    """What the generated files are made of.

    Digests are 32 bytes. ``class_output`` is an index and a type, or None. ``scales`` are (factor, exponent, mean) of
    each feature; ``expected`` is ``[classes][features]`` in one row, or empty.
    """

    model: bytes
    file_digest: bytes
    model_digest: bytes
    guard_digest: bytes
    sequence: int
    detectors: tuple[str, ...]
    classes: int
    outputs: int
    class_output: tuple[int, str] | None
    synthetic: bool
    largest: int
    scales: tuple[tuple[int, int, int], ...]
    expected: tuple[int, ...]
    operators: tuple[str, ...]
    golden: tuple[Vector, ...]


def library() -> dict[str, str]:
    """The sources that are the same for every model, by file name."""
    found = {f"{name}{suffix}": (FOLDER / f"{name}{suffix}").read_text() for name in LIBRARY for suffix in (".h", ".c")}
    found["edgeguard_messages.h"] = c_source.header()
    found["edgeguard_messages.c"] = c_source.source()
    return found


def files(firmware: Firmware) -> dict[str, str]:
    """Everything that goes into the folder, by file name."""
    return {
        **library(),
        "CMakeLists.txt": (FOLDER / "CMakeLists.txt").read_text(),
        "main.c": (FOLDER / "main.c").read_text(),
        "edgeguard_model.h": _model_header(firmware),
        "edgeguard_model.c": _model_source(firmware),
        "edgeguard_golden.h": (FOLDER / "edgeguard_golden.h").read_text(),
        "edgeguard_golden.c": _golden_source(firmware),
        "edgeguard_operators.h": _operators(firmware.operators),
    }


def _model_header(firmware: Firmware) -> str:
    kind = firmware.class_output[1] if firmware.class_output else None
    label = "(-1)" if kind is None else f"edgeguard_argmax_{kind}((output), {firmware.classes}U)"
    lines = [
        "/* Made by `edgeguard export`: the model and its guard. */",
        "#ifndef EDGEGUARD_MODEL_H",
        "#define EDGEGUARD_MODEL_H",
        "",
        '#include "edgeguard.h"',
        "",
        f"#define EDGEGUARD_MODEL_SIZE {len(firmware.model)}U",
        "/* Indices of the model's outputs: its own first, then scores and features. */",
        f"#define EDGEGUARD_OUTPUT_CLASSES {firmware.class_output[0] if firmware.class_output else -1}",
        f"#define EDGEGUARD_OUTPUT_SCORES {firmware.outputs - 2}",
        f"#define EDGEGUARD_OUTPUT_FEATURES {firmware.outputs - 1}",
        "/* The predicted class, from the data of output EDGEGUARD_OUTPUT_CLASSES. */",
        f"#define EDGEGUARD_LABEL(output) {label}",
        "",
        "extern const uint8_t edgeguard_model[EDGEGUARD_MODEL_SIZE];",
        "extern const edgeguard_guard_t edgeguard_guard;",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def _model_source(firmware: Firmware) -> str:
    scales = "".join(f"    {{{f}U, {e}, {m}L}},\n" for f, e, m in firmware.scales)
    expected = ""
    if firmware.expected:
        size = len(firmware.expected)
        expected = f"static const int16_t expected[{size}] = {{\n{_rows(firmware.expected)}}};\n\n"
    names = ",".join(re.sub(r"[^A-Za-z0-9_.-]", "_", name) for name in firmware.detectors)
    return f"""/* Made by `edgeguard export`: the model and its guard. */
#include "edgeguard_model.h"

#if defined(__GNUC__)
#define ALIGNED __attribute__((aligned(16)))
#else
#define ALIGNED
#endif

static const edgeguard_content_t content = {{
    {{{_bytes(firmware.file_digest)}}},
    {{{_bytes(firmware.model_digest)}}},
    {{{_bytes(firmware.guard_digest)}}},
    {firmware.sequence}UL,
    EDGEGUARD_MODEL_SIZE}};

static const edgeguard_scale_t scales[{len(firmware.scales)}] = {{
{scales}}};

{expected}const edgeguard_guard_t edgeguard_guard = {{
    &content,
    "{names}",
    scales,
    {"expected" if firmware.expected else "NULL"},
    0x{firmware.largest:08X}L,
    {len(firmware.scales)}U,
    {firmware.classes}U,
    {len(firmware.detectors)}U,
    {"true" if firmware.synthetic else "false"}}};

const uint8_t edgeguard_model[EDGEGUARD_MODEL_SIZE] ALIGNED = {{
{_rows(firmware.model)}}};
"""


def _golden_source(firmware: Firmware) -> str:
    parts = ['/* Made by `edgeguard export`: inputs and what is to come of them. */\n#include "edgeguard_golden.h"\n']
    rows = []
    for number, vector in enumerate(firmware.golden):
        parts.append(f"static const uint8_t input{number}[{len(vector.tensor)}] = {{\n{_rows(vector.tensor)}}};\n")
        for what, values in (("scores", vector.scores), ("features", vector.features)):
            hexadecimal = [f"0x{value:08X}UL" for value in values]
            parts.append(f"static const uint32_t {what}{number}[{len(values)}] = {{\n{_rows(hexadecimal, 8)}}};\n")
        status = _STATUS.get(vector.status, "EDGEGUARD_NOT_CHECKED")
        row = f"input{number}, scores{number}, features{number}, {len(vector.tensor)}U, {vector.label}, {status}"
        rows.append(f"    {{{row}}}")
    count = max(1, len(rows))
    table = ",\n".join(rows) or "    {NULL, NULL, NULL, 0U, -1, EDGEGUARD_NOT_CHECKED}"
    parts.append(f"const uint32_t edgeguard_golden_count = {len(rows)}U;\n")
    parts.append(f"const edgeguard_golden_t edgeguard_golden[{count}] = {{\n{table}}};\n")
    return "\n".join(parts)


def _operators(names: Iterable[str]) -> str:
    found = list(names)
    adds = "".join(f"        (resolver).Add{_micro(name)}(); /* {name} */ \\\n" for name in found)
    return f"""/* Made by `edgeguard export`: what TFLite Micro needs to run the model, for C++.
 *
 *     tflite::MicroMutableOpResolver<EDGEGUARD_OPERATORS> resolver;
 *     EDGEGUARD_ADD_OPERATORS(resolver);
 */
#ifndef EDGEGUARD_OPERATORS_H
#define EDGEGUARD_OPERATORS_H

#define EDGEGUARD_OPERATORS {len(found)}
#define EDGEGUARD_ADD_OPERATORS(resolver) \\
    do {{ \\
{adds}    }} while (0)

#endif
"""


def _micro(name: str) -> str:
    """What TFLite Micro's resolver calls an operator: CONV_2D is Conv2D."""
    return _MICRO.get(name) or "".join(part if part == "2D" else part.capitalize() for part in name.split("_"))


def _bytes(digest: bytes) -> str:
    return ", ".join(f"0x{byte:02X}U" for byte in digest)


def _rows(values: Sequence[object] | bytes, width: int = 20) -> str:
    lines = (", ".join(map(str, values[i : i + width])) for i in range(0, len(values), width))
    return "".join(f"    {line},\n" for line in lines)

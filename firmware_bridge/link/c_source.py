"""Writes the C99 codec of the messages: ``edgeguard_messages.h`` and ``.c``, from the one definition. Pure.

Rules enforced here:

* the C reads what a gateway sends and writes what a microcontroller sends; it holds nothing else;
* a reader checks the length first, copies no bytes (``const uint8_t *`` into the payload), and takes no value that its
  field cannot have;
* a writer cannot write beyond ``EDGEGUARD_<MESSAGE>_MAX`` bytes, whatever its structure holds.

A float32 is ``uint32_t``, its bit pattern: nothing here needs floating point.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator

import msgspec

from firmware_bridge.link import messages
from firmware_bridge.link.messages import (
    MESSAGES,
    SIZES,
    Blob,
    Choice,
    Kind,
    Message,
    Number,
    Origin,
    Raw,
    Several,
    Text,
    bounds,
    fields,
)

_TYPES = {
    "u8": "uint8_t",
    "u16": "uint16_t",
    "u32": "uint32_t",
    "u64": "uint64_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "f32": "uint32_t",
}
_LIMITS = ("VERSION", "MAX_PAYLOAD", "LABELS", "CHANNELS", "DETECTORS", "CHUNK", "BINS", "MAX_LABEL", "MAX_EXCESS")

_NOTICE = "/* Made by `edgeguard export` from firmware_bridge/link/messages.py: change it there. */"

_HELPERS = """\
#if defined(__BYTE_ORDER__) && (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__)
#error "numbers are copied to the line as they lie in memory: this needs a little-endian machine"
#endif

/* What is written of a structure, member by member: so a message costs four bytes of flash for each of them. */
#define PLAIN 0U /* `size` bytes, for each element */
#define COUNT 1U /* how many elements the next entry has, `size` at most */
#define RAW 2U   /* a pointer to `size` bytes */
#define TEXT 3U  /* a pointer to characters, `size` at most */
#define END 4U

typedef struct {
    uint8_t kind;
    uint8_t size;
    uint16_t at;
} field_t;

static uint8_t *put_text(uint8_t *out, const uint8_t *text, uint32_t most)
{
    uint32_t size = 0U;
    while ((size < most) && (text[size] != 0U)) {
        size++;
        out[size] = text[size - 1U];
    }
    out[0] = (uint8_t)size;
    return &out[size + 1U];
}

static uint16_t put(const field_t *field, const void *message, uint8_t *out)
{
    uint8_t *at = out;
    uint32_t elements = 1U;
    for (; field->kind != END; field++) {
        const uint8_t *const place = &((const uint8_t *)message)[field->at];
        const uint8_t *from = place;
        if (field->kind == COUNT) {
            elements = (*place < field->size) ? *place : field->size;
            *at = (uint8_t)elements;
            at = &at[1];
            continue;
        }
        if (field->kind != PLAIN) {
            (void)memcpy(&from, (const void *)place, sizeof from);
        }
        if (field->kind == TEXT) {
            at = put_text(at, from, field->size);
        } else {
            (void)memcpy(at, from, elements * field->size);
            at = &at[elements * field->size];
        }
        elements = 1U;
    }
    return (uint16_t)(at - out);
}

static uint16_t get_u16(const uint8_t *in)
{
    return (uint16_t)(in[0] | ((uint32_t)in[1] << 8));
}

static uint32_t get_u32(const uint8_t *in)
{
    return (uint32_t)in[0] | ((uint32_t)in[1] << 8) | ((uint32_t)in[2] << 16) | ((uint32_t)in[3] << 24);
}

static uint64_t get_u64(const uint8_t *in)
{
    return (uint64_t)get_u32(in) | ((uint64_t)get_u32(&in[4]) << 32);
}
"""


def header() -> str:
    """``edgeguard_messages.h``: limits, enumerations, a structure per message, and the functions' declarations."""
    parts = [
        f"{_NOTICE}\n#ifndef EDGEGUARD_MESSAGES_H\n#define EDGEGUARD_MESSAGES_H\n",
        "#include <stdbool.h>\n#include <stdint.h>\n",
        "\n".join(f"#define EDGEGUARD_{name} {getattr(messages, name)}" for name in _LIMITS),
        f"#define EDGEGUARD_SCHEMA 0x{messages.SCHEMA:08X}UL",
        f"/* Stands for an unknown number. */\n#define EDGEGUARD_UNKNOWN 0x{0xFFFFFFFF:X}UL\n",
    ]
    for choice in _choices():
        name = _snake(choice.__name__).upper()
        parts.append("\n".join(f"#define EDGEGUARD_{name}_{item.name} {item.value}U" for item in choice) + "\n")
    for message in MESSAGES:
        name = _snake(message.__name__)
        parts.append(f"#define EDGEGUARD_TYPE_{name.upper()} {message.TYPE}U")
        parts.append(f"#define EDGEGUARD_{name.upper()}_MAX {bounds(message)[1]}U")
    parts.append("")
    elements = dict.fromkeys(
        kind.of
        for message in MESSAGES
        for _, kind in fields(message)
        if isinstance(kind, Several) and not isinstance(kind.of, Number)
    )
    parts += [_structure(element) for element in (*elements, *MESSAGES)]
    parts += [f"{_signature_put(message)};" for message in _sent_by("mcu")]
    parts += [f"{_signature_get(message)};" for message in _sent_by("gateway")]
    return "\n".join([*parts, "\n#endif\n"])


def source() -> str:
    """``edgeguard_messages.c``."""
    parts = [f'{_NOTICE}\n#include "edgeguard_messages.h"\n\n#include <stddef.h>\n#include <string.h>\n', _HELPERS]
    parts += ["\n".join(_put(message)) for message in _sent_by("mcu")]
    parts += ["\n".join(_get(message)) for message in _sent_by("gateway")]
    return "\n".join(parts)


def _sent_by(origin: Origin) -> list[type[Message]]:
    return [message for message in MESSAGES if message.ORIGIN in (origin, "both")]


def _choices() -> Iterable[type[enum.IntEnum]]:
    kinds = (kind for message in MESSAGES for _, kind in fields(message))
    return dict.fromkeys(kind.of for kind in kinds if isinstance(kind, Choice))


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _type(struct: type[msgspec.Struct]) -> str:
    return f"edgeguard_{_snake(struct.__name__)}_t"


def _structure(struct: type[msgspec.Struct]) -> str:
    lines = [f"    {line}" for name, kind in fields(struct) for line in _members(name, kind)]
    return "\n".join(["typedef struct {", *lines, f"}} {_type(struct)};\n"])


def _members(name: str, kind: Kind) -> Iterator[str]:
    match kind:
        case Number():
            yield f"{_TYPES[kind.kind]} {name};"
        case Choice():
            yield f"uint8_t {name};"
        case Raw():
            yield f"const uint8_t *{name}; /* {kind.size} bytes */"
        case Text():
            yield f"const char *{name}; /* the first {kind.most} characters count */"
        case Blob():
            yield f"const uint8_t *{name};"
            yield f"uint8_t {name}_size;"
        case Several():
            of = _TYPES[kind.of.kind] if isinstance(kind.of, Number) else _type(kind.of)
            if not kind.fixed:
                yield f"uint8_t {name}_count;"
            yield f"{of} {name}[{kind.most}];"


def _signature_put(message: type[Message]) -> str:
    name = _snake(message.__name__)
    return f"uint16_t edgeguard_put_{name}(const {_type(message)} *message, uint8_t *out)"


def _signature_get(message: type[Message]) -> str:
    name = _snake(message.__name__)
    return f"bool edgeguard_get_{name}(const uint8_t *in, uint16_t size, {_type(message)} *message)"


def _put(message: type[Message]) -> Iterator[str]:
    name = _snake(message.__name__)
    yield f"static const field_t {name}_fields[] = {{"
    for member, kind in fields(message):
        for row in _rows(message, member, kind):
            yield f"    {{{row}}},"
    yield "    {END, 0U, 0U}};\n"
    yield f"{_signature_put(message)}\n{{\n    return put({name}_fields, message, out);\n}}\n"


def _rows(message: type[Message], member: str, kind: Kind) -> Iterator[str]:
    place = f"(uint16_t)offsetof({_type(message)}, {member})"
    match kind:
        case Number() | Choice():
            yield f"PLAIN, {bounds(kind)[0]}U, {place}"
        case Raw():
            yield f"RAW, {kind.size}U, {place}"
        case Text():
            yield f"TEXT, {kind.most}U, {place}"
        case Several(of=of, most=most, fixed=fixed):
            _require_no_gaps(of)
            size = bounds(of)[0]
            if not fixed:
                yield f"COUNT, {most}U, (uint16_t)offsetof({_type(message)}, {member}_count)"
            yield f"PLAIN, {size * most if fixed else size}U, {place}"
        case Blob():
            raise ValueError("no message of a microcontroller holds bytes of any length")


def _require_no_gaps(of: Number | type[msgspec.Struct]) -> None:
    """Elements are copied as they lie in memory, where each number begins at a multiple of its size."""
    sizes = [bounds(kind)[0] for _, kind in fields(of)] if isinstance(of, type) else [SIZES[of.kind]]
    if any(sum(sizes[:i]) % size for i, size in enumerate(sizes)) or sum(sizes) % max(sizes):
        raise ValueError(f"{of}: there would be gaps between its numbers")


def _get(message: type[Message]) -> Iterator[str]:
    least, most = bounds(message)
    yield f"{_signature_get(message)}\n{{"
    wrong = f"size != {most}U" if least == most else f"(size < {least}U) || (size > {most}U)"
    yield f"    if ({wrong}) {{\n        return false;\n    }}"
    at = 0
    for name, kind in fields(message):
        value = f"message->{name}"
        match kind:
            case Number(kind=number):
                yield f"    {value} = get_{number}(&in[{at}]);"
            case Choice(of=of):
                yield f"    if (in[{at}] > {max(of)}U) {{\n        return false;\n    }}\n    {value} = in[{at}];"
            case Raw():
                yield f"    {value} = &in[{at}];"
            case Blob() if at + 1 == least:
                yield f"    {value}_size = in[{at}];\n    {value} = &in[{at + 1}];"
                yield f"    if (size != ({value}_size + {least}U)) {{\n        return false;\n    }}"
            case _:
                raise ValueError(f"{message.__name__}: only its last field may vary in length")
        at += bounds(kind)[0]
    yield "    return true;\n}\n"

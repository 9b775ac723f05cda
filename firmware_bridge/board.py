"""What a board says of itself: temperature, throttling, supply, clock, memory, power; from sysfs and procfs alone.

Rules enforced here:

* what a board does not say is None, never zero and never "fine";
* a file that is missing, empty, unreadable, binary or absurd is as good as none: nothing here raises;
* a sensor counts only where its name says what it measures: a Jetson Nano's ``PMIC-Die`` stands at 100 degrees for
  ever, and a fan that turns is a "cooling device" too;
* no reading is summed up from parts that may overlap: power is that of a rail which feeds all others, or None.

Formats: the Linux kernel's ``sysfs-class-thermal``, ``sysfs-class-hwmon``, ``hwmon/ina3221`` and ``pm/cpufreq``
documents, and ``get_throttled`` in the Raspberry Pi documentation (``vcgencmd``). Reading ``get_throttled`` leaves one
warning per boot in the kernel's log: it is deprecated, but nothing else tells of heat.

Example:
    >>> read(architecture="aarch64").temperature_c  # doctest: +SKIP
    51.6
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_MAX_BYTES = 64 << 10

_PROCESSOR_ZONE = re.compile(r"([bm]?cpu|soc|tj)\d*[-_]therm(al)?|x86_pkg_temp|bcm2835_thermal", re.IGNORECASE)
_SLOWING_DEVICE = re.compile(r".+-throttle-alert|.+-balanced|(thermal-)?cpufreq-.+|devfreq-.+|Processor")
_SUPPLY_RAILS = ("VDD_IN", "POM_5V_IN")
"""Rails that feed all the others, as NVIDIA names them on its modules."""

# Bits of get_throttled: under-voltage; frequency capped, throttled, soft temperature limit. "Has occurred" 16 higher.
_LOW, _SLOW = 0b0001, 0b1110
_OCCURRED = 16

Kind = Literal["raspberry-pi", "jetson", "generic"]


@dataclass(frozen=True, kw_only=True)
class Board:
    """One look at a board.

    Attributes:
        kind: which of the boards known here it is.
        model: its name in the device tree.
        architecture: as it was passed in.
        release: of Jetson Linux, as ``36.4.0``.
        temperature_c: the hottest zone of processor or system-on-chip, in degrees Celsius.
        throttled: the processor is slowed down now.
        throttled_since_boot: now or before.
        under_voltage: the supply is too weak now, or was within the last two seconds.
        under_voltage_since_boot: now or before.
        frequency_hz: of the fastest group of processors, now.
        max_frequency_hz: the most that any group can do.
        memory_bytes: total.
        available_bytes: what can be had without swapping.
        power_w: what the whole board or module takes.
    """

    kind: Kind
    model: str | None
    architecture: str
    release: str | None
    temperature_c: float | None
    throttled: bool | None
    throttled_since_boot: bool | None
    under_voltage: bool | None
    under_voltage_since_boot: bool | None
    frequency_hz: int | None
    max_frequency_hz: int | None
    memory_bytes: int | None
    available_bytes: int | None
    power_w: float | None


def read(root: Path = Path("/"), *, architecture: str) -> Board:
    """Look at the board once.

    Args:
        root: folder that holds ``sys``, ``proc`` and ``etc``.
        architecture: the machine's, as ``platform.machine()`` says; no file tells it.
    """
    flags, alarm, events = _pi_flags(root), _pi_alarm(root), _over_current_events(root)
    was_slow, was_low = _flag(flags, _SLOW << _OCCURRED), _flag(flags, _LOW << _OCCURRED)
    if alarm is not None:
        # The alarm's driver has the firmware clear these bits every two seconds: one that is not set tells nothing.
        was_slow, was_low = was_slow or None, was_low or None
    throttled = _either(_flag(flags, _SLOW), _cooling(root))
    under_voltage = _either(_flag(flags, _LOW), alarm)
    total, available = _memory(root)
    model = contents(root / "proc/device-tree/model")
    release = contents(root / "etc/nv_tegra_release")
    numbers = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", release or "")
    return Board(
        kind=_kind(root, model, release),
        model=model.splitlines()[0] if model else None,
        architecture=architecture,
        release=".".join(numbers.groups()) if numbers else None,
        temperature_c=_temperature_c(root),
        throttled=throttled,
        # Over-current is not all that slows a Jetson down: no event does not mean never.
        throttled_since_boot=_either(throttled or None, was_slow, any(events.values()) or None),
        under_voltage=under_voltage,
        under_voltage_since_boot=_either(under_voltage or None, was_low, events[1] > 0 if 1 in events else None),
        frequency_hz=_frequency_hz(root, "scaling_cur_freq"),
        max_frequency_hz=_frequency_hz(root, "cpuinfo_max_freq"),
        memory_bytes=total,
        available_bytes=available,
        power_w=_power_w(root),
    )


def contents(path: Path) -> str | None:
    """The text of a small file, without white space around it; None where there is none that can be read.

    A NUL ends a line, as it ends a string in the device tree.
    """
    try:
        with path.open("rb") as file:
            found = file.read(_MAX_BYTES).replace(b"\0", b"\n").decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if found and found.translate({10: " ", 9: " "}).isprintable() else None


def number(path: Path, low: int, high: int) -> int | None:
    """The decimal number that a file holds; None where it holds no such, or one outside of ``low`` to ``high``."""
    found = contents(path) or ""
    if not re.fullmatch(r"-?[0-9]{1,18}", found):
        return None
    return int(found) if low <= int(found) <= high else None


def _kind(root: Path, model: str | None, release: str | None) -> Kind:
    if model and model.startswith("Raspberry Pi"):
        return "raspberry-pi"
    compatible = contents(root / "proc/device-tree/compatible") or ""
    return "jetson" if release or "nvidia,tegra" in compatible else "generic"


def _flag(flags: int | None, mask: int) -> bool | None:
    return None if flags is None else bool(flags & mask)


def _either(*values: bool | None) -> bool | None:
    """True where one is; False where one is known and none is True; else None."""
    known = [value for value in values if value is not None]
    return any(known) if known else None


def _pi_flags(root: Path) -> int | None:
    # The firmware's node lies under "soc", on newer boards under "soc@ADDRESS".
    for path in (root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled"):
        found = contents(path) or ""
        if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", found):
            return int(found, 16)
    return None


def _hwmon(root: Path, name: str) -> Iterator[Path]:
    return (chip for chip in (root / "sys/class/hwmon").glob("hwmon*") if contents(chip / "name") == name)


def _pi_alarm(root: Path) -> bool | None:
    alarms = (number(chip / "in0_lcrit_alarm", 0, 1) for chip in _hwmon(root, "rpi_volt"))
    return _either(*(None if alarm is None else alarm > 0 for alarm in alarms))


def _over_current_events(root: Path) -> dict[int, int]:
    """How often each alarm of a Jetson Orin's supply went off since boot: 1 under-voltage, 2 and 3 over-current."""
    counts = {n: number(chip / f"oc{n}_event_cnt", 0, 2**32) for chip in _hwmon(root, "soctherm_oc") for n in (1, 2, 3)}
    return {n: count for n, count in counts.items() if count is not None}


def _cooling(root: Path) -> bool | None:
    states = (
        number(device / "cur_state", 0, 10_000)
        for device in (root / "sys/class/thermal").glob("cooling_device*")
        if _SLOWING_DEVICE.fullmatch(contents(device / "type") or "")
    )
    return _either(*(None if state is None else state > 0 for state in states))


def _temperature_c(root: Path) -> float | None:
    # In thousandths of a degree. A zone without power says -256000, or fails to be read.
    found = (
        number(zone / "temp", -40_000, 150_000)
        for zone in (root / "sys/class/thermal").glob("thermal_zone*")
        if _PROCESSOR_ZONE.fullmatch(contents(zone / "type") or "")
    )
    return max((value / 1000 for value in found if value is not None), default=None)


def _frequency_hz(root: Path, name: str) -> int | None:
    # In kHz, a file for each group of processors that share a clock.
    files = (root / "sys/devices/system/cpu/cpufreq").glob(f"policy*/{name}")
    found = (number(file, 1_000, 100_000_000) for file in files)
    return max((value * 1000 for value in found if value is not None), default=None)


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Bytes in total and available."""
    lines = contents(root / "proc/meminfo") or ""
    found = {
        name: int(kib) << 10 for name, kib in re.findall(r"^(MemTotal|MemAvailable): +([0-9]{1,15}) kB$", lines, re.M)
    }
    total, available = found.get("MemTotal") or None, found.get("MemAvailable")
    if available is not None and (total is None or available > total):
        available = None
    return total, available


def _power_w(root: Path) -> float | None:
    # An INA3221: millivolts and milliamperes, or microwatts; on kernel 4.9 an IIO device: milliwatts.
    for label in (root / "sys/class/hwmon").glob("hwmon*/in*_label"):
        if contents(label) in _SUPPLY_RAILS:
            chip, channel = label.parent, label.name.removeprefix("in").removesuffix("_label")
            millivolts = number(chip / f"in{channel}_input", 1, 100_000)
            milliamperes = number(chip / f"curr{channel}_input", 1, 100_000)
            if millivolts is not None and milliamperes is not None:
                return millivolts * milliamperes / 1e6
            microwatts = number(chip / f"power{channel}_input", 1, 10**9)
            if microwatts is not None:
                return microwatts / 1e6
    for label in (root / "sys/bus/iio/devices").glob("iio:device*/rail_name_*"):
        if contents(label) in _SUPPLY_RAILS:
            channel = label.name.removeprefix("rail_name_")
            milliwatts = number(label.parent / f"in_power{channel}_input", 1, 10**6)
            if milliwatts is not None:
                return milliwatts / 1e3
    return None

"""What boards say of themselves, from copies of the files that their kernels show."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_bridge.board import Board, read

BOARDS = Path(__file__).parent / "boards"
FILES = sorted(path.relative_to(BOARDS) for path in BOARDS.rglob("*") if path.is_file())

FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
VOLTAGE = "sys/class/hwmon/hwmon1"
ZONE = "sys/class/thermal/thermal_zone0"

Change = Callable[..., Board]


def look(root: Path) -> Board:
    return read(root, architecture="aarch64")


@pytest.fixture
def changed(tmp_path: Path) -> Change:
    """Reads a board with some of its files replaced: by text, by bytes, by a folder (``...``), by nothing."""

    def change(name: str, files: dict[str, object]) -> Board:
        root = tmp_path / name
        shutil.copytree(BOARDS / name, root)
        for relative, content in files.items():
            path = root / relative
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is ...:
                path.mkdir()
            elif content is not None:
                path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
        return look(root)

    return change


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "raspberry-pi-4",
            Board(
                kind="raspberry-pi",
                model="Raspberry Pi 4 Model B Rev 1.4",
                architecture="aarch64",
                release=None,
                temperature_c=51.608,
                throttled=False,
                throttled_since_boot=True,
                under_voltage=False,
                under_voltage_since_boot=True,
                frequency_hz=1_500_000_000,
                max_frequency_hz=1_800_000_000,
                memory_bytes=3_884_312 * 1024,
                available_bytes=3_011_220 * 1024,
                power_w=None,
            ),
            id="Raspberry Pi 4, kernel 6.1",
        ),
        pytest.param(
            "raspberry-pi-5",
            Board(
                kind="raspberry-pi",
                model="Raspberry Pi 5 Model B Rev 1.0",
                architecture="aarch64",
                release=None,
                temperature_c=48.85,
                throttled=None,
                throttled_since_boot=None,
                under_voltage=False,
                under_voltage_since_boot=None,
                frequency_hz=2_400_000_000,
                max_frequency_hz=2_400_000_000,
                memory_bytes=8_255_216 * 1024,
                available_bytes=7_412_096 * 1024,
                power_w=None,
            ),
            id="Raspberry Pi 5, kernel 6.6",
        ),
        pytest.param(
            "jetson-orin-nano",
            Board(
                kind="jetson",
                model="NVIDIA Jetson Orin Nano Developer Kit",
                architecture="aarch64",
                release="36.4.0",
                temperature_c=48.906,
                throttled=False,
                throttled_since_boot=None,
                under_voltage=None,
                under_voltage_since_boot=False,
                frequency_hz=1_113_600_000,
                max_frequency_hz=1_510_400_000,
                memory_bytes=7_802_376 * 1024,
                available_bytes=5_210_448 * 1024,
                power_w=6.01472,  # 5.080 V and 1.184 A
            ),
            id="Jetson Orin Nano, JetPack 6",
        ),
        pytest.param(
            "jetson-nano",
            Board(
                kind="jetson",
                model="NVIDIA Jetson Nano Developer Kit",
                architecture="aarch64",
                release="32.7.1",
                temperature_c=37.5,
                throttled=False,
                throttled_since_boot=None,
                under_voltage=None,
                under_voltage_since_boot=None,
                frequency_hz=1_224_000_000,
                max_frequency_hz=1_479_000_000,
                memory_bytes=4_059_392 * 1024,
                available_bytes=2_204_632 * 1024,
                power_w=2.812,
            ),
            id="Jetson Nano, JetPack 4",
        ),
        pytest.param(
            "x86",
            Board(
                kind="generic",
                model=None,
                architecture="aarch64",
                release=None,
                temperature_c=56.0,
                throttled=False,
                throttled_since_boot=None,
                under_voltage=None,
                under_voltage_since_boot=None,
                frequency_hz=2_700_000_000,
                max_frequency_hz=4_200_000_000,
                memory_bytes=16_262_120 * 1024,
                available_bytes=11_873_408 * 1024,
                power_w=None,
            ),
            id="x86",
        ),
    ],
)
def test_a_board_says_what_it_is_and_how_it_fares(name: str, expected: Board) -> None:
    assert look(BOARDS / name) == expected


def test_a_system_that_says_nothing_is_unknown_in_everything(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert (found.kind, found.architecture) == ("generic", "aarch64")
    assert {getattr(found, field) for field in Board.__dataclass_fields__ if field not in ("kind", "architecture")} == {
        None
    }


@pytest.mark.parametrize("bit", range(20))
def test_each_bit_of_a_raspberry_pi_means_what_its_documentation_says(changed: Change, bit: int) -> None:
    # No driver that clears bits: one that is not set means never.
    found = changed("raspberry-pi-4", {FLAGS: f"{1 << bit:x}\n", f"{VOLTAGE}/name": None})
    assert found.under_voltage is (bit == 0)
    assert found.throttled is (bit in (1, 2, 3))
    assert found.under_voltage_since_boot is (bit in (0, 16))
    assert found.throttled_since_boot is (bit in (1, 2, 3, 17, 18, 19))


@pytest.mark.parametrize(("flags", "before"), [("0", None), ("50000", True), ("0xd0000", True)])
def test_a_raspberry_pi_whose_bits_are_cleared_never_says_never(
    changed: Change, flags: str, before: bool | None
) -> None:
    found = changed("raspberry-pi-4", {FLAGS: flags})
    assert (found.throttled, found.under_voltage) == (False, False)
    assert (found.throttled_since_boot, found.under_voltage_since_boot) == (before, before)


def test_newer_raspberry_pis_have_the_flags_beside_the_address_of_their_bus(changed: Change) -> None:
    path = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
    assert changed("raspberry-pi-5", {path: "8"}).throttled


def test_the_alarm_of_the_supply_counts_without_the_flags(changed: Change) -> None:
    found = changed("raspberry-pi-5", {"sys/class/hwmon/hwmon2/in0_lcrit_alarm": "1\n"})
    assert found.under_voltage
    assert found.under_voltage_since_boot


@pytest.mark.parametrize(
    ("name", "device", "throttled"),
    [
        ("jetson-orin-nano", "cpufreq-cpu0", True),
        ("jetson-orin-nano", "devfreq-17000000.gpu", True),
        ("jetson-orin-nano", "gpu-throttle-alert", True),
        ("jetson-orin-nano", "hot-surface-alert", False),
        ("jetson-orin-nano", "pwm-fan", False),
        ("jetson-nano", "cpu-balanced", True),
        ("jetson-nano", "emergency-balanced", True),
        ("jetson-nano", "pwm-fan", False),
        ("x86", "Processor", True),
        ("x86", "intel_powerclamp", False),
        ("x86", "Fan", False),
    ],
)
def test_cooling_counts_as_throttling_only_where_it_slows_a_processor(
    changed: Change, name: str, device: str, throttled: bool
) -> None:
    types = (BOARDS / name).glob("sys/class/thermal/cooling_device*/type")
    (path, *_) = (path.parent.relative_to(BOARDS / name) for path in types if path.read_text().strip() == device)
    found = changed(name, {f"{path}/cur_state": "1\n"})
    assert found.throttled is throttled
    assert found.throttled_since_boot is (True if throttled else None)


@pytest.mark.parametrize(("alarm", "throttled", "low"), [(1, True, True), (2, True, False), (3, True, False)])
def test_a_jetson_counts_what_its_supply_went_through_since_boot(
    changed: Change, alarm: int, throttled: bool, low: bool
) -> None:
    found = changed("jetson-orin-nano", {f"sys/class/hwmon/hwmon2/oc{alarm}_event_cnt": "27390\n"})
    assert (found.throttled_since_boot, found.under_voltage_since_boot) == (throttled, low)
    assert (found.throttled, found.under_voltage) == (False, None)


def test_a_jetson_is_one_inside_a_container_and_on_a_board_of_another_name_too(changed: Change) -> None:
    inside = changed("jetson-orin-nano", {"etc/nv_tegra_release": None, "proc/device-tree/model": b"Acme Camera 3\0"})
    assert (inside.kind, inside.model, inside.release) == ("jetson", "Acme Camera 3", None)


def test_a_jetson_without_a_device_tree_is_known_by_its_release(changed: Change) -> None:
    found = changed("jetson-nano", {"proc/device-tree/compatible": None, "proc/device-tree/model": None})
    assert (found.kind, found.model) == ("jetson", None)


def test_power_is_unknown_where_no_rail_feeds_all_others(changed: Change) -> None:
    assert changed("jetson-orin-nano", {f"{VOLTAGE}/in1_label": "VDD_GPU_SOC\n"}).power_w is None


def test_power_is_read_in_microwatts_where_there_is_no_current(changed: Change) -> None:
    files = {f"{VOLTAGE}/curr1_input": None, f"{VOLTAGE}/power1_input": "6014720\n"}
    assert changed("jetson-orin-nano", files).power_w == pytest.approx(6.01472)


@pytest.mark.parametrize(
    ("field", "files"),
    [
        ("temperature_c", {f"{ZONE}/temp": "10000000\n"}),
        ("temperature_c", {f"{ZONE}/temp": "-256000\n"}),
        ("temperature_c", {f"{ZONE}/temp": "51.6\n"}),
        ("temperature_c", {f"{ZONE}/temp": "9" * 5000}),
        ("temperature_c", {f"{ZONE}/temp": ""}),
        ("temperature_c", {f"{ZONE}/temp": b"\xff\xfe\0\x01"}),
        ("temperature_c", {f"{ZONE}/temp": ...}),
        ("temperature_c", {f"{ZONE}/temp": None}),
        ("temperature_c", {f"{ZONE}/type": None}),
        ("temperature_c", {f"{ZONE}/type": "PMIC-Die\n"}),
        ("throttled", {FLAGS: "ffffffffff\n"}),
        ("throttled", {FLAGS: "-1\n"}),
        ("throttled", {FLAGS: "none\n"}),
        ("under_voltage", {FLAGS: None, f"{VOLTAGE}/in0_lcrit_alarm": "7\n"}),
        ("under_voltage", {FLAGS: None, f"{VOLTAGE}/name": "other_volt\n"}),
        ("frequency_hz", {"sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "<unknown>\n"}),
        ("frequency_hz", {"sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "0\n"}),
        ("max_frequency_hz", {"sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1_800_000\n"}),
        ("memory_bytes", {"proc/meminfo": "MemTotal:        0 kB\n"}),
        ("memory_bytes", {"proc/meminfo": "MemTotal: much\n"}),
        ("available_bytes", {"proc/meminfo": "MemTotal:  1000 kB\nMemAvailable:  2000 kB\n"}),
        ("available_bytes", {"proc/meminfo": "MemTotal:  1000 kB\nMemFree:  500 kB\n"}),
        ("model", {"proc/device-tree/model": b"\0"}),
        ("model", {"proc/device-tree/model": b"\x1b[2Jnonsense\0"}),
    ],
)
def test_a_file_that_cannot_be_is_unknown(changed: Change, field: str, files: dict[str, object]) -> None:
    assert getattr(look(BOARDS / "raspberry-pi-4"), field) is not None
    assert getattr(changed("raspberry-pi-4", files), field) is None


@pytest.mark.parametrize("value", ["0\n", "-5080\n", "5080000\n", "", ...])
def test_a_running_board_takes_neither_no_power_nor_kilowatts(changed: Change, value: object) -> None:
    assert changed("jetson-orin-nano", {f"{VOLTAGE}/in1_input": value}).power_w is None


def test_a_zone_that_cannot_be_read_does_not_hide_the_others(changed: Change) -> None:
    found = changed("jetson-orin-nano", {"sys/class/thermal/thermal_zone8/temp": ...})
    assert found.temperature_c == 47.812


def possible(found: Board) -> bool:
    """Whether every value is one that a board can have."""
    limits = {
        "temperature_c": (-40, 150),
        "frequency_hz": (1, 10**12),
        "max_frequency_hz": (1, 10**12),
        "memory_bytes": (1, math.inf),
        "available_bytes": (0, math.inf),
        "power_w": (0, 10_000),
    }
    values = {name: getattr(found, name) for name in limits}
    return all(value is None or limits[name][0] <= value <= limits[name][1] for name, value in values.items())


_LIKELY = st.from_regex(rb"\A-?(0x)?[0-9a-f]{1,25}\n?\Z") | st.sampled_from([b"1\n", b"MemTotal: 99 kB\n", b"VDD_IN\n"])


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(BOARDS, tmp_path_factory.mktemp("copies") / "boards"))


@settings(deadline=None)
@given(file=st.sampled_from(FILES), content=st.binary(max_size=200) | _LIKELY)
def test_no_content_of_any_file_raises_or_gives_an_impossible_value(copies: Path, file: Path, content: bytes) -> None:
    (copies / file).write_bytes(content)
    try:
        assert possible(look(copies / file.parts[0]))
    finally:
        shutil.copy(BOARDS / file, copies / file)


def test_the_module_imports_nothing_of_ours() -> None:
    code = (
        "import sys, firmware_bridge.board, firmware_bridge.resources;"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in {'edgeguard', 'converters', 'numpy'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"

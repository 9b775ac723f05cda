"""What is wrong with this device, found before the agent starts or when it does not: a list of checks.

Rules enforced here:

* every check says what was found, and what to do unless it is well; what could not be looked at is "not checked",
  never "ok";
* whatever may crash runs in a child process: NumPy, the TFLite runtime and the model. A crash there, as of a package
  built for another processor, is one failed check. This process loads NumPy only after a child has run it;
* one failed check stops no other that does not need it;
* nothing is written, made or claimed: an agent may be at work meanwhile.

Functions that take values judge; :func:`examine` gathers the values.
"""

from __future__ import annotations

import base64
import ctypes
import ipaddress
import os
import platform
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edgeguard import broker as brokers
from edgeguard.agent.config import AgentConfig, load
from edgeguard.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_NOT_CHECKED, ConfigError, EdgeGuardError, ModelError
from edgeguard.settings import BrokerConfig
from firmware_bridge import board as boards
from firmware_bridge.slots import FOLDER, RECORD, Held, Slots

if TYPE_CHECKING:
    from edgeguard.contract.guard import GuardMetadata

CHILD = (sys.executable, "-m", "edgeguard.agent.doctor")
"""The child process; what to do follows as one argument."""
CHILD_S = 60.0
"""A child that took longer hangs."""
SOON_S = 30 * 86400
"""A certificate that ends within this time is told of."""
HOT_C = 80.0
"""Raspberry Pis and Jetsons slow down a little above this."""
MIN_FREE = 16 << 20
"""With fewer bytes free, not even a report fits for long."""

_PYTHONS = ((3, 10), (3, 13))
_MACHINES = ("x86_64", "aarch64")
_GLIBC = (2, 27)
"""What LiteRT's packages need."""
_YEARS = (2025, 2099)
_TIME_ERROR = 5  # adjtimex(2)
_MAX_SOCKET_PATH = 107  # unix(7), without the NUL

RUNTIME, MODEL, INFERENCE, SELF_TEST = "TFLite runtime", "model and guard", "inference", "self-test"
SLOTS = "model slots"

_NETWORK = base64.b64decode(
    "JAAAAFRGTDMAAAAAAAAAAAAAAAAAAA4AFAAQAAwACAAAAAQADgAAABAAAACsAAAAkAEAAAMAAAACAAAAmAAAAAQAAACe/v//BAAAAIAAAAAAAIC/"
    "AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/"
    "AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/AAAAAAAAgD8AAIC/AAAAAAAAAACo////AQAAABAAAAAMABQAEAAMAAgABAAMAAAAEAAAAFgAAABcAAAA"
    "YAAAAAEAAAAUAAAAAAAOABQAAAAQAAwACwAEAA4AAAAUAAAAAAAACBAAAAAUAAAABAAEAAQAAAABAAAAAgAAAAMAAAAAAAAAAQAAAP////8BAAAA"
    "AgAAAAEAAAAAAAAAAwAAAEwAAAAoAAAABAAAAMb///8EAAAAAgAAAAEAAAAEAAAAAAAKAAwACAAAAAQACgAAAAEAAAAEAAAAAgAAAAQAAAAIAAAA"
    "AAAGAAgABAAGAAAABAAAAAIAAAABAAAACAAAAAEAAAAQAAAADAAMAAsAAAAAAAQADAAAAAkAAAAAAAAJ"
)
"""A float TFLite file of one fully connected layer: weight (8 i + j) mod 3 - 1 from input j of 8 to output i of 4."""

Status = Literal["ok", "warning", "failed", "not checked"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one check. ``do`` is empty where there is nothing to do; ``slots`` only where it is of those."""

    name: str
    status: Status
    found: str
    do: str = ""
    slots: tuple[Held, ...] | msgspec.UnsetType = msgspec.UNSET


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to do: run the network above, or a guarded model and its self-test.

    ``beside``: another file beside which the model's sidecar may lie.
    """

    model: str | None = None
    beside: str | None = None
    runtime: str | None = None
    threads: int = 1


def examine(
    config: Path | None,
    model: Path | None,
    *,
    digests: Callable[[bytes, GuardMetadata], str],
    child: Sequence[str] = CHILD,
    root: Path = Path("/"),
    now: Callable[[], float] = time.time,
) -> tuple[Check, ...]:
    """Check all that can be checked.

    Args:
        config: the agent's TOML file, if there is one.
        model: a guarded ``.tflite`` file; else the one that the agent would run.
        digests: whether a file's digests fit its content: ``fit``, ``do not fit`` or ``not checked``.
        child: program and arguments of the child process.
        root: folder that holds ``sys``, ``proc``, ``etc`` and ``run``.
        now: seconds since 1970.
    """
    settings, configuration = _configuration(config)
    bits = 64 if sys.maxsize > 2**32 else 32
    found = [
        interpreter(version=sys.version_info[:3], machine=platform.machine(), bits=bits, libc=platform.libc_ver()),
        configuration,
        *_models(settings, model, digests, child),
    ]
    if settings is None:
        found += _unchecked("needs the configuration", SLOTS, "broker", "certificates", "state folder", "local socket")
    else:
        # A fetched model, the two slots besides the one that runs, and one that is being written.
        needed = (settings.spool.max_mib + 4 * (settings.update.max_mib if settings.update else 0)) << 20
        found += [
            slots(_slots_folder(settings)),
            _broker(settings.broker),
            _certificates(settings.broker, now()),
            storage(settings.state_dir, needed=needed),
            local_socket(settings.sources.socket.path if settings.sources.socket else None),
        ]
    found += [
        clock(now(), synchronised(root)),
        board(boards.read(root, architecture=platform.machine())),
    ]
    return tuple(found)


def exit_code(checks: Sequence[Check]) -> int:
    """1 where a check failed, 3 where nothing could be checked, else 0: warnings are allowed."""
    states = {check.status for check in checks}
    if "failed" in states:
        return EXIT_FINDINGS
    return EXIT_CLEAN if states & {"ok", "warning"} else EXIT_NOT_CHECKED


def interpreter(*, version: tuple[int, int, int], machine: str, bits: int, libc: tuple[str, str]) -> Check:
    """Judge Python, the machine as ``uname`` calls it, and the C library's name and version."""
    name = "interpreter"
    found = f"Python {'.'.join(map(str, version))}, {machine}, {bits} bit, {' '.join(libc).strip() or 'no glibc'}"
    if bits != 64 or machine not in _MACHINES:
        do = "install a 64-bit system image: LiteRT is made for 64-bit Arm and x86 only"
        return Check(name=name, status="warning", found=found, do=do)
    if not _PYTHONS[0] <= version[:2] <= _PYTHONS[1]:
        do = "use Python 3.10 to 3.13, which the packages are tested with"
        return Check(name=name, status="warning", found=found, do=do)
    if libc[0] != "glibc" or tuple(int(n) for n in libc[1].split(".")[:2] if n.isdigit()) < _GLIBC:
        do = "use a system with glibc 2.27 or later: TFLite runtimes are made for no other"
        return Check(name=name, status="warning", found=found, do=do)
    return Check(name=name, status="ok", found=found)


def clock(now_s: float, synced: bool | None) -> Check:
    """Judge the time, in seconds since 1970, and whether something keeps it right."""
    name, found = "clock", f"{_date(now_s)} UTC"
    if not _YEARS[0] <= time.gmtime(now_s).tm_year <= _YEARS[1]:
        do = "set the clock: without it no certificate and no signed release can be checked"
        return Check(name=name, status="failed", found=found, do=do)
    if synced is None:
        return Check(name=name, status="not checked", found=f"{found}; nothing says whether it is synchronised")
    if not synced:
        do = "timedatectl set-ntp true, or install chrony"
        return Check(name=name, status="warning", found=f"{found}, not synchronised", do=do)
    return Check(name=name, status="ok", found=f"{found}, synchronised")


def synchronised(root: Path, kernel: Callable[[], int] | None = None) -> bool | None:
    """Whether something keeps the clock right: the kernel says, else systemd's mark that it once was.

    Args:
        root: folder that holds ``run``.
        kernel: answers as ``adjtimex`` does.
    """
    state = (kernel or _adjtimex)()
    if state >= 0:
        return state != _TIME_ERROR
    return True if (root / "run/systemd/timesync/synchronized").exists() else None


def _adjtimex() -> int:
    """State of the kernel's clock, -1 where it does not tell. A structure of zeros only asks."""
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024)))
    except (OSError, AttributeError):
        return -1


def certificates(ends: Sequence[tuple[str, float]], now_s: float) -> Check:
    """Judge certificates by their names and when they end, in seconds since 1970."""
    name = "certificates"
    if not ends:
        found = "no certificate of an authority in the file, and none from the broker"
        return Check(name=name, status="not checked", found=found)
    whose, end = min(ends, key=lambda one: one[1])
    found = f"{whose} {'ended' if end <= now_s else 'ends'} on {_date(end)} UTC"
    if end <= now_s:
        return Check(name=name, status="failed", found=found, do="put a new one in place, or correct the clock")
    if end - now_s < SOON_S:
        return Check(name=name, status="warning", found=found, do="put a new one in place before that day")
    return Check(name=name, status="ok", found=found)


def board(look: boards.Board) -> Check:
    """Judge heat, throttling and supply."""
    name = "board"
    title = look.model or f"{look.kind} {look.architecture}"
    if (look.temperature_c, look.throttled, look.under_voltage) == (None, None, None):
        found = f"{title}: says nothing of temperature, throttling and supply"
        return Check(name=name, status="not checked", found=found)
    heat = "temperature unknown" if look.temperature_c is None else f"{look.temperature_c:.0f} C"
    slowed = _when(look.throttled, look.throttled_since_boot) or ("unknown" if look.throttled is None else "none")
    weak = _when(look.under_voltage, look.under_voltage_since_boot)
    supply = f"too weak {weak}" if weak else "unknown" if look.under_voltage is None else "fine"
    found = f"{title}: {heat}, throttling {slowed}, supply {supply}"
    if look.under_voltage_since_boot:
        do = "use the power supply made for this board, and a short cable"
        return Check(name=name, status="warning", found=found, do=do)
    if look.throttled_since_boot or (look.temperature_c or 0) >= HOT_C:
        return Check(name=name, status="warning", found=found, do="cool the board, or give it less to do")
    return Check(name=name, status="ok", found=found)


def _when(now: bool | None, since_boot: bool | None) -> str | None:
    return "now" if now else "since boot" if since_boot else None


def slots(folder: Path) -> Check:
    """Look at the model slots: which model runs, whether it proved itself, the way back, and whether the files hold."""
    try:
        if not (folder / RECORD).exists():
            found = f"{folder}: nothing installed yet; the agent installs its model at the first start"
            return Check(name=SLOTS, status="not checked", found=found)
        held = Slots(folder).survey()
    except OSError as error:
        do = "run this command as the agent's user or as root"
        status: Status = "not checked" if isinstance(error, PermissionError) else "failed"
        return Check(name=SLOTS, status=status, found=f"{folder}: {error.strerror}", do=do)
    except EdgeGuardError as error:
        return _failed(SLOTS, error)
    runs = [one for one in held if one.place == "runs"]
    back = [one for one in held if one.place == "way back"]
    told = "; ".join(_slot(one) for one in held) + ("" if back else "; no way back")
    status, do = "ok", ""
    if not runs or not runs[0].holds:
        status = "failed"
        do = "restart the agent: it takes the way back" if back and back[0].holds else "fetch or copy the model again"
    elif not all(one.holds for one in back):
        status, do = "warning", "there is no way back until the next release: keep the model at hand"
    return Check(name=SLOTS, status=status, found=told, do=do, slots=held)


def _slot(one: Held) -> str:
    digest = "digest holds" if one.holds else "digest does not hold"
    made = ", re-calibrated here" if one.local else ""
    return f"slot {one.name}: sequence {one.sequence}, {one.place}, {one.proof}{made}, {digest}"


def storage(folder: Path, *, needed: int) -> Check:
    """Look at the state folder: that it can be written, and that ``needed`` bytes are free. Leaves nothing behind."""
    name = "state folder"
    there = next(path for path in (folder, *folder.parents) if _exists(path))
    try:
        if there == folder:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
        elif not _is_writable(there):
            return _unwritable(name, there, do="correct state_dir, or its parent's owner")
        free = shutil.disk_usage(there).free
    except OSError as error:
        found = f"{folder}: user {os.geteuid()} cannot write there: {error.strerror}"
        return Check(name=name, status="failed", found=found, do="free space, or correct state_dir or its owner")
    found = f"{folder}: {'writable' if there == folder else 'not there yet'}, {free >> 20:,} MiB free"
    if free < needed:
        status: Status = "failed" if free < MIN_FREE else "warning"
        do = f"free space: spool and updates may need {needed >> 20:,} MiB"
        return Check(name=name, status=status, found=found, do=do)
    return Check(name=name, status="ok", found=found)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # in a folder that this user may not look into
        return False


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _unwritable(name: str, folder: Path, *, do: str) -> Check:
    return Check(name=name, status="failed", found=f"{folder}: no folder that user {os.geteuid()} can write to", do=do)


def local_socket(path: Path | None) -> Check:
    """Look at where the Unix socket for programs on this device will be."""
    name = "local socket"
    if path is None:
        return Check(name=name, status="not checked", found="the configuration has no [sources.socket]")
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        do = f"choose a path of at most {_MAX_SOCKET_PATH} bytes"
        return Check(name=name, status="failed", found=f"{path}: too long for a socket", do=do)
    if not _exists(path.parent):
        do = "create it, unless the service does so at its start (RuntimeDirectory)"
        return Check(name=name, status="warning", found=f"{path.parent}: not there", do=do)
    if not _is_writable(path.parent):
        return _unwritable(name, path.parent, do="correct its owner, or choose another path")
    if path.exists() and not path.is_socket():
        return Check(name=name, status="failed", found=f"{path}: another kind of file", do="remove it")
    return Check(name=name, status="ok", found=f"{path}: its folder is writable")


def run_child(child: Sequence[str], task: Task, names: Sequence[str]) -> list[Check]:
    """Have a child do ``task``; one check for each of ``names``, in this order, whatever becomes of it.

    The child prints a check a line. The first that is missing when it ends is the one that ended it.
    """
    argument = msgspec.json.encode(task).decode()
    try:
        done = subprocess.run(
            [*child, argument], stdin=subprocess.DEVNULL, capture_output=True, timeout=CHILD_S, check=False
        )
        printed, (found, do) = done.stdout, _ending(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        printed, (found, do) = error.stdout or b"", (f"no answer within {CHILD_S:g} s", "try it on an idle board")
    told = {check.name: check for check in _decoded(printed)}
    checks: list[Check] = []
    for name in names:
        if name in told:
            checks.append(told[name])
        elif any(check.name not in told for check in checks):
            checks += _unchecked(f"needs the {checks[-1].name}", name)
        else:
            checks.append(Check(name=name, status="failed", found=found, do=do))
    return checks


def _decoded(printed: bytes) -> Iterator[Check]:
    for line in printed.splitlines():
        try:
            yield msgspec.json.decode(line, type=Check)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue


def _ending(code: int, errors: bytes) -> tuple[str, str]:
    """What a child died of, and what to do."""
    if code >= 0:
        lines = errors.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        found = f"exit code {code}: {said[:300] or 'no reason given'}"
        return found, "reinstall the TFLite runtime and NumPy: pip install 'edgeguard[device]'"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    found = f"crashed with {name} ({signal.strsignal(-code)})"
    if -code == signal.SIGILL:
        do = "a package was built for another processor: install other versions of the TFLite runtime and NumPy"
    elif -code == signal.SIGKILL:
        do = "free memory: the system ends programs that take too much"
    else:
        do = "install another version of the TFLite runtime, or force another one with EDGEGUARD_RUNTIME"
    return found, do


def _configuration(path: Path | None) -> tuple[AgentConfig | None, Check]:
    name = "configuration"
    if path is None:
        return None, Check(name=name, status="not checked", found="no --config was given")
    try:
        settings = load(path)
    except EdgeGuardError as error:
        return None, _failed(name, error)
    return settings, Check(name=name, status="ok", found=f"{path}: fleet {settings.fleet}, device {settings.device}")


def _models(
    settings: AgentConfig | None,
    model: Path | None,
    digests: Callable[[bytes, GuardMetadata], str],
    child: Sequence[str],
) -> list[Check]:
    """The checks that need NumPy and a runtime."""
    chosen = None if settings is None else settings.runtime.name
    (runtime,) = run_child(child, Task(runtime=chosen), [RUNTIME])
    if runtime.status == "failed":
        return [runtime, *_unchecked(f"needs the {RUNTIME}", MODEL, INFERENCE, SELF_TEST)]
    try:
        path = model or (None if settings is None else _model_that_runs(settings))
        if path is None:
            return [runtime, *_unchecked("no model was given", MODEL, INFERENCE, SELF_TEST)]
        described, guard = _guard(path, digests)
    except EdgeGuardError as error:
        return [runtime, _failed(MODEL, error), *_unchecked(f"needs the {MODEL}", INFERENCE, SELF_TEST)]
    task = Task(model=str(path), runtime=chosen)
    if settings is not None:
        # The agent keeps sidecars beside the slots, named after their digests.
        kept = _slots_folder(settings) / f"{described.sidecar_digest}.tflite"
        task = Task(model=str(path), beside=str(kept), runtime=chosen, threads=settings.runtime.threads)
    return [runtime, guard, *run_child(child, task, [INFERENCE, SELF_TEST])]


def _slots_folder(settings: AgentConfig) -> Path:
    return settings.state_dir / FOLDER


def _model_that_runs(settings: AgentConfig) -> Path:
    """The model that an agent of this configuration runs.

    Raises:
        ConfigError: this user may not look for it.
        TrustError: it is damaged.
    """
    folder = _slots_folder(settings)
    try:
        return Slots(folder).active().path if (folder / RECORD).exists() else settings.model
    except OSError as error:
        do = "run this command as the agent's user or as root"
        raise ConfigError(f"model slots {folder}", got=error.strerror, do=do) from error


def _guard(path: Path, digests: Callable[[bytes, GuardMetadata], str]) -> tuple[GuardMetadata, Check]:
    """The metadata of a guarded file, and what is to be said of it.

    Raises:
        EdgeGuardError: there is no such file, it is damaged, or it has no guard.
    """
    from edgeguard.detection import metadata

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"model {path}", got=error.strerror, expected="a guarded .tflite file") from error
    described = metadata.read(content)
    verdict = digests(content, described)
    found = f"{path}: model {described.model_digest[:12]}, guard {described.guard_digest[:12]}"
    check = Check(name=MODEL, status="ok", found=f"{found}, digests fit")
    if verdict == "do not fit":
        do = "fetch or convert it again: model or guard were changed"
        check = Check(name=MODEL, status="failed", found=f"{found}, digests do not fit the content", do=do)
    elif verdict != "fit":
        check = Check(name=MODEL, status="not checked", found=f"{found}, digests not compared with the content")
    elif described.calibration.synthetic:
        do = "calibrate it on clean inputs: edgeguard calibrate"
        check = Check(name=MODEL, status="warning", found=f"{found}, calibrated on made-up inputs", do=do)
    return described, check


def _broker(broker: BrokerConfig) -> Check:
    try:
        brokers.check(broker)
    except EdgeGuardError as error:
        return _failed("broker", error)
    found = f"{broker.host}:{broker.port} answers, {'with' if broker.ca else 'without'} TLS"
    if broker.ca is None and not _is_local(broker.host):
        do = "set broker.ca: others in the network can read and change what is sent"
        return Check(name="broker", status="warning", found=found, do=do)
    return Check(name="broker", status="ok", found=found)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _certificates(broker: BrokerConfig, now_s: float) -> Check:
    if broker.ca is None:
        return Check(name="certificates", status="not checked", found="the configuration has no broker.ca")
    try:
        context = brokers.tls(broker, broker.ca)
    except EdgeGuardError as error:
        return _failed("certificates", error)
    # A bundle holds many authorities, one of which is the broker's: not before the last has ended is all lost.
    own = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs()]
    ends = [("the authority's certificate", float(max(own)))] if own else []
    try:
        with (
            socket.create_connection((broker.host, broker.port), timeout=brokers.CONNECT_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=broker.host) as secured,
        ):
            shown = secured.getpeercert() or {}
    except (OSError, ValueError):
        shown = {}  # why it failed stands in the check of the broker
    if "notAfter" in shown:
        ends.append(("the broker's certificate", float(ssl.cert_time_to_seconds(str(shown["notAfter"])))))
    return certificates(ends, now_s)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")


def _unchecked(why: str, *names: str) -> list[Check]:
    return [Check(name=name, status="not checked", found=why) for name in names]


def _failed(name: str, error: EdgeGuardError) -> Check:
    found = str(EdgeGuardError(error.what, got=error.got, expected=error.expected))
    return Check(name=name, status="failed", found=found, do=error.do or "")


def try_runtime(task: Task) -> Iterator[Check]:
    """Child: load NumPy and the runtime, and run the network above."""
    try:
        import numpy as np

        from edgeguard.detection import runtime
        from edgeguard.detection.guarded import TfliteModel

        name = runtime.choose(task.runtime)
        small = TfliteModel(_NETWORK, threads=task.threads, runtime=name)
        x = np.arange(8, dtype=np.float32)
        right = [-2.0, -3.0, 5.0, -2.0]
        outputs = small.invoke(small.quantise(x))[0][0].tolist()
    except EdgeGuardError as error:
        yield _failed(RUNTIME, error)
        return
    others = [other for other in runtime.available() if other != name]
    found = f"{name} {small.runtime.version}, NumPy {np.__version__}" + "".join(f", also {one}" for one in others)
    if outputs != right:
        found += f": a small network gave {outputs} instead of {right}"
        yield Check(name=RUNTIME, status="failed", found=found, do="install another version of the TFLite runtime")
    elif name == "tensorflow":
        do = "install a runtime for devices: pip install 'edgeguard[device]'"
        yield Check(name=RUNTIME, status="failed", found=found, do=do)
    else:
        yield Check(name=RUNTIME, status="ok", found=found)


def try_model(task: Task, path: Path) -> Iterator[Check]:
    """Child: run the model once, then on the inputs in its sidecar."""
    import numpy as np

    from edgeguard.detection import sidecar as sidecars
    from edgeguard.detection.guarded import GuardedModel

    try:
        model = GuardedModel.load(path.read_bytes(), threads=task.threads, runtime=task.runtime)
        started = time.perf_counter()
        verdict = model.infer(np.zeros(model.metadata.input.shape, model.metadata.input.dtype)).verdict
    except EdgeGuardError as error:
        yield _failed(INFERENCE, error)
        yield from _unchecked(f"needs the {INFERENCE}", SELF_TEST)
        return
    found = f"one input in {(time.perf_counter() - started) * 1e3:.1f} ms, the first time"
    if verdict.status == "not checked":
        do = "convert or calibrate the model again"
        yield Check(name=INFERENCE, status="warning", found=f"{found}; not scored: {verdict.reason}", do=do)
    else:
        yield Check(name=INFERENCE, status="ok", found=f"{found}; the guard scored it")
    try:
        sidecar = sidecars.read_beside(path, model.metadata)
        if sidecar is None and task.beside is not None:
            sidecar = sidecars.read_beside(Path(task.beside), model.metadata)
    except EdgeGuardError as error:
        yield _failed(SELF_TEST, error)
        return
    if sidecar is None:
        missing = "its sidecar is not on this device" if model.metadata.sidecar_digest else "the model has no sidecar"
        yield Check(name=SELF_TEST, status="not checked", found=missing)
        return
    tested = sidecars.self_test(sidecar, model.infer)
    if tested.passed:
        yield Check(name=SELF_TEST, status="ok", found=f"{tested.checked} known inputs gave what they should")
    else:
        found = f"of {tested.checked} known inputs, {tested.wrong[0]}"
        do = "fetch the model again, or force another runtime with EDGEGUARD_RUNTIME"
        yield Check(name=SELF_TEST, status="failed", found=found, do=do)


def main(argument: str) -> None:
    """The child: do a :class:`Task`, given as JSON, and print a :class:`Check` a line as soon as it is known."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    results = os.dup(1)
    os.dup2(2, 1)  # runtimes print what they like
    task = msgspec.json.decode(argument, type=Task)
    for check in try_runtime(task) if task.model is None else try_model(task, Path(task.model)):
        os.write(results, msgspec.json.encode(check) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])

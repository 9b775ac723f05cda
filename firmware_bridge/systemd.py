"""What systemd and a daemon on a board say to each other: notifications, the watchdog, the unit file.

Rules enforced here:

* a notification never blocks and never raises: a service manager that does not listen does not stop inference;
* the watchdog is fed by a completed inference and by nothing else. There is no timer, so that a loop that no
  longer works cannot look alive; a loop that has no inputs runs a self-test through the same path;
* a setting never breaks out of its line in the unit file: what systemd would interpret in a path is escaped, what
  cannot be escaped is refused, and so is a path that the sandbox would hide from the service.

The protocol is that of sd_notify(3) and sd_watchdog_enabled(3). The unit follows systemd.service(5), systemd.exec(5)
and systemd.syntax(7), and is written for systemd 249 and later.

Example:
    >>> watchdog = Watchdog(period_s=30)
    >>> watchdog.self_test_due(now=100.0)  # nothing has been inferred yet
    True
    >>> watchdog.completed(now=100.0), watchdog.completed(now=101.0)  # feed it; not again so soon
    (True, False)
    >>> watchdog.wait_s(now=105.0)  # how long the loop may still wait for an input
    6.0
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeguard.errors import ConfigError

GROUP = "edgeguard"
"""Members may connect to the agent's socket."""
CREDENTIAL = "broker-password"
"""Name, in the folder that ``CREDENTIALS_DIRECTORY`` names, of the file with the broker's password."""
KEY_CREDENTIAL = "broker-key"
"""The same of the private key of the device's certificate."""

_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""By ProtectHome and PrivateTmp."""
_FEED = 1 / 4
_IDLE = 1 / 3
"""Parts of WatchdogSec: the least between two feeds, and the most between an inference and the next."""


class Notifier:
    """Tells the service manager how the daemon fares; does nothing where there is no manager.

    Each method returns whether the message was handed over.

    Args:
        environment: ``NOTIFY_SOCKET`` in it is a path, or ``@`` and an abstract name.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = os.fsencode(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address.startswith(("/", "@")) else None
        if self._socket:
            self._socket.setblocking(False)

    def ready(self) -> bool:
        """The daemon works: systemd counts it as started, and the watchdog as running."""
        return self._send("READY=1")

    def stopping(self) -> bool:
        """The daemon is about to stop as it was told."""
        return self._send("STOPPING=1")

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``."""
        # A line break in the text would start another assignment.
        return self._send(f"STATUS={' '.join(text.split())}")

    def watchdog(self) -> bool:
        """The daemon is alive; to be sent when :meth:`Watchdog.completed` says so."""
        return self._send("WATCHDOG=1")

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket:
            self._socket.close()

    def _send(self, message: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto(message.encode(errors="replace"), self._address)
        except (OSError, ValueError):  # nobody listens, the queue is full, or the address is none
            return False
        return True


class Watchdog:
    """When to feed systemd's watchdog, and when an idle loop owes it a self-test. Times are a monotonic clock's.

    A loop whose every inference takes less than 5/12 of ``period_s`` is never late: a feed is left out for a quarter
    of it at most, and the self-test is due a third of it after the last completed inference. A self-test that fails
    stays due, and the watchdog unfed: systemd restarts a daemon that can no longer infer.

    Args:
        period_s: WatchdogSec, in seconds.
    """

    def __init__(self, *, period_s: float) -> None:
        self.period_s = period_s
        self._completed_at = self._fed_at = -math.inf

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], pid: int) -> Watchdog | None:
        """The watchdog that systemd set for process ``pid``; None where it set none, or set it for another."""
        if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
            return None
        microseconds = environment.get("WATCHDOG_USEC", "")
        if not re.fullmatch("0*[1-9][0-9]{0,18}", microseconds, re.ASCII):
            return None
        return cls(period_s=int(microseconds) / 1e6)

    def completed(self, now: float) -> bool:
        """An inference was completed, the self-test's included. True when WATCHDOG=1 shall be sent."""
        self._completed_at = now
        if now - self._fed_at < self.period_s * _FEED:
            return False
        self._fed_at = now
        return True

    def self_test_due(self, now: float) -> bool:
        """Whether the loop shall now run one self-test inference and call :meth:`completed` when it succeeded."""
        return self.wait_s(now) <= 0

    def wait_s(self, now: float) -> float:
        """How many seconds the loop may wait for an input before a self-test is due; 0 when it is."""
        return max(0.0, self._completed_at + self.period_s * _IDLE - now)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What differs between the units of two boards.

    Attributes:
        python: the interpreter of the virtual environment that EdgeGuard is installed in.
        config: the agent's TOML file.
        memory_max_mib: with all children, beyond this the kernel kills the service, and systemd restarts it.
        cpu_quota_percent: of one core.
        watchdog_s: WatchdogSec, in seconds.
        state_directory: name of the folder in /var/lib that belongs to the service alone.
        runtime_directory: name of the folder in /run that the agent's socket lies in.
        camera: the service may open video devices.
        serial: the service may open serial ports.
        network: the service may talk to other machines; else only to this one, where the broker then runs.
        password_file: the broker's password, readable to root alone; the service gets a copy, see ``CREDENTIAL``.
        key_file: the same of the private key of the device's certificate, see ``KEY_CREDENTIAL``.
        writable: folders outside the state folder that the service may write to; one that is missing is no error.
    """

    python: Path
    config: Path
    memory_max_mib: int = 512
    cpu_quota_percent: int = 200
    watchdog_s: int = 30
    state_directory: str = "edgeguard"
    runtime_directory: str = "edgeguard"
    camera: bool = False
    serial: bool = False
    network: bool = True
    password_file: Path | None = None
    key_file: Path | None = None
    writable: tuple[Path, ...] = ()


def unit(settings: Settings) -> str:
    """The text of ``edgeguard.service``.

    Raises:
        ConfigError: a path that is not absolute, cannot be escaped, or lies where the sandbox hides it; a folder
            name that is none; a number that is not positive.
    """
    for name in ("memory_max_mib", "cpu_quota_percent", "watchdog_s"):
        number = getattr(settings, name)
        if number < 1:
            raise ConfigError(f"unit: {name}", got=number, expected="1 or more")
    for name in (settings.state_directory, settings.runtime_directory):
        if not re.fullmatch("[a-z0-9][a-z0-9_-]*", name):
            raise ConfigError("unit: name of a folder", got=repr(name), expected="lower-case letters, digits, - and _")
    for path in (settings.python, settings.config, *settings.writable):
        if hidden_by(path):
            raise ConfigError(
                f"unit: path {path}",
                got=f"a place in {hidden_by(path)}, which is hidden from the service",
                do="put it elsewhere, such as /etc/edgeguard, /opt or /srv",
            )
    # The colon keeps systemd from looking for environment variables in the command.
    command = [":" + _path(settings.python), "-m", "edgeguard.agent", "--config", _path(settings.config)]
    return _UNIT.format(
        command=" ".join(map(_word, command)),
        watchdog_s=settings.watchdog_s,
        group=GROUP,
        state_directory=settings.state_directory,
        runtime_directory=settings.runtime_directory,
        memory_max_mib=settings.memory_max_mib,
        cpu_quota_percent=settings.cpu_quota_percent,
        credential=_credential(CREDENTIAL, settings.password_file) + _credential(KEY_CREDENTIAL, settings.key_file),
        writable="".join(f"ReadWritePaths={_word(f'-{_path(path)}')}\n" for path in settings.writable),
        devices=_devices(settings),
        network="" if settings.network else _NO_NETWORK,
    )


def _devices(settings: Settings) -> str:
    allowed = _CAMERA * settings.camera + _SERIAL * settings.serial
    return _SOME_DEVICES + allowed if allowed else _NO_DEVICES


def _credential(name: str, path: Path | None) -> str:
    if path is None:
        return ""
    # Here systemd takes the rest of the line as it is: specifiers are expanded, but there are no quotes.
    return f"LoadCredential={name}:{_path(path).replace('%', '%%')}\n"


_REFUSED = re.compile("[\\\\\"']| $")
"""systemd takes no program whose path holds a quote or a backslash, and cuts off a space at the end of a line."""


def _path(path: Path) -> str:
    """A path's text, once it is known that a unit can name it."""
    text = str(path)
    if not path.is_absolute() or ".." in path.parts or not text.isprintable() or _REFUSED.search(text):
        raise ConfigError(
            "unit: path",
            got=repr(text),
            expected="an absolute path without '..', line breaks, quotes, backslashes and a space at its end",
            do="choose another place",
        )
    return text


def hidden_by(path: Path) -> str | None:
    """The folder around ``path`` that the unit's sandbox hides from the service; None where there is none."""
    return next((folder for folder in _HIDDEN if path.is_relative_to(folder)), None)


def _word(text: str) -> str:
    """One word of a value: specifiers doubled, spaces quoted, see systemd.syntax(7)."""
    text = text.replace("%", "%%")
    return f'"{text}"' if " " in text else text


_UNIT = """\
# Written by `edgeguard service install`, which replaces it. Own settings: systemctl edit edgeguard

[Unit]
Description=EdgeGuard agent
# The agent guards without a network and keeps its reports until there is one, so it does not wait for it.
After=network.target
# Never give up.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
# The inference loop feeds the watchdog after completed inputs, by self-tests when there are none.
WatchdogSec={watchdog_s}
Restart=always
RestartSec=5
# systemd 254 and later wait longer after each failure; older ones say that they ignore these two.
RestartSteps=6
RestartMaxDelaySec=300

# A user that exists while the service runs. It is not named like the group: systemd refuses a dynamic user where
# only a group of its name exists.
DynamicUser=yes
User=edgeguard-agent
SupplementaryGroups={group}
StateDirectory={state_directory}
StateDirectoryMode=0700
RuntimeDirectory={runtime_directory}
{credential}{writable}
MemoryMax={memory_max_mib}M
CPUQuota={cpu_quota_percent}%
TasksMax=128
# A memory image of a killed agent would hold inputs.
LimitCORE=0

UMask=0077
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
# Other processes are hidden. ProcSubset=pid would hide /proc/meminfo too, which the agent reports.
ProtectProc=invisible
LockPersonality=yes
# LiteRT and tflite-runtime run their models, float and int8, under this: neither writes code at run time.
MemoryDenyWriteExecute=yes
RemoveIPC=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
KeyringMode=private
SystemCallArchitectures=native
# A refused call fails, it does not kill: libraries try some and do without.
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
# The agent gives its socket to the group. PrivateUsers is left out for the same reason: it hides the group.
SystemCallFilter=@chown
# Its re-calibrating child makes way for the inference, and if memory runs out it is the child that goes.
SystemCallFilter=setpriority
OOMPolicy=continue
{devices}{network}
[Install]
WantedBy=multi-user.target
"""

_NO_DEVICES = """\
PrivateDevices=yes
DevicePolicy=closed
"""
_SOME_DEVICES = """\
PrivateDevices=no
DevicePolicy=closed
"""
_CAMERA = """\
DeviceAllow=char-video4linux rw
DeviceAllow=char-media rw
DeviceAllow=char-dma_heap rw
SupplementaryGroups=video
"""
_SERIAL = """\
DeviceAllow=char-ttyUSB rw
DeviceAllow=char-ttyACM rw
DeviceAllow=char-ttyAMA rw
DeviceAllow=char-ttyTHS rw
DeviceAllow=char-ttyS rw
SupplementaryGroups=dialout
"""
_NO_NETWORK = """\
IPAddressDeny=any
IPAddressAllow=localhost
"""

"""``edgeguard service``: the agent as a systemd service, in a virtual environment of its own.

Rules enforced here:

* the system's Python is left alone (PEP 668): everything goes into one folder, which nothing else may be in;
* what shall be done is a list of steps, decided from what was found; ``--dry-run`` prints that list and does nothing;
* each command can be given again: what is there already is left alone, what was cut short is completed;
* only a folder that this command made is ever removed, and never configuration; state only with ``--purge``;
* the unit fits the configuration: where that lets the service use a camera, the network or folders of its own, the
  sandbox does too. So the command is to be given again when the configuration changes.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from edgeguard import __version__
from edgeguard.cli import console
from edgeguard.errors import EXIT_NOT_CHECKED, ConfigError
from firmware_bridge import systemd

if TYPE_CHECKING:
    from edgeguard.agent.config import AgentConfig

SERVICE = "edgeguard.service"
UNIT = Path("/etc/systemd/system") / SERVICE
STATE = Path("/var/lib/edgeguard")
RUNTIME = Path("/run/edgeguard")
PRIVATE_STATE = Path("/var/lib/private/edgeguard")
"""Where systemd keeps the state of a dynamic user; ``STATE`` is a link to it."""
MARKER = ".edgeguard-service"
"""In a folder that this command made: empty, then, once all is in it, JSON: ``Found.python`` and ``Found.wheel``."""
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a command; ``remedy`` is what to do when it fails."""

    does: str
    command: tuple[str, ...]
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Write:
    """Write a file whole, and the folders to it."""

    does: str
    path: Path
    content: str


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Remove a file, a link or a folder with all in it."""

    does: str
    path: Path


Step = Run | Write | Remove


@dataclass(frozen=True, kw_only=True)
class Found:
    """What there is before anything is done.

    Attributes:
        folder: the virtual environment's folder: not there or empty, made by this command, or somebody else's.
        python: version of the environment's Python, such as ``3.11``; None where it is not complete.
        version: of EdgeGuard in it; None where there is none.
        wheel: SHA-256 of the wheel that this came from; None where it came from the index.
        group: the socket's group exists.
        unit: text of the unit file; None where there is none.
        state: folders and links of the service's state.
        has_systemd: systemd runs here and is to be used.
    """

    folder: Literal["free", "ours", "foreign"]
    python: str | None
    version: str | None
    wheel: str | None
    group: bool
    unit: str | None
    state: tuple[Path, ...]
    has_systemd: bool


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What shall be there after an installation.

    Attributes:
        interpreter: the Python that the environment is made with.
        python: its version, such as ``3.11``.
        requirement: what pip installs.
        version: of EdgeGuard.
        wheel: SHA-256 of the wheel; None for a release from the index.
        unit: text of the unit file.
    """

    interpreter: Path
    python: str
    requirement: str
    version: str
    wheel: str | None
    unit: str


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Run the agent as a systemd service.", no_args_is_help=True)
    app.add_typer(group, name="service", epilog="Example: sudo edgeguard service install --dry-run")
    prefix_option = typer.Option(Path("/opt/edgeguard"), help="Folder of the virtual environment.")
    root_option = typer.Option(Path("/"), help="Work in another file system, such as a mounted image.")
    dry_run_option = typer.Option(False, "--dry-run", help="Print the steps and do nothing.")
    json_option = typer.Option(False, "--json", help="Print one JSON object.")

    @group.command(epilog="Example: sudo edgeguard service install --config /etc/edgeguard/agent.toml")
    def install(
        config: Path = typer.Option(Path("/etc/edgeguard/agent.toml"), help="The agent's TOML file."),
        prefix: Path = prefix_option,
        root: Path = root_option,
        wheel: Path | None = typer.Option(None, help="Install this file, not the running version from the index."),
        no_start: bool = typer.Option(False, "--no-start", help="Write everything, but leave systemd alone."),
        dry_run: bool = dry_run_option,
        as_json: bool = json_option,
    ) -> None:
        """Install the agent as a service and start it; update it, or fit it to a changed configuration.

        Makes a virtual environment, the group `edgeguard`, whose members may use the agent's socket, and the unit.
        """
        config, prefix, root = config.absolute(), prefix.absolute(), root.absolute()
        require_root(os.geteuid(), root, dry_run=dry_run)
        settings, extras = fit(_load(config, root), config_file=config, prefix=prefix)
        wanted = want(settings, extras, wheel=wheel, root=root)
        found = observe(prefix, root, use_systemd=not no_start)
        steps = install_steps(wanted, found, prefix=prefix, root=root)
        then = "follow it: journalctl -u edgeguard -f"
        if not found.has_systemd:
            then = "systemd was not told: run systemctl daemon-reload, then systemctl enable --now edgeguard"
        _carry_out(steps, then=then, unit=wanted.unit, dry_run=dry_run, as_json=as_json)

    @group.command(epilog="Example: edgeguard service status --json")
    def status(prefix: Path = prefix_option, root: Path = root_option, as_json: bool = json_option) -> None:
        """Show what is installed and whether it runs. Exit code 3 when it is not installed."""
        prefix, root = prefix.absolute(), root.absolute()
        found = observe(prefix, root, use_systemd=True)
        told = {
            "installed": found.version is not None and found.unit is not None,
            "version": found.version,
            "unit": str(UNIT) if found.unit is not None else None,
            "active": _ask("is-active") if found.has_systemd else None,
            "enabled": _ask("is-enabled") if found.has_systemd else None,
        }
        if as_json:
            typer.echo(json.dumps(told))
        elif found.version is None and found.unit is None:
            typer.echo("not installed")
        else:
            unknown = "not checked: systemd does not run here"
            console.facts(
                [
                    ("version", f"{found.version} in {prefix}" if found.version else f"not installed in {prefix}"),
                    ("unit", str(UNIT) if found.unit is not None else f"not installed: no {UNIT}"),
                    ("active", str(told["active"] or unknown)),
                    ("enabled", str(told["enabled"] or unknown)),
                ]
            )
        if not told["installed"]:
            raise typer.Exit(EXIT_NOT_CHECKED)

    @group.command(epilog="Example: sudo edgeguard service uninstall --dry-run")
    def uninstall(
        prefix: Path = prefix_option,
        root: Path = root_option,
        purge: bool = typer.Option(False, "--purge", help="Remove the state too: unsent reports and models."),
        dry_run: bool = dry_run_option,
        as_json: bool = json_option,
    ) -> None:
        """Stop the service and remove unit and virtual environment. Configuration and state stay."""
        prefix, root = prefix.absolute(), root.absolute()
        require_root(os.geteuid(), root, dry_run=dry_run)
        found = observe(prefix, root, use_systemd=True)
        steps = uninstall_steps(found, prefix=prefix, root=root, purge=purge)
        kept = ["configuration"]
        if found.group:
            kept.append(f"group {systemd.GROUP}")
        if found.state and not purge:
            kept.append(f"state in {STATE} (--purge removes it)")
        if found.folder == "foreign":
            kept.append(f"{prefix}, which this command did not make")
        _carry_out(steps, then=f"left as they are: {', '.join(kept)}", unit=None, dry_run=dry_run, as_json=as_json)


def require_root(user: int, root: Path, *, dry_run: bool) -> None:
    """Raise ConfigError where only root may do what shall be done."""
    if user != 0 and root == Path("/") and not dry_run:
        raise ConfigError("edgeguard service", got=f"user {user}", expected="root", do="run it with sudo")


def fit(config: AgentConfig, *, config_file: Path, prefix: Path) -> tuple[systemd.Settings, tuple[str, ...]]:
    """The unit's settings, and the extras of EdgeGuard, that a configuration needs.

    Raises:
        ConfigError: the state folder is not the one that systemd keeps for the service.
    """
    if not config.state_dir.is_relative_to(STATE):
        raise ConfigError(
            f"configuration {config_file}: state_dir",
            got=config.state_dir,
            expected=f"{STATE}, the only folder that the service may keep state in",
            do="correct this key",
        )
    sources, camera = config.sources, config.sources.camera
    places = (
        sources.folder and sources.folder.path,
        sources.socket and sources.socket.path.parent,
        config.quarantine and config.quarantine.path,
        # The name - is standard output.
        config.results and config.results.path and config.results.path.name != "-" and config.results.path.parent,
    )
    writable = tuple(path for path in places if path and not any(path.is_relative_to(own) for own in (STATE, RUNTIME)))
    device = camera.device if camera else ""
    is_local = config.broker.host in _LOCAL and config.update is None and "://" not in str(device)
    settings = systemd.Settings(
        python=prefix / "bin/python",
        config=config_file,
        camera=isinstance(device, int) or str(device).startswith("/dev/"),
        serial=bool(sources.serial),
        network=not is_local,
        password_file=config.broker.password_file,
        key_file=config.broker.key,
        writable=writable,
    )
    return settings, ("device", "update", *(["camera"] if camera else []), *(["serial"] if sources.serial else []))


def want(settings: systemd.Settings, extras: Sequence[str], *, wheel: Path | None, root: Path) -> Wanted:
    """What an installation on this machine with this Python shall bring.

    Raises:
        ConfigError: the wheel is none of EdgeGuard's; this Python, or a path in the settings, is hidden from services.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = Path(sys.base_prefix) / "bin" / f"python{python}"
    hidden = systemd.hidden_by(interpreter.resolve())
    if hidden and root == Path("/"):
        raise ConfigError(
            f"Python {interpreter.resolve()}",
            got=f"a place in {hidden}, which is hidden from the service",
            do="install EdgeGuard with the system's Python, and run this command with that",
        )
    name, version, digest = f"edgeguard[{','.join(extras)}]", __version__, None
    if wheel is not None:
        parts = wheel.name.split("-")
        if not wheel.is_file() or wheel.suffix != ".whl" or parts[0] != "edgeguard":
            raise ConfigError(f"wheel {wheel}", expected="a file edgeguard-VERSION-py3-none-any.whl", do="make wheel")
        version, digest = parts[1], hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Wanted(
        interpreter=interpreter,
        python=python,
        requirement=f"{name} @ {wheel.absolute().as_uri()}" if wheel else f"{name}=={version}",
        version=version,
        wheel=digest,
        unit=systemd.unit(settings),
    )


def observe(prefix: Path, root: Path, *, use_systemd: bool) -> Found:
    """Look at what is there; nothing is changed."""
    folder, unit = _under(root, prefix), _under(root, UNIT)
    marker = folder / MARKER
    kind: Literal["free", "ours", "foreign"] = "foreign"
    if marker.is_file():
        kind = "ours"
    elif not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        kind = "free"
    record = {}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(marker.read_bytes())
    return Found(
        folder=kind,
        python=record.get("python"),
        version=_version(folder) if kind == "ours" else None,
        wheel=record.get("wheel"),
        group=_has_group(root),
        unit=unit.read_text() if unit.is_file() else None,
        state=tuple(path for path in (_under(root, STATE), _under(root, PRIVATE_STATE)) if os.path.lexists(path)),
        has_systemd=use_systemd and root == Path("/") and Path("/run/systemd/system").is_dir(),
    )


def install_steps(wanted: Wanted, found: Found, *, prefix: Path, root: Path) -> tuple[Step, ...]:
    """What turns ``found`` into ``wanted``.

    Raises:
        ConfigError: the folder holds what this command did not make.
    """
    folder = _under(root, prefix)
    if found.folder == "foreign":
        raise ConfigError(
            f"folder {folder}",
            got="files that this command did not make",
            expected="an empty folder, or none",
            do="empty it, or choose another --prefix",
        )
    steps: list[Step] = []
    if not found.group:
        elsewhere = () if root == Path("/") else ("--prefix", str(root))
        steps.append(
            Run(
                does="make the group of the agent's socket",
                command=("groupadd", "--system", *elsewhere, systemd.GROUP),
                remedy="make the group by hand",
            )
        )
    is_usable = found.python == wanted.python
    if not is_usable:
        if found.folder == "ours":
            steps.append(Remove(does="remove the environment, which is of another Python or incomplete", path=folder))
        steps += [
            Write(does="mark the folder as this command's", path=folder / MARKER, content=""),
            Run(
                does="make a virtual environment",
                command=(str(wanted.interpreter), "-I", "-m", "venv", str(folder)),
                remedy="on Debian: apt-get install python3-venv",
            ),
        ]
    is_same = is_usable and found.version == wanted.version and wanted.wheel in (None, found.wheel)
    # pip takes another file of the version that it has for the same one.
    again = ("--force-reinstall",) if is_usable and found.version == wanted.version and not is_same else ()
    pip = (str(folder / "bin/python"), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    steps.append(
        Run(
            does="install EdgeGuard" if not is_same else "check that EdgeGuard is complete",
            command=(*pip, *again, wanted.requirement),
            remedy="check the network, or give a file with --wheel",
        )
    )
    if not is_same:
        record = json.dumps({"python": wanted.python, "wheel": wanted.wheel})
        steps.append(Write(does="mark it as complete", path=folder / MARKER, content=record))
    if found.unit != wanted.unit:
        steps.append(Write(does="write the unit", path=_under(root, UNIT), content=wanted.unit))
    if found.has_systemd:
        start = "start" if is_same and found.unit == wanted.unit else "restart"
        steps += [
            _systemctl("let systemd read its units", "daemon-reload"),
            _systemctl("start at boot", "enable", SERVICE),
            _systemctl(f"{start} the agent", start, SERVICE),
        ]
    return tuple(steps)


def uninstall_steps(found: Found, *, prefix: Path, root: Path, purge: bool) -> tuple[Step, ...]:
    """What removes the service; its state too where ``purge`` says so."""
    steps: list[Step] = []
    if found.unit is not None:
        if found.has_systemd:
            steps.append(_systemctl("stop the agent, now and at boot", "disable", "--now", SERVICE))
        steps.append(Remove(does="remove the unit", path=_under(root, UNIT)))
        if found.has_systemd:
            steps.append(_systemctl("let systemd read its units", "daemon-reload"))
    if found.folder == "ours":
        steps.append(Remove(does="remove the virtual environment", path=_under(root, prefix)))
    if purge:
        steps += [Remove(does="remove the state", path=path) for path in found.state]
    return tuple(steps)


def execute(step: Step) -> None:
    """Do one step.

    Raises:
        ConfigError: it failed; what to do.
    """
    match step:
        case Run():
            # The environment's own packages count, not those that a variable or the current folder adds.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
            environment["PATH"] = f"{environment.get('PATH', '')}:/usr/sbin:/sbin"
            try:
                # Standard output is for our own lines.
                subprocess.run(step.command, stdin=subprocess.DEVNULL, stdout=2, env=environment, check=True)
            except OSError as error:
                raise ConfigError(step.does, got=f"{step.command[0]}: {error.strerror}", do=step.remedy) from error
            except subprocess.CalledProcessError as error:
                raise ConfigError(step.does, got=f"exit code {error.returncode}", do=step.remedy) from error
        case Write():
            from converters.files import write

            step.path.parent.mkdir(parents=True, exist_ok=True)
            write(step.content.encode(), step.path)
        case Remove():
            if step.path.is_dir() and not step.path.is_symlink():
                shutil.rmtree(step.path)
            else:
                step.path.unlink(missing_ok=True)


def _systemctl(does: str, *arguments: str) -> Run:
    return Run(does=does, command=("systemctl", *arguments), remedy="read journalctl -u edgeguard")


def _carry_out(steps: Sequence[Step], *, then: str, unit: str | None, dry_run: bool, as_json: bool) -> None:
    """Print the steps, and do each after it was printed."""
    # Whatever root's own habit is, the service must be able to read what is written here.
    mask = os.umask(0o022)
    try:
        for step in steps:
            if not as_json:
                typer.echo(f"{step.does}: {_told(step)[1]}")
            if not dry_run:
                execute(step)
    finally:
        os.umask(mask)
    if as_json:
        listed = [{"does": step.does, _told(step)[0]: _told(step)[1]} for step in steps]
        typer.echo(json.dumps({"dry_run": dry_run, "steps": listed, "unit": unit, "then": then}))
        return
    if dry_run and unit is not None:
        typer.echo(f"\n{UNIT}:\n{unit}")
    typer.echo(then if steps else f"nothing to do; {then}")


def _told(step: Step) -> tuple[str, str]:
    """What kind of step it is, and on what."""
    match step:
        case Run():
            return "runs", shlex.join(step.command)
        case Write():
            return "writes", str(step.path)
        case Remove():
            return "removes", str(step.path)


def _load(config: Path, root: Path) -> AgentConfig:
    from edgeguard import settings
    from edgeguard.agent.config import parse

    loaded = parse(settings.read_toml(_under(root, config)), base=config.parent, name=f"configuration {config}")
    for key in ("password_file", "key"):
        secret = getattr(loaded.broker, key)
        if secret is not None and not _under(root, secret).is_file():
            raise ConfigError(f"broker.{key} {secret}", got="no file", do="check the path")
    return loaded


def _under(root: Path, path: Path) -> Path:
    """Where an absolute path lies in another file system."""
    return root / path.relative_to("/")


def _version(folder: Path) -> str | None:
    """Version of EdgeGuard in a virtual environment."""
    places = [str(path) for path in folder.glob("lib/python3.*/site-packages")]
    return next((found.version for found in metadata.distributions(name="edgeguard", path=places)), None)


def _has_group(root: Path) -> bool:
    if root == Path("/"):
        return any(group.gr_name == systemd.GROUP for group in grp.getgrall())
    file = _under(root, Path("/etc/group"))
    return file.is_file() and any(line.startswith(f"{systemd.GROUP}:") for line in file.read_text().splitlines())


def _ask(question: str) -> str | None:
    """What systemctl answers about the service, such as ``active``; None where it says nothing."""
    done = subprocess.run(["systemctl", question, SERVICE], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None

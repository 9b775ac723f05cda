"""``edgeguard service``: the plan for each state of a board, and the real thing in a file system of its own.

What runs for real: the plan's own commands (venv, pip, groupadd) on a small wheel without dependencies. What systemd
does with the unit is tested in tests/firmware_bridge/test_systemd.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from edgeguard import __version__
from edgeguard.agent import config as configuration
from edgeguard.cli import service
from edgeguard.cli.service import Found, Remove, Run, Wanted, Write
from edgeguard.errors import ConfigError
from firmware_bridge import systemd
from tests.simulators import needs

ROOT = Path("/")
PREFIX = Path("/opt/edgeguard")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

CONFIG = """\
fleet = "demo"
device = "camera-1"
model = "model.tflite"
state_dir = "/var/lib/edgeguard"
[broker]
host = "broker.example"
[sources.socket]
"""

# The plan

BARE = Found(
    folder="free",
    python=None,
    version=None,
    wheel=None,
    group=False,
    unit=None,
    state=(),
    has_systemd=True,
)
WANTED = Wanted(
    interpreter=Path("/usr/bin/python3.11"),
    python="3.11",
    requirement="edgeguard[device,update]==1.2.3",
    version="1.2.3",
    wheel=None,
    unit="[Unit]\n",
)
DONE = dataclasses.replace(BARE, folder="ours", python="3.11", version="1.2.3", group=True, unit="[Unit]\n")


def told(steps: tuple[service.Step, ...]) -> list[str]:
    """The steps in short, as a person would type them."""
    short = []
    for step in steps:
        match step:
            case Run():
                short.append(" ".join(word for word in step.command if not word.startswith("-")))
            case Write():
                short.append(f"write {step.path}")
            case Remove():
                short.append(f"remove {step.path}")
    return short


def plan(wanted: Wanted = WANTED, root: Path = ROOT, **found: Any) -> list[str]:
    """The installation of a complete board that differs in what is given."""
    state = dataclasses.replace(DONE, **found)
    return told(service.install_steps(wanted, state, prefix=PREFIX, root=root))


def test_a_bare_board_gets_group_environment_unit_and_a_start_in_this_order() -> None:
    assert told(service.install_steps(WANTED, BARE, prefix=PREFIX, root=ROOT)) == [
        "groupadd edgeguard",
        "write /opt/edgeguard/.edgeguard-service",
        "/usr/bin/python3.11 venv /opt/edgeguard",
        "/opt/edgeguard/bin/python pip install edgeguard[device,update]==1.2.3",
        "write /opt/edgeguard/.edgeguard-service",
        "write /etc/systemd/system/edgeguard.service",
        "systemctl daemon-reload",
        "systemctl enable edgeguard.service",
        "systemctl restart edgeguard.service",
    ]


CHECK = "/opt/edgeguard/bin/python pip install edgeguard[device,update]==1.2.3"
MARK = "write /opt/edgeguard/.edgeguard-service"
VENV = "/usr/bin/python3.11 venv /opt/edgeguard"
UNIT = "write /etc/systemd/system/edgeguard.service"
ENABLE = ["systemctl daemon-reload", "systemctl enable edgeguard.service"]
START, RESTART = "systemctl start edgeguard.service", "systemctl restart edgeguard.service"


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        ({}, [CHECK, *ENABLE, START]),
        ({"unit": "old"}, [CHECK, UNIT, *ENABLE, RESTART]),
        ({"unit": None}, [CHECK, UNIT, *ENABLE, RESTART]),
        ({"version": "1.2.2"}, [CHECK, MARK, *ENABLE, RESTART]),
        ({"version": None}, [CHECK, MARK, *ENABLE, RESTART]),
        ({"group": False}, ["groupadd edgeguard", CHECK, *ENABLE, START]),
        ({"python": None}, ["remove /opt/edgeguard", MARK, VENV, CHECK, MARK, *ENABLE, RESTART]),
        ({"python": "3.10"}, ["remove /opt/edgeguard", MARK, VENV, CHECK, MARK, *ENABLE, RESTART]),
        ({"folder": "free", "python": None, "version": None}, [MARK, VENV, CHECK, MARK, *ENABLE, RESTART]),
        ({"wheel": "ab" * 32}, [CHECK, *ENABLE, START]),  # that version, from a file: the index has no other
        ({"has_systemd": False}, [CHECK]),
    ],
)
def test_only_what_is_missing_or_other_is_done_and_a_change_restarts(found: dict[str, Any], steps: list[str]) -> None:
    assert plan(**found) == steps


@pytest.mark.parametrize(
    ("version", "wheel", "is_forced"),
    [("1.2.3", "ab" * 32, False), ("1.2.3", "cd" * 32, True), ("1.2.3", None, True), ("1.2.2", "cd" * 32, False)],
)
def test_another_wheel_of_the_version_that_is_there_is_forced_upon_pip(
    version: str, wheel: str | None, is_forced: bool
) -> None:
    wanted = dataclasses.replace(WANTED, wheel="ab" * 32)
    found = dataclasses.replace(DONE, version=version, wheel=wheel)
    (pip,) = [step for step in service.install_steps(wanted, found, prefix=PREFIX, root=ROOT) if "pip" in str(step)]
    assert isinstance(pip, Run)
    assert ("--force-reinstall" in pip.command) == is_forced


def test_a_folder_that_holds_something_else_is_not_touched() -> None:
    with pytest.raises(ConfigError, match="did not make"):
        plan(folder="foreign")


def test_in_another_root_every_path_of_the_plan_lies_there() -> None:
    steps = service.install_steps(WANTED, BARE, prefix=PREFIX, root=Path("/mnt/image"))
    paths = [step.path for step in steps if not isinstance(step, Run)]
    assert all(path.is_relative_to("/mnt/image") for path in paths)
    assert "groupadd --system --prefix /mnt/image edgeguard" in [
        " ".join(s.command) for s in steps if isinstance(s, Run)
    ]


@pytest.mark.parametrize(
    ("found", "purge", "steps"),
    [
        (
            DONE,
            False,
            [
                "systemctl disable edgeguard.service",
                "remove /etc/systemd/system/edgeguard.service",
                "systemctl daemon-reload",
                "remove /opt/edgeguard",
            ],
        ),
        (
            dataclasses.replace(DONE, has_systemd=False, state=(Path("/var/lib/edgeguard"),)),
            True,
            ["remove /etc/systemd/system/edgeguard.service", "remove /opt/edgeguard", "remove /var/lib/edgeguard"],
        ),
        (dataclasses.replace(BARE, folder="foreign", state=(Path("/var/lib/edgeguard"),)), False, []),
        (BARE, True, []),
    ],
)
def test_what_is_there_is_removed_but_nobody_elses_folder_and_no_state_unless_asked(
    found: Found, purge: bool, steps: list[str]
) -> None:
    assert told(service.uninstall_steps(found, prefix=PREFIX, root=ROOT, purge=purge)) == steps


@pytest.mark.parametrize(
    ("user", "root", "dry_run", "is_refused"),
    [
        (1000, "/", False, True),
        (0, "/", False, False),
        (1000, "/", True, False),
        (1000, "/mnt/image", False, False),
    ],
)
def test_only_root_may_change_the_running_system(user: int, root: str, dry_run: bool, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(ConfigError, match="sudo"):
            service.require_root(user, Path(root), dry_run=dry_run)
    else:
        service.require_root(user, Path(root), dry_run=dry_run)


# What a configuration asks of the unit


Fit = Callable[[str], tuple[systemd.Settings, tuple[str, ...]]]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """The unit's settings and the extras for a configuration."""

    def call(text: str) -> tuple[systemd.Settings, tuple[str, ...]]:
        file = tmp_path / "agent.toml"
        file.write_text(text)
        return service.fit(configuration.load(file), config_file=file, prefix=PREFIX)

    return call


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", {"camera": False, "network": True, "password_file": None, "writable": ()}),
        ("[sources.camera]\ndevice = 0", {"camera": True}),
        ('[sources.camera]\ndevice = "/dev/video2"', {"camera": True}),
        ('[sources.camera]\ndevice = "rtsp://camera.example/1"', {"camera": False, "network": True}),
        ('[sources.folder]\npath = "/srv/in"', {"writable": (Path("/srv/in"),)}),
        ('[sources.folder]\npath = "/var/lib/edgeguard/in"', {"writable": ()}),
        ('[quarantine]\npath = "/srv/kept"', {"writable": (Path("/srv/kept"),)}),
        ('[results]\npath = "/srv/out/results.jsonl"', {"writable": (Path("/srv/out"),)}),
        ('[results]\npath = "-"', {"writable": ()}),
    ],
)
def test_the_sandbox_lets_through_what_the_configuration_needs(
    fit: Fit, more: str, expected: dict[str, object]
) -> None:
    settings, _ = fit(f"{CONFIG}\n{more}\n")
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "network"),
    [
        (("broker.example", "localhost"), False),
        (("broker.example", "127.0.0.1"), False),
        (("[sources.socket]", '[sources.socket]\n[sources.camera]\ndevice = "rtsp://127.0.0.1/"'), True),
        (
            (
                "[sources.socket]",
                '[sources.socket]\n[update]\nmetadata_url = "http://h/"\ntargets_url = "http://h/"\nroot = "r"',
            ),
            True,
        ),
    ],
)
def test_a_service_whose_peers_are_all_on_the_board_gets_no_network(
    fit: Fit, change: tuple[str, str], network: bool
) -> None:
    text = CONFIG.replace(*change).replace("broker.example", "localhost")
    assert fit(text)[0].network == network


def test_the_brokers_password_is_handed_over_by_systemd(fit: Fit) -> None:
    settings, _ = fit(CONFIG.replace("[sources", 'username = "u"\npassword_file = "/etc/secret"\n[sources'))
    assert settings.password_file == Path("/etc/secret")


def test_the_key_of_the_devices_certificate_is_handed_over_by_systemd(fit: Fit) -> None:
    settings, _ = fit(CONFIG.replace("[sources", 'ca = "/a"\ncertificate = "/c"\nkey = "/etc/own.key"\n[sources'))
    assert settings.key_file == Path("/etc/own.key")


def test_a_camera_brings_its_extra(fit: Fit) -> None:
    assert fit(CONFIG)[1] == ("device", "update")
    assert fit(f"{CONFIG}[sources.camera]\n")[1] == ("device", "update", "camera")


def test_a_state_folder_that_the_service_cannot_write_is_refused(fit: Fit) -> None:
    with pytest.raises(ConfigError, match=r"state_dir.*/srv/state.*/var/lib/edgeguard"):
        fit(CONFIG.replace("/var/lib/edgeguard", "/srv/state"))


# The real thing

Call = Callable[..., Result]


def wheel(folder: Path, version: str, says: str) -> Path:
    """A wheel of a package with EdgeGuard's name and extras, whose agent prints what it was given."""
    folder.mkdir()
    path, info = folder / f"edgeguard-{version}-py3-none-any.whl", f"edgeguard-{version}.dist-info"
    extras = "".join(f"Provides-Extra: {extra}\n" for extra in ("device", "update", "camera"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("edgeguard/__init__.py", "")
        archive.writestr("edgeguard/agent/__init__.py", "")
        archive.writestr("edgeguard/agent/__main__.py", f"import sys\nprint({says!r}, *sys.argv[1:])\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: edgeguard\nVersion: {version}\n{extras}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@dataclasses.dataclass(frozen=True)
class Board:
    """A file system of its own, and the command that works in it."""

    root: Path

    def __call__(self, *arguments: object) -> Result:
        app = typer.Typer()
        service.register(app)
        return CliRunner().invoke(app, ["service", *map(str, arguments), "--root", str(self.root)])

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def agent(self) -> str:
        """Run the agent as the unit does."""
        command = [str(self.path("/opt/edgeguard/bin/python")), "-m", "edgeguard.agent", "--config", "/etc/x.toml"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd="/").stdout

    def files(self) -> dict[str, int]:
        """All files, and when each was last written."""
        return {str(path): path.lstat().st_mtime_ns for path in self.root.rglob("*")}


def bare(root: Path) -> Board:
    (root / "etc/edgeguard").mkdir(parents=True)
    (root / "etc/edgeguard/agent.toml").write_text(CONFIG)
    return Board(root)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A board with a configuration and nothing else."""
    return bare(tmp_path / "root")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of one version."""
    folder = tmp_path_factory.mktemp("wheels")
    return wheel(folder / "a wheel", "9.9.9", "first"), wheel(folder / "other", "9.9.9", "second")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheels: tuple[Path, Path]) -> Iterator[Board]:
    """A board on which the first wheel was installed, under the umask of a careful root."""
    needs.program("groupadd", "passwd")
    board = bare(tmp_path_factory.mktemp("board") / "root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        mask = os.umask(0o077)
        result = board("install", "--wheel", wheels[0])
        os.umask(mask)
        assert result.exit_code == 0, result.exception
        yield board


def test_an_installation_brings_an_agent_that_starts_as_the_unit_says(installed: Board) -> None:
    unit = installed.path("/etc/systemd/system/edgeguard.service").read_text()
    assert "ExecStart=:/opt/edgeguard/bin/python -m edgeguard.agent --config /etc/edgeguard/agent.toml" in unit
    assert installed.agent() == "first --config /etc/x.toml\n"
    assert "edgeguard:" in installed.path("/etc/group").read_text()


def test_the_services_user_can_read_all_of_it_whatever_roots_umask_is(installed: Board) -> None:
    for path in installed.root.rglob("*"):
        if path.name not in ("group", "gshadow") and "etc/edgeguard" not in str(path) and not path.is_symlink():
            assert path.stat().st_mode & stat.S_IROTH, path


def test_a_second_installation_leaves_everything_alone(installed: Board, wheels: tuple[Path, Path]) -> None:
    before = installed.files()
    result = installed("install", "--wheel", wheels[0])
    assert result.exit_code == 0
    assert "write" not in result.output
    # Python may have compiled modules of pip's in between.
    changed = {path for path, time in installed.files().items() if before.get(path) != time}
    assert {path for path in changed if "__pycache__" not in path} == set()


def test_status_tells_the_version_and_that_systemd_was_not_asked(installed: Board) -> None:
    result = installed("status")
    assert (result.exit_code, "9.9.9" in result.output, "not checked" in result.output) == (0, True, True)
    assert json.loads(installed("status", "--json").output) == {
        "installed": True,
        "version": "9.9.9",
        "unit": "/etc/systemd/system/edgeguard.service",
        "active": None,
        "enabled": None,
    }


def test_another_file_of_the_same_version_is_taken(installed: Board, wheels: tuple[Path, Path]) -> None:
    assert installed("install", "--wheel", wheels[1]).exit_code == 0
    assert installed.agent() == "second --config /etc/x.toml\n"


def test_uninstalling_leaves_configuration_and_state_and_says_so(board: Board) -> None:
    environment, unit, state = (
        board.path(name)
        for name in ("/opt/edgeguard", "/etc/systemd/system/edgeguard.service", "/var/lib/private/edgeguard")
    )
    for folder in (environment / "bin", unit.parent, state):
        folder.mkdir(parents=True)
    for file in (environment / service.MARKER, unit, state / "spool.sqlite"):
        file.touch()
    board.path("/var/lib/edgeguard").symlink_to("private/edgeguard")

    result = board("uninstall")

    assert result.exit_code == 0
    assert "left as they are: configuration, state in /var/lib/edgeguard" in result.output
    assert not environment.exists()
    assert not unit.exists()
    assert board.path("/etc/edgeguard/agent.toml").exists()
    assert (state / "spool.sqlite").exists()

    assert board("uninstall", "--purge").exit_code == 0
    assert not state.exists()
    assert not os.path.lexists(board.path("/var/lib/edgeguard"))
    assert "nothing to do" in board("uninstall", "--purge").output


def test_a_board_without_it_says_so_with_exit_code_3(board: Board) -> None:
    result = board("status")
    assert (result.exit_code, result.output) == (3, "not installed\n")
    result = board("status", "--json")
    assert (result.exit_code, json.loads(result.output)["installed"]) == (3, False)


def test_a_dry_run_prints_steps_and_unit_and_changes_nothing(board: Board) -> None:
    before = board.files()
    result = board("install", "--dry-run")
    assert result.exit_code == 0
    assert f"'edgeguard[device,update]=={__version__}'" in result.output
    assert "MemoryDenyWriteExecute=yes" in result.output
    assert "systemctl enable --now edgeguard" in result.output
    assert board.files() == before


def test_json_is_one_object_with_all_steps(board: Board) -> None:
    result = json.loads(board("install", "--dry-run", "--json").output)
    assert result["dry_run"]
    assert [next(kind for kind in step if kind != "does") for step in result["steps"]] == [
        "runs",
        "writes",
        "runs",
        "runs",
        "writes",
        "writes",
    ]
    assert "[Service]" in result["unit"]


@pytest.mark.parametrize(
    ("content", "python"),
    [("", None), ('{"python": "3.9", "wheel": null}', "3.9"), ("{torn", None)],
)
def test_an_environment_that_was_cut_short_is_known_by_its_marker(
    board: Board, content: str, python: str | None
) -> None:
    board.path(str(PREFIX)).mkdir(parents=True)
    (board.path(str(PREFIX)) / service.MARKER).write_text(content)
    found = service.observe(PREFIX, board.root, use_systemd=True)
    assert (found.folder, found.python) == ("ours", python)


@pytest.mark.parametrize("kind", ["file in it", "is a file", "dangling link"])
def test_what_this_command_did_not_make_is_foreign(board: Board, kind: str) -> None:
    folder = board.path(str(PREFIX))
    folder.parent.mkdir()
    if kind == "file in it":
        folder.mkdir()
        (folder / "pyvenv.cfg").touch()
    elif kind == "is a file":
        folder.touch()
    else:
        folder.symlink_to("nowhere")
    result = board("install")
    assert isinstance(result.exception, ConfigError)
    assert "did not make" in str(result.exception)
    assert "which this command did not make" in board("uninstall").output
    assert os.path.lexists(folder)


@pytest.mark.parametrize("name", ["nowhere.whl", "other-1.0-py3-none-any.whl", "edgeguard-1.0.tar.gz"])
def test_a_file_that_is_no_wheel_of_ours_is_refused_before_anything_is_done(board: Board, name: str) -> None:
    path = board.root.parent / name
    if name != "nowhere.whl":
        path.touch()
    result = board("install", "--wheel", path)
    assert isinstance(result.exception, ConfigError)
    assert f"wheel {path}" in str(result.exception)
    assert not board.path("/opt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fleet", "flet"), "flet"),
        (("/var/lib/edgeguard", "/srv"), "state_dir"),
        (
            ("[sources", 'username = "u"\npassword_file = "secret"\n[sources'),
            "broker.password_file /etc/edgeguard/secret",
        ),
        (("[sources", 'ca = "/a"\ncertificate = "/c"\nkey = "own.key"\n[sources'), "broker.key /etc/edgeguard/own.key"),
        (("[sources.socket]", '[sources.folder]\npath = "/home/pi/inbox"'), "/home/pi/inbox"),
    ],
)
def test_a_configuration_that_the_service_could_not_run_is_refused_before_anything_is_done(
    board: Board, change: tuple[str, str], message: str
) -> None:
    file = board.path("/etc/edgeguard/agent.toml")
    file.write_text(CONFIG.replace(*change))
    result = board("install")
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert not board.path("/opt").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("false",), "install it; got exit code 1; ask around"),
        (("/nowhere/program",), "install it; got /nowhere/program: No such file or directory; ask around"),
    ],
)
def test_a_step_that_fails_says_what_to_do(command: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        service.execute(Run(does="install it", command=command, remedy="ask around"))


def test_what_cannot_be_done_stops_the_rest(board: Board) -> None:
    board.path("/etc/group").write_text("edgeguard:x:999:\n")
    board.path("/opt").touch()  # in the environment's way
    result = board("install")
    assert isinstance(result.exception, OSError)
    assert not board.path("/etc/systemd").exists()

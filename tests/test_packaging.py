"""The wheel holds what an installation needs and nothing else, and the project's own files say where it came from."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of what git tracks."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("edgeguard", "converters", "firmware_bridge"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", out, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_data_file_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(ROOT))
        for top in ("edgeguard", "converters", "firmware_bridge")
        for path in (ROOT / top).rglob("*")
        if path.suffix in {".py", ".jinja", ".typed", ".c", ".h"}
    }
    assert modules <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "edgeguard",
        "converters",
        "firmware_bridge",
    }


def test_the_installed_wheel_runs_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel], check=True
    )
    program = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import edgeguard, converters.pipeline, firmware_bridge.slots, edgeguard.demo.report\n"
        "print(edgeguard.__file__, converters.pipeline.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert all(path.startswith(str(target)) for path in done.stdout.split())


def test_every_extra_that_is_promised_exists() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {"device", "tflite-runtime", "update", "convert", "hub", "dev"} <= set(config["options.extras_require"])


def test_the_readme_names_every_command() -> None:
    from edgeguard import cli

    readme = (ROOT / "README.md").read_text()
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert f"`edgeguard {command.callback.__name__}" in readme


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_the_readmes_figures_are_those_that_the_demo_wrote(name: str) -> None:
    m = json.loads((ROOT / "benchmarks" / "results" / f"demo_{name}.json").read_text())
    row = (
        f"| {name} | {m['clean_accuracy_before']:.1%} -> {m['clean_accuracy_after']:.1%} "
        f"| {m['asr_before']:.1%} -> {m['asr_after']:.1%} | {m['auroc']:.4f} "
        f"| {m['tpr']:.1%} at {m['fpr']:.1%} | {m['latency_bare_us']:.1f} -> {m['latency_guarded_us']:.1f} us "
        f"| {m['n_clean']:,} clean, {m['n_triggered']:,} triggered | {m['wall_s']:.0f} s |"
    )
    assert row in (ROOT / "README.md").read_text(), row


def test_the_changelog_knows_the_version() -> None:
    from edgeguard import __version__

    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

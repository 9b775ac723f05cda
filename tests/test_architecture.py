"""Who may import whom, as docs/architecture.md tells it: read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("edgeguard", "converters", "firmware_bridge")
EVERYONE = {"edgeguard", "edgeguard.errors", "edgeguard.disk"}

ALLOWED: dict[str, set[str]] = {
    "edgeguard.errors": set(),
    "edgeguard.disk": set(),
    "edgeguard.contract": set(),
    "firmware_bridge": set(),
    "edgeguard.data": set(),
    "edgeguard.detection": {"edgeguard.contract"},
    "edgeguard.attacks": {"edgeguard.data", "converters"},
    "edgeguard.inspection": {"edgeguard.contract"},
    "edgeguard.release": {"edgeguard.contract"},
    "edgeguard.private": {"edgeguard.contract", "edgeguard.settings", "edgeguard.broker", "edgeguard.inspection"},
    "edgeguard.settings": set(),
    "edgeguard.broker": {"edgeguard.settings"},
    "converters": {"edgeguard.contract", "edgeguard.detection"},
    "edgeguard.agent": {
        "edgeguard.contract",
        "edgeguard.detection",
        "edgeguard.settings",
        "edgeguard.broker",
        "firmware_bridge",
        "edgeguard.release.client",
    },
    "edgeguard.repair": {
        "edgeguard.contract",
        "edgeguard.detection",
        "edgeguard.data",
        "edgeguard.inspection",
        "converters",
    },
    "edgeguard.hub": {
        "edgeguard.contract",
        "edgeguard.detection",
        "edgeguard.settings",
        "edgeguard.broker",
        "edgeguard.inspection",
        "edgeguard.repair",
        "edgeguard.release",
    },
    "edgeguard.demo": {
        "edgeguard.agent",
        "edgeguard.attacks",
        "edgeguard.contract",
        "edgeguard.data",
        "edgeguard.detection",
        "edgeguard.hub",
        "edgeguard.release",
        "converters",
    },
    "edgeguard.cli": set(TOP),
}


def modules() -> dict[str, Path]:
    found = {}
    for top in TOP:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: set[str], *, lazy: bool = True) -> set[str]:
    """Modules of ours that a file imports; without ``lazy`` only at module level, outside TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in full]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in TOP}
    return found


def package_of(module: str) -> str:
    """The entry of ALLOWED that a module falls under."""
    return max((p for p in ALLOWED if module == p or module.startswith(p + ".")), key=len, default=module)


def within(module: str, packages: set[str]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    found = modules()
    if module == "edgeguard":
        assert not imports_of(found[module], set(found), lazy=False)
        assert imports_of(found[module], set(found)) == {"edgeguard.detection.interpreter"}
        return
    package = package_of(module)
    assert package in ALLOWED, f"{module} belongs to no package that docs/architecture.md names"
    for name in imports_of(found[module], set(found)):
        assert name in EVERYONE or within(name, {package} | ALLOWED[package]), f"{module} imports {name}"


def test_there_are_no_import_circles() -> None:
    found = modules()
    graph = {name: imports_of(path, set(found), lazy=False) & set(found) for name, path in found.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("edgeguard", ("numpy", "edgeguard.errors")),
        ("edgeguard.contract.messages", ("numpy", "tensorflow", "paho")),
        ("edgeguard.detection.guarded", ("tensorflow", "keras", "onnx", "typer", "tuf", "sqlalchemy")),
        ("edgeguard.agent.daemon", ("tensorflow", "keras", "onnx", "typer", "tuf", "converters", "edgeguard.hub")),
        ("edgeguard.hub.service", ("tensorflow", "keras", "onnx", "typer", "converters")),
        ("edgeguard.cli", ("tensorflow", "keras", "numpy", "tuf", "sqlalchemy", "matplotlib")),
    ],
)
def test_loading_a_module_does_not_load_what_it_must_not(module: str, forbidden: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

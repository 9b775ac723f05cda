"""The digest of code that a measured row depends on: what changes it, and what does not."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from benchmarks import digests, inspection, repair

BENCHMARKS = {"repair": repair.SOURCES, "inspection": inspection.SOURCES}
WRITES_NO_ROW = {"benchmarks/digests.py", "benchmarks/selection.py", "edgeguard/errors.py"}
"""What a benchmark imports and its rows do not depend on, beside its report."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("kept/one.py", "kept/two.py", "converters/lower.py", "converters/micro.py", "alone.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    return tmp_path


@pytest.mark.parametrize("name", ["kept/one.py", "converters/lower.py", "alone.py"])
def test_another_content_is_another_digest(root: Path, name: str) -> None:
    before = digests.code_digest(("kept", "converters", "alone.py"), root)
    (root / name).write_text("# other\n")
    assert digests.code_digest(("kept", "converters", "alone.py"), root) != before


def test_another_name_is_another_digest(root: Path) -> None:
    before = digests.code_digest(("kept",), root)
    (root / "kept" / "one.py").rename(root / "kept" / "a.py")
    assert digests.code_digest(("kept",), root) != before


def test_firmware_and_other_folders_are_no_part_of_it(root: Path) -> None:
    before = digests.code_digest(("kept", "converters"), root)
    for name in ("converters/micro.py", "alone.py", "kept/notes.txt"):
        (root / name).write_text("# other\n")
    assert digests.code_digest(("kept", "converters"), root) == before


def test_the_order_of_the_names_says_nothing(root: Path) -> None:
    assert digests.code_digest(("kept", "alone.py", "kept"), root) == digests.code_digest(("alone.py", "kept"), root)


def test_what_is_not_there_is_an_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        digests.code_digest(("kept", "gone"), root)


@functools.cache
def imported(path: Path) -> set[Path]:
    """The project's files that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    places = {digests.ROOT.joinpath(*name.split(".")) for name in names}
    found = {place.with_suffix(".py") for place in places} | {place / "__init__.py" for place in places}
    return {place for place in found if place.exists() and digests.ROOT in place.parents}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_that_a_benchmark_imports_is_in_its_digest(name: str) -> None:
    files = set(digests.files_of(BENCHMARKS[name]))
    reached = imported(digests.ROOT / f"benchmarks/{name}.py")
    own = {path.relative_to(digests.ROOT).as_posix() for path in reached if path.name != "__init__.py"}
    assert "edgeguard/attacks/base.py" in own
    inside = {path.relative_to(digests.ROOT).as_posix() for path in files}
    assert own - inside <= {*WRITES_NO_ROW, f"benchmarks/{name}_report.py"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_row_imports_the_commands_that_are_left_out(name: str) -> None:
    reached, waiting = set[Path](), [digests.ROOT / f"benchmarks/{name}.py"]
    while waiting:
        more = imported(waiting.pop()) - reached
        reached |= more
        waiting += more
    assert digests.ROOT / "converters" / "calibration.py" in reached
    left_out = {digests.ROOT / one for one in digests.LEFT_OUT if one.endswith(".py")}
    assert all(path.exists() for path in left_out)
    assert not left_out & reached


def test_libraries_are_said_beside_the_digest() -> None:
    found = digests.stamp(("benchmarks/digests.py",))
    assert found["code"] == digests.code_digest(("benchmarks/digests.py",))
    assert {"tensorflow", "keras", "numpy"} <= set(found["libraries"])

"""A device pays for nothing that it does not use: what a running agent has imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FORBIDDEN = (
    "tensorflow",
    "keras",
    "jax",
    "onnx",
    "onnxruntime",
    "converters",
    "tuf",
    "securesystemslib",
    "requests",
    "urllib3",
    "typer",
    "rich",
    "sqlalchemy",
    "sklearn",
    "scipy",
    "matplotlib",
    "edgeguard.hub",
    "edgeguard.inspection",
    "edgeguard.repair",
    "edgeguard.attacks",
    "edgeguard.cli",
)

PROGRAM = """
import sys
from pathlib import Path
from edgeguard.agent import __main__ as main, config, daemon

folder = Path(sys.argv[1])
agent = daemon.Agent(config.load(folder / "agent.toml"))
calls = iter([False] * 5 + [True])
agent.run(lambda: next(calls, True))
assert agent.inputs == 8, agent.inputs
print("\\n".join(sys.modules))
"""


def test_an_agent_at_work_has_imported_nothing_of_the_server_side(
    tmp_path: Path, digit_models: tuple[Path, Path]
) -> None:
    import numpy as np

    (tmp_path / "inbox").mkdir()
    np.save(tmp_path / "inbox" / "1.npy", np.zeros((8, 8, 8, 1), np.uint8))
    (tmp_path / "agent.toml").write_text(
        f'fleet = "demo"\ndevice = "d"\nmodel = "{digit_models[0]}"\nstate_dir = "state"\nlinger_s = 0\n'
        '[broker]\nhost = "127.0.0.1"\nport = 1\n[sources.folder]\npath = "inbox"\n'
        '[update]\nmetadata_url = "http://h/m"\ntargets_url = "http://h/t"\nroot = "agent.toml"\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()
    assert "edgeguard.agent.update" in modules
    found = [m for m in modules if any(m == name or m.startswith(f"{name}.") for name in FORBIDDEN)]
    assert found == []

"""A confined process writes where it may and nowhere else; a hostile SavedModel is no exception."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from converters import lowering
from edgeguard.errors import ModelError

CONFINED = """
import socket, sys
from pathlib import Path
from converters import confine

inside, outside = Path(sys.argv[1]), Path(sys.argv[2])
print("confined", confine.writes_to([inside]))
def attempt(name, action):
    try:
        action()
        print(name, "done")
    except OSError as error:
        print(name, type(error).__name__)
attempt("inside", lambda: (inside / "file").write_text("x"))
attempt("outside", lambda: (outside / "file").write_text("x"))
attempt("overwrite", lambda: (outside / "there").write_text("x"))
attempt("remove", lambda: (outside / "there").unlink())
attempt("read", lambda: (outside / "there").read_text())
attempt("connect", lambda: socket.create_connection(("127.0.0.1", 9), timeout=1))
"""

HOSTILE = """
import sys
import tensorflow as tf
from tensorflow.python.trackable import resource

class Initialised(resource.TrackableResource):
    def _create_resource(self):
        return tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[], shared_name="hostile")
    def _initialize(self):
        tf.io.write_file(sys.argv[2], "written by a model")

class Hostile(tf.Module):
    def __init__(self):
        self.resource = Initialised()
        self.resource.resource_handle
        self.weights = tf.Variable(tf.random.stateless_normal((16, 8), seed=(0, 1)))
    @tf.function(input_signature=[tf.TensorSpec((None, 16), tf.float32)])
    def call(self, x):
        return tf.nn.softmax(tf.nn.relu(x @ self.weights) @ tf.eye(8, 3))

tf.saved_model.save(Hostile(), sys.argv[1])
"""


def run(program: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "there").write_text("kept")
    return inside, outside


def test_a_confined_process_writes_inside_reads_anywhere_and_connects_to_nobody(folders: tuple[Path, Path]) -> None:
    said = dict(line.split(" ", 1) for line in run(CONFINED, *folders))
    if said.pop("confined") == "False":
        pytest.skip("this kernel has no Landlock")
    assert said.pop("connect") in {"PermissionError", "ConnectionRefusedError"}  # refused where TCP is not confined yet
    assert said == {
        "inside": "done",
        "outside": "PermissionError",
        "overwrite": "PermissionError",
        "remove": "PermissionError",
        "read": "done",
    }
    assert (folders[1] / "there").read_text() == "kept"


def test_a_saved_model_that_writes_a_file_when_it_is_loaded_cannot(folders: tuple[Path, Path]) -> None:
    inside, outside = folders
    if run(CONFINED, inside, outside)[0] == "confined False":
        pytest.skip("this kernel has no Landlock")
    trace = outside / "trace"
    run(HOSTILE, inside / "model", trace)
    trace.unlink(missing_ok=True)  # saving may run the initialiser too
    try:
        lowering.lower(inside / "model", np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32))
    except ModelError as error:
        assert "\n" not in str(error)
    assert not trace.exists()

"""``edgeguard doctor``: what it finds on this machine, and what it says of machines that are worse off."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from ai_edge_litert import schema_py_generated as schema
from typer.testing import CliRunner

from converters import calibration, flatbuffer
from edgeguard.agent import doctor
from edgeguard.agent.doctor import INFERENCE, MODEL, RUNTIME, SELF_TEST, SLOTS, Check, Status, Task
from edgeguard.agent.startup import SLOTS_FOLDER
from edgeguard.cli import doctor as command
from edgeguard.cli.inspect import check_digests
from edgeguard.detection import sidecar as sidecars
from firmware_bridge import board as boards
from firmware_bridge.slots import Slots
from tests.simulators import needs
from tests.simulators.mosquitto import Mosquitto, free_port, wait_for_port

NOW = 1_790_000_000.0  # 2026-09-21
DAY = 86400.0
BOARDS = Path(__file__).parent.parent / "firmware_bridge" / "boards"

Diagnose = Callable[..., dict[str, Check]]


def program(text: str) -> tuple[str, ...]:
    """A child that does something else than it is asked to."""
    return (sys.executable, "-c", text)


def saying(*states: Check) -> tuple[str, ...]:
    """A child that has been asked already."""
    lines = "".join(f"{msgspec.json.encode(state).decode()}\n" for state in states)
    return ("/bin/sh", "-c", f"printf %s '{lines}'")


WELL = saying(*(Check(name=name, status="ok", found="it ran") for name in (RUNTIME, INFERENCE, SELF_TEST)))
"""A child of a device on which runtime and model run: for what has to do with neither."""


def well_until_a_model_comes(then: str) -> tuple[str, ...]:
    """A child that runs a shell's command where it is given a model."""
    shell, option, well = saying(Check(name=RUNTIME, status="ok", found="it ran"))
    return (shell, option, f'case "$0" in *.tflite*) {then} ;; *) {well} ;; esac')


def dying(number: signal.Signals) -> tuple[str, ...]:
    return program(f"import os; os.kill(os.getpid(), {int(number)})")


def run(*arguments: object) -> tuple[int, str]:
    """The command as a user types it: exit code and output."""
    app = typer.Typer()
    command.register(app)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.output


def network() -> bytes:
    """A float TFLite file with random weights: a convolution with ReLU, a fully connected layer, four classes."""
    rng = np.random.default_rng(0)
    constants = [rng.normal(size=shape).astype("<f4") for shape in ((6, 3, 3, 1), (6,), (4, 384))]
    kernel, bias, dense = (constant.shape for constant in constants)
    tensors = [
        schema.TensorT(shape=np.array(shape, np.int32), type=schema.TensorType.FLOAT32, buffer=buffer, name=name)
        for shape, buffer, name in (
            ((1, 8, 8, 1), 0, b"image"),
            (kernel, 1, b"kernel"),
            (bias, 2, b"bias"),
            ((1, 8, 8, 6), 0, b"features"),
            (dense, 3, b"dense"),
            ((1, 4), 0, b"logits"),
        )
    ]
    convolution = schema.OperatorT(
        opcodeIndex=0,
        inputs=[0, 1, 2],
        outputs=[3],
        builtinOptionsType=schema.BuiltinOptions.Conv2DOptions,
        builtinOptions=schema.Conv2DOptionsT(
            strideW=1,
            strideH=1,
            dilationWFactor=1,
            dilationHFactor=1,
            fusedActivationFunction=schema.ActivationFunctionType.RELU,
        ),
    )
    layer = schema.OperatorT(
        opcodeIndex=1,
        inputs=[3, 4, -1],
        outputs=[5],
        builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions,
        builtinOptions=schema.FullyConnectedOptionsT(),
    )
    codes = (schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.FULLY_CONNECTED)
    return flatbuffer.pack(
        schema.ModelT(
            version=3,
            operatorCodes=[schema.OperatorCodeT(builtinCode=c, deprecatedBuiltinCode=c, version=1) for c in codes],
            subgraphs=[schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[5], operators=[convolution, layer])],
            buffers=[schema.BufferT(), *(schema.BufferT(data=np.frombuffer(c.tobytes(), np.uint8)) for c in constants)],
        )
    )


def guarded(folder: Path, *, synthetic: bool = False) -> Path:
    """A guarded file with its sidecar beside it."""
    bare, plan = calibration.plan(network())
    inputs = np.random.default_rng(1).normal(size=(400, 8, 8, 1)).astype(np.float32)
    done = calibration.guard_model(bare, plan, inputs, synthetic=synthetic, sidecar=True)
    path = folder / "small.guarded.tflite"
    path.write_bytes(done.content)
    assert done.sidecar is not None
    sidecars.path_beside(path).write_bytes(done.sidecar)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guarded(tmp_path_factory.mktemp("guarded"))


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A copy of the model and its sidecar that a test may spoil."""
    for path in (model, sidecars.path_beside(model)):
        shutil.copy(path, tmp_path)
    return tmp_path / model.name


@pytest.fixture
def agent(tmp_path: Path) -> Callable[..., Path]:
    """Writes an agent's configuration for a model and for a broker on this machine, with TLS where ``ca`` is given."""

    def write(model: Path, port: int | None = None, ca: Path | None = None) -> Path:
        (tmp_path / "state").mkdir(exist_ok=True)
        path = tmp_path / "agent.toml"
        path.write_text(
            f'fleet = "demo"\ndevice = "camera-1"\nmodel = "{model}"\nstate_dir = "state"\n'
            f'[sources.socket]\npath = "agent.sock"\n'
            f'[broker]\nhost = "127.0.0.1"\nport = {port or free_port()}\n' + (f'ca = "{ca}"\n' if ca else "")
        )
        return path

    return write


def diagnose(
    config: Path | None = None, model: Path | None = None, *, child: tuple[str, ...] = WELL, **options: Any
) -> dict[str, Check]:
    """All checks by name."""
    found = doctor.examine(config, model, digests=check_digests, child=child, **options)
    return {check.name: check for check in found}


def tried(model: Path, beside: Path | None = None) -> dict[str, Check]:
    """What the child says of a model."""
    task = Task(model=str(model), beside=None if beside is None else str(beside))
    return {check.name: check for check in doctor.try_model(task, model)}


# The process that may crash.


@pytest.mark.parametrize(
    ("number", "words", "do"),
    [
        (signal.SIGILL, "crashed with SIGILL (Illegal instruction)", "built for another processor"),
        (signal.SIGSEGV, "crashed with SIGSEGV", "EDGEGUARD_RUNTIME"),
        (signal.SIGKILL, "crashed with SIGKILL", "free memory"),
    ],
)
def test_a_runtime_that_crashes_is_one_failed_check_and_the_others_are_made(
    number: signal.Signals, words: str, do: str
) -> None:
    found = diagnose(child=dying(number))
    assert found[RUNTIME].status == "failed"
    assert words in found[RUNTIME].found
    assert do in found[RUNTIME].do
    assert {found[name].status for name in (MODEL, INFERENCE, SELF_TEST)} == {"not checked"}
    assert found["interpreter"].status == "ok"
    assert doctor.exit_code(tuple(found.values())) == 1


def test_a_model_that_crashes_its_runtime_is_named_by_the_step_that_it_crashed_in(model: Path) -> None:
    found = diagnose(model=model, child=well_until_a_model_comes("kill -ILL $$"))
    states = [found[name].status for name in (RUNTIME, MODEL, INFERENCE, SELF_TEST)]
    assert states == ["ok", "ok", "failed", "not checked"]
    assert "SIGILL" in found[INFERENCE].found


def test_what_a_child_told_before_it_crashed_counts() -> None:
    line = json.dumps({"name": INFERENCE, "status": "ok", "found": "it ran"})
    told = program(f"import os; os.write(1, b'noise {{\\n\"\\xff\"\\n'); print({line!r}, flush=True); os.abort()")
    first, second = doctor.run_child(told, Task(model="m"), [INFERENCE, SELF_TEST])
    assert (first.status, first.found) == ("ok", "it ran")
    assert (second.status, second.found) == ("failed", "crashed with SIGABRT (Aborted)")


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHILD_S", 0.5)
    started = time.monotonic()
    (check,) = doctor.run_child(program("import time; time.sleep(60)"), Task(), [RUNTIME])
    assert (check.status, check.found) == ("failed", "no answer within 0.5 s")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("raise ImportError('libGL.so.1: cannot open')", "exit code 1: ImportError: libGL.so.1: cannot open"),
        ("pass", "exit code 0: no reason given"),
        ("print('{\"name\": 3}')", "exit code 0: no reason given"),
    ],
)
def test_a_child_that_says_nothing_useful_has_failed(text: str, found: str) -> None:
    (check,) = doctor.run_child(program(text), Task(), [RUNTIME])
    assert (check.status, check.found) == ("failed", found)


def test_this_process_loads_neither_numpy_nor_a_runtime_before_a_child_did() -> None:
    text = (
        "import sys; from edgeguard.agent import doctor\n"
        "child = (sys.executable, '-c', 'import os; os.abort()')\n"
        "doctor.examine(None, None, digests=lambda content, described: 'fit', child=child)\n"
        "print([m for m in ('numpy', 'flatbuffers', 'ai_edge_litert', 'tflite_runtime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_network_that_is_run_without_a_model_is_what_its_description_says() -> None:
    graph = flatbuffer.parse(doctor._NETWORK).subgraphs[0]
    assert [list(tensor.shape) for tensor in graph.tensors] == [[1, 8], [4, 8], [1, 4]]
    assert len(graph.operators) == 1
    weights = np.arange(32, dtype="<f4") % 3 - 1
    assert weights.tobytes() in doctor._NETWORK
    assert weights.reshape(4, 8) @ np.arange(8) == pytest.approx([-2, -3, 5, -2])


@pytest.mark.parametrize(("name", "package"), [("litert", "ai_edge_litert"), ("tflite-runtime", "tflite_runtime")])
def test_each_runtime_for_devices_runs_that_network_right(name: str, package: str) -> None:
    needs.python_module(package, name, until=(3, 11) if name == "tflite-runtime" else (3, 13))
    (check,) = doctor.try_runtime(Task(runtime=name))
    assert check.status == "ok"
    assert check.found.startswith(name)


def test_a_runtime_that_is_not_there_fails_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEGUARD_RUNTIME", "nonsense")
    (check,) = doctor.try_runtime(Task())
    assert check.status == "failed"
    assert "EDGEGUARD_RUNTIME" in check.do


# The model.


def test_a_model_without_its_sidecar_has_no_self_test(own: Path) -> None:
    sidecars.path_beside(own).unlink()
    found = tried(own)
    assert (found[INFERENCE].status, found[SELF_TEST].status) == ("ok", "not checked")


def test_a_sidecar_that_was_changed_fails_the_self_test(own: Path) -> None:
    path = sidecars.path_beside(own)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = tried(own)
    assert (found[INFERENCE].status, found[SELF_TEST].status) == ("ok", "failed")
    assert "SHA-256" in found[SELF_TEST].found


def test_a_model_that_was_changed_under_its_guard_fails(own: Path) -> None:
    content = bytearray(own.read_bytes())
    weights = np.random.default_rng(0).normal(size=(6, 3, 3, 1)).astype("<f4").tobytes()
    for sign in range(content.index(weights) + 3, content.index(weights) + len(weights), 4):
        content[sign] ^= 0x80
    own.write_bytes(content)
    found = diagnose(model=own)
    assert found[MODEL].status == "failed"
    assert "digests do not fit" in found[MODEL].found
    assert tried(own)[SELF_TEST].status == "failed"


def test_a_guard_that_was_fitted_on_made_up_inputs_is_a_warning(tmp_path: Path) -> None:
    path = guarded(tmp_path, synthetic=True)
    assert diagnose(model=path)[MODEL].status == "warning"
    check = tried(path)[INFERENCE]
    assert check.status == "warning"
    assert "not scored" in check.found


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"nonsense", "TFL3"), (network(), "without a guard")],
    ids=["missing", "nonsense", "unguarded"],
)
def test_what_is_no_guarded_model_fails_and_is_not_run(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "m.tflite"
    if content is not None:
        path.write_bytes(content)
    found = diagnose(model=path)
    assert (found[RUNTIME].status, found[MODEL].status) == ("ok", "failed")
    assert words in found[MODEL].found
    assert {found[name].status for name in (INFERENCE, SELF_TEST)} == {"not checked"}


def test_digests_that_could_not_be_compared_are_not_checked(model: Path) -> None:
    checks = doctor.examine(None, model, digests=lambda content, described: "not checked", child=WELL)
    found = {check.name: check for check in checks}
    assert (found[MODEL].status, found[INFERENCE].status) == ("not checked", "ok")


# The agent's configuration.


def test_a_device_that_is_well_passes_and_nothing_is_left_behind(
    mosquitto: Mosquitto, model: Path, agent: Callable[..., Path], tmp_path: Path
) -> None:
    config = agent(model, mosquitto.port)
    before = {path for path in tmp_path.rglob("*") if "mosquitto" not in str(path)}
    found = diagnose(config, now=lambda: NOW, root=BOARDS / "raspberry-pi-5")
    elsewhere = ("clock", "certificates", SLOTS)
    assert {found[name].status for name in found if name not in elsewhere} == {"ok"}
    assert (found["certificates"].status, found[SLOTS].status) == ("not checked", "not checked")
    assert "without TLS" in found["broker"].found
    assert {path for path in tmp_path.rglob("*") if "mosquitto" not in str(path)} == before


def test_the_model_in_the_slots_is_the_one_that_is_checked(model: Path, agent: Callable[..., Path]) -> None:
    config = agent(Path("no.tflite"))
    slots = config.parent / "state" / SLOTS_FOLDER
    Slots.install(slots, model.read_bytes(), sequence=1)
    beside = sidecars.path_beside(model).read_bytes()
    (slots / f"{sidecars.digest(beside)}{sidecars.SUFFIX}").write_bytes(beside)
    found = diagnose(config, child=well_until_a_model_comes(f'exec {shlex.join(doctor.CHILD)} "$0"'))
    assert "slot-a.tflite" in found[MODEL].found
    assert [found[name].status for name in (MODEL, INFERENCE, SELF_TEST)] == ["ok"] * 3


def test_a_damaged_slot_fails(model: Path, agent: Callable[..., Path]) -> None:
    config = agent(model)
    slots = config.parent / "state" / SLOTS_FOLDER
    Slots.install(slots, model.read_bytes(), sequence=1)
    (slots / "slot-a.tflite").write_bytes(b"damaged")
    found = diagnose(config)
    assert (found[MODEL].status, found[INFERENCE].status) == ("failed", "not checked")
    assert "SHA-256" in found[MODEL].found


def update(slots: Slots, content: bytes, sequence: int) -> None:
    """Put a release in place, on trial."""
    path = slots.active().path.with_name("fetched")
    path.write_bytes(content)
    slots.activate(slots.stage(path, sha256=hashlib.sha256(content).hexdigest(), sequence=sequence))


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    """The first model, confirmed, and a release on trial."""
    made = Slots.install(tmp_path / "state" / SLOTS_FOLDER, b"first", sequence=1)
    update(made, b"second", 2)
    return made


def test_the_slots_say_what_runs_whether_it_proved_itself_and_what_the_way_back_is(
    agent: Callable[..., Path], slots: Slots, tmp_path: Path
) -> None:
    config = agent(Path("no.tflite"))
    on_trial = "slot b: sequence 2, runs, on trial, digest holds"
    assert diagnose(config)[SLOTS].found == f"{on_trial}; slot a: sequence 1, way back, confirmed, digest holds"
    update(slots, b"third", 3)
    found = diagnose(config)[SLOTS]
    assert found.status == "ok"
    assert [(one.name, one.place, one.proof) for one in found.slots or ()] == [
        ("c", "runs", "on trial"),
        ("a", "way back", "confirmed"),
        ("b", "left", "not proved"),
    ]
    slots.confirm()
    assert [(one.name, one.proof) for one in diagnose(config)[SLOTS].slots or ()] == [
        ("c", "confirmed"),
        ("a", "confirmed"),
    ]
    slots.revert("failed", has_failed=True)
    told = diagnose(config)[SLOTS].found
    assert told.startswith("slot a: sequence 1, runs, confirmed, digest holds; slot c: sequence 3, left, failed")
    assert told.endswith("; no way back")


@pytest.mark.parametrize(
    ("damaged", "status", "do"),
    [
        ("slot-b.tflite", "failed", "takes the way back"),
        ("slot-a.tflite", "warning", "no way back until"),
        ("slots.json", "failed", "remove the folder"),
    ],
)
def test_a_slot_whose_digest_does_not_hold_is_told_of(
    agent: Callable[..., Path], slots: Slots, tmp_path: Path, damaged: str, status: str, do: str
) -> None:
    config = agent(Path("no.tflite"))
    (tmp_path / "state" / SLOTS_FOLDER / damaged).write_bytes(b"damaged")
    found = diagnose(config)[SLOTS]
    assert found.status == status
    assert do in found.do
    if damaged != "slots.json":
        assert found.found.count("digest does not hold") == 1


def test_the_command_shows_the_slots_to_people_and_to_programs(
    agent: Callable[..., Path], slots: Slots, tmp_path: Path
) -> None:
    config = agent(Path("no.tflite"))
    _, out = run("--config", config)
    (line,) = (line for line in out.splitlines() if SLOTS in line)
    assert "slot b: sequence 2, runs, on trial, digest holds" in line
    document = json.loads(run("--config", config, "--json")[1])
    (check,) = (check for check in document["checks"] if check["name"] == SLOTS)
    assert check["slots"][0] == {
        "name": "b",
        "sequence": 2,
        "sha256": hashlib.sha256(b"second").hexdigest(),
        "place": "runs",
        "proof": "on trial",
        "holds": True,
        "local": False,
    }


def test_a_state_folder_that_this_user_may_not_look_into_is_not_taken_for_an_empty_one(
    agent: Callable[..., Path], model: Path
) -> None:
    before = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(shutil.copy(agent(model), folder))
        (config.parent / "state").mkdir()
        (config.parent / "state").chmod(0)
        config.parent.chmod(0o755)
        try:
            if before == 0:
                os.seteuid(65534)  # who may do everything is nobody for a while
            found = diagnose(config)
        finally:
            os.seteuid(before)
    assert (found[MODEL].status, found["state folder"].status) == ("failed", "failed")
    assert "as the agent's user" in found[MODEL].do


@pytest.mark.parametrize("text", [None, "fleet = 1\n", "not toml", ""])
def test_without_a_sound_configuration_what_needs_it_is_not_checked(tmp_path: Path, text: str | None) -> None:
    config = tmp_path / "agent.toml"
    if text is not None:
        config.write_text(text)
    found = diagnose(config)
    assert found["configuration"].status == "failed"
    needing = ("broker", "certificates", "state folder", "local socket", MODEL)
    assert {found[name].status for name in needing} == {"not checked"}
    assert found[RUNTIME].status == "ok"


def test_a_broker_that_is_down_fails_with_its_address(model: Path, agent: Callable[..., Path]) -> None:
    port = free_port()
    found = diagnose(agent(model, port))
    assert found["broker"].status == "failed"
    assert f"127.0.0.1:{port}" in found["broker"].found
    assert found[INFERENCE].status == "ok"


def test_a_broker_elsewhere_without_tls_is_a_warning(
    mosquitto: Mosquitto, model: Path, agent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # This machine by a name that does not say so.
    monkeypatch.setattr(doctor, "_is_local", lambda host: False)
    found = diagnose(agent(model, mosquitto.port))
    assert found["broker"].status == "warning"
    assert "broker.ca" in found["broker"].do


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("hub.lan", False)],
)
def test_only_this_machine_is_local(host: str, local: bool) -> None:
    assert doctor._is_local(host) is local


@pytest.fixture
def tls_broker(tmp_path: Path) -> Iterator[Callable[[int, int], tuple[Path, int]]]:
    """Starts a mosquitto with TLS: days that its authority and its certificate last; the authority's file, the port."""
    started: list[subprocess.Popen[bytes]] = []
    folder = tmp_path / "tls"
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run([needs.program("openssl", "openssl"), *arguments], cwd=folder, check=True, capture_output=True)

    def start(authority_days: int, days: int) -> tuple[Path, int]:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", "-x509", *key, "-days", str(authority_days), "-subj", "/CN=authority", "-keyout", "ca.key",
                "-out", "ca.pem")  # fmt: skip
        openssl("req", *key, "-subj", "/CN=broker", "-keyout", "broker.key", "-out", "broker.csr")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl("x509", "-req", "-in", "broker.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days",
                str(days), "-extfile", "names", "-out", "broker.pem")  # fmt: skip
        port = free_port()
        (folder / "mosquitto.conf").write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\nlog_dest none\n"
            f"certfile {folder}/broker.pem\nkeyfile {folder}/broker.key\n"
            + ("user root\n" if os.geteuid() == 0 else "")
        )
        server = [needs.program("mosquitto", "mosquitto"), "-c", str(folder / "mosquitto.conf")]
        started.append(subprocess.Popen(server, stderr=subprocess.DEVNULL))
        wait_for_port(port)
        return folder / "ca.pem", port

    yield start
    for process in started:
        process.terminate()
        process.wait(15)


@pytest.mark.parametrize(
    ("authority_days", "days", "status", "words"),
    [
        (900, 400, "ok", "the broker's certificate"),
        (900, 10, "warning", "the broker's certificate"),
        (10, 400, "warning", "the authority's certificate"),
    ],
)
def test_certificates_that_end_soon_are_told_of(
    model: Path, agent: Callable[..., Path], tls_broker: Any, authority_days: int, days: int, status: str, words: str
) -> None:
    ca, port = tls_broker(authority_days, days)
    found = diagnose(agent(model, port, ca))
    assert found["broker"].status == "ok"
    assert "with TLS" in found["broker"].found
    assert found["certificates"].status == status
    assert words in found["certificates"].found


def test_a_certificate_of_the_authority_is_told_of_while_the_broker_is_away(
    model: Path, agent: Callable[..., Path], tls_broker: Any
) -> None:
    ca, _ = tls_broker(10, 5)
    found = diagnose(agent(model, ca=ca))
    assert (found["broker"].status, found["certificates"].status) == ("failed", "warning")
    assert "authority" in found["certificates"].found


def test_a_file_that_is_no_certificate_fails(model: Path, agent: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    found = diagnose(agent(model, ca=tmp_path / "ca.pem"))
    assert found["certificates"].status == "failed"
    assert "ca.pem" in found["certificates"].found


# Judgements on values.


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", "Python 3.11.2, aarch64, 64 bit, glibc 2.36"),
        ({"version": (3, 10, 12), "libc": ("glibc", "2.27")}, "ok", "glibc 2.27"),
        ({"version": (3, 9, 2)}, "warning", "Python 3.9.2"),
        ({"version": (3, 14, 0)}, "warning", "Python 3.14.0"),
        ({"machine": "armv7l", "bits": 32}, "warning", "32 bit"),
        ({"bits": 32}, "warning", "aarch64, 32 bit"),
        ({"machine": "riscv64"}, "warning", "riscv64"),
        ({"libc": ("glibc", "2.9")}, "warning", "glibc 2.9"),
        ({"libc": ("", "")}, "warning", "no glibc"),
    ],
)
def test_an_interpreter_that_runtimes_are_not_made_for_is_a_warning(
    changes: dict[str, Any], status: Status, words: str
) -> None:
    usual: dict[str, Any] = {"version": (3, 11, 2), "machine": "aarch64", "bits": 64, "libc": ("glibc", "2.36")}
    check = doctor.interpreter(**{**usual, **changes})
    assert check.status == status
    assert words in check.found
    assert bool(check.do) == (status == "warning")


@pytest.mark.parametrize(
    ("now", "synced", "status"),
    [
        (NOW, True, "ok"),
        (NOW, False, "warning"),
        (NOW, None, "not checked"),
        (0.0, True, "failed"),
        (0.0, None, "failed"),
        (5_000_000_000.0, True, "failed"),
    ],
)
def test_a_clock_is_judged_by_its_year_and_by_what_keeps_it_right(
    now: float, synced: bool | None, status: Status
) -> None:
    assert doctor.clock(now, synced).status == status


@pytest.mark.parametrize(
    ("kernel", "mark", "synced"), [(0, False, True), (5, True, False), (-1, True, True), (-1, False, None)]
)
def test_the_kernel_knows_better_than_systemds_mark(
    tmp_path: Path, kernel: int, mark: bool, synced: bool | None
) -> None:
    if mark:
        (tmp_path / "run/systemd/timesync").mkdir(parents=True)
        (tmp_path / "run/systemd/timesync/synchronized").touch()
    assert doctor.synchronised(tmp_path, lambda: kernel) is synced


def test_this_machines_kernel_answers() -> None:
    assert doctor.synchronised(Path("/")) in (True, False)


@pytest.mark.parametrize(
    ("ends", "status", "words"),
    [
        ([("a", NOW + 400 * DAY), ("b", NOW + 300 * DAY)], "ok", "b ends on 2027-"),
        ([("a", NOW + 400 * DAY), ("b", NOW + 29 * DAY)], "warning", "b ends"),
        ([("a", NOW + 400 * DAY), ("b", NOW - 1)], "failed", "b ended on"),
        ([], "not checked", "no certificate"),
    ],
)
def test_the_certificate_that_ends_first_decides(ends: list[tuple[str, float]], status: Status, words: str) -> None:
    check = doctor.certificates(ends, NOW)
    assert check.status == status
    assert words in check.found


def look(name: str, **changes: Any) -> boards.Board:
    return dataclasses.replace(boards.read(BOARDS / name, architecture="aarch64"), **changes)


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (look("jetson-nano"), "ok", "NVIDIA Jetson Nano Developer Kit: 38 C, throttling none, supply unknown"),
        (look("raspberry-pi-5"), "ok", "throttling unknown, supply fine"),
        (look("raspberry-pi-4"), "warning", "throttling since boot, supply too weak since boot"),
        (look("raspberry-pi-5", under_voltage=True, under_voltage_since_boot=True), "warning", "too weak now"),
        (look("jetson-nano", throttled=True, throttled_since_boot=True), "warning", "throttling now"),
        (look("jetson-nano", temperature_c=80.0), "warning", "80 C"),
        (look("no such board"), "not checked", "generic aarch64"),
    ],
)
def test_a_board_that_is_hot_slowed_or_weakly_fed_is_a_warning(found: boards.Board, status: Status, words: str) -> None:
    check = doctor.board(found)
    assert check.status == status
    assert words in check.found
    assert bool(check.do) == (status == "warning")


def test_a_state_folder_that_is_not_there_yet_is_fine_where_it_can_be_made(tmp_path: Path) -> None:
    assert doctor.storage(tmp_path / "a" / "b", needed=1).status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/state"])
def test_a_state_folder_that_cannot_be_written_fails(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    check = doctor.storage(tmp_path / name, needed=1)
    assert check.status == "failed"
    assert str(tmp_path / "file") in check.found


@pytest.mark.parametrize(("least", "status"), [(0, "warning"), (2**62, "failed")])
def test_a_disk_with_less_room_than_spool_and_updates_may_need_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, status: Status
) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE", least)
    assert doctor.storage(tmp_path, needed=2**60).status == status


def test_the_sockets_folder_is_looked_at_and_so_is_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor.local_socket(None).status == "not checked"
    assert doctor.local_socket(tmp_path / "agent.sock").status == "ok"
    assert doctor.local_socket(tmp_path / "none" / "agent.sock").status == "warning"
    assert doctor.local_socket(tmp_path / "file" / "agent.sock").status == "failed"
    assert doctor.local_socket(tmp_path / "file").status == "failed"
    assert doctor.local_socket(tmp_path / ("x" * 108)).status == "failed"


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["ok", "warning", "not checked"], 0),
        (["warning"], 0),
        (["ok", "failed"], 1),
        (["not checked", "failed"], 1),
        (["not checked", "not checked"], 3),
        ([], 3),
    ],
)
def test_the_exit_code_says_whether_something_failed_or_nothing_was_checked(states: list[Status], code: int) -> None:
    assert doctor.exit_code([Check(name=str(i), status=s, found="") for i, s in enumerate(states)]) == code


# The command.


def test_the_command_passes_a_sound_model_and_gives_one_json_object(model: Path) -> None:
    code, out = run(model, "--json")
    document = json.loads(out)
    found = {check["name"]: check for check in document["checks"]}
    assert code == 0
    assert {tuple(check) for check in found.values()} == {("name", "status", "found", "do")}
    assert sum(document["counts"].values()) == len(found)
    assert [found[name]["status"] for name in (RUNTIME, MODEL, INFERENCE, SELF_TEST)] == ["ok"] * 4
    assert "digests fit" in found[MODEL]["found"]
    assert "16 known inputs" in found[SELF_TEST]["found"]


def test_the_command_prints_a_line_a_check_and_a_summary_and_exits_with_1_where_one_failed(tmp_path: Path) -> None:
    code, out = run("--config", tmp_path / "no.toml")
    *lines, summary = out.splitlines()
    failed = [line for line in lines if line.startswith("failed")]
    assert code == 1
    assert lines[0].startswith("ok           interpreter      Python 3.")
    assert len(failed) == 1
    assert failed[0].endswith("; check the path")
    assert "not checked  broker           needs the configuration" in lines
    assert sum(int(part.split()[0]) for part in summary.split(", ")) == len(lines)


def test_an_unknown_option_is_a_mistake_of_usage() -> None:
    assert run("--nonsense")[0] == 2


def test_the_command_explains_itself_with_an_example() -> None:
    code, out = run("--help")
    assert code == 0
    assert "edgeguard doctor" in out.split("Example")[-1]

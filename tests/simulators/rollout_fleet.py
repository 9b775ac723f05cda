"""A fleet that takes releases: light agents around a real hub process, a real broker and a real signed repository.

What is real: mosquitto, the hub as a process with its database and web server, the repository, and each agent's fetch,
which is the client's own code over HTTP. What is simplified: an agent is a connection and two threads, fetches run in
threads instead of a child each, a model file holds metadata and no graph, so that nothing is inferred and the last
checks of a model's answers are left out; reports are made up. The roll-out begins with a repaired model that is signed
already.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Literal

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.contract import topics
from edgeguard.contract.messages import Desired, Health, decode
from edgeguard.hub.access import Tokens
from edgeguard.hub.casebook import Casebook, Move
from edgeguard.hub.cases import Case, Released
from edgeguard.hub.service import clock_ms
from edgeguard.hub.store import Store
from edgeguard.release.client import FetchRequest
from edgeguard.release.fetch import fetch
from edgeguard.release.repository import Repository
from tests.simulators import fleet
from tests.simulators.fleet import Publisher, wait_until

OLD, NEW, LATER = fleet.MODEL, "d" * 64, "f" * 64
GUARDS = {OLD: fleet.GUARD, NEW: "e" * 64, LATER: "9" * 64}
NAMES = {OLD: "signs", NEW: "repaired", LATER: "later"}
INPUTS = 40
"""Inputs in a report."""
REPORT_S = 0.5

BOARDS = ("Raspberry Pi 5", "Raspberry Pi 4", "Jetson Orin Nano")
Fault = Literal["none", "cannot fetch", "flags", "goes back", "dies", "silent"]
FAULTS: tuple[Fault, ...] = ("cannot fetch", "flags", "goes back", "dies", "silent")


def file_of(model: str) -> bytes:
    """The guarded file of one of the models."""
    return fleet.guarded_file(fleet.guard_metadata(model=model, guard=GUARDS[model]))


class Agent(Publisher):
    """A device that runs the attacked model until it takes a release, with what is wrong with it.

    ``taken`` are the sequence numbers of the releases that it ran, in their order.
    """

    def __init__(self, port: int, device: str, folder: Path, url: str, pool: ThreadPoolExecutor, fault: Fault) -> None:
        super().__init__(port, device)
        self.fault = fault
        self.model, self.sequence = OLD, 0
        self.taken: list[int] = []
        self.inputs = 0
        self._folder, self._url, self._pool = folder, url, pool
        self._seq = self._session = 0
        self._boot = secrets.token_hex(8)
        self._busy = threading.Lock()

    def arrive(self) -> None:
        """Connect, and say what runs."""
        self.__enter__()
        wait_until(self.connected)
        self._session += 1
        self.send(topics.STATUS, fleet.status(session=self._session, boot=self._boot), retain=True)
        self.send(topics.BIRTH, self._birth(), retain=True)

    def leave(self) -> None:
        """Say goodbye, and be gone."""
        self.send(topics.STATUS, fleet.status("offline", session=self._session, boot=self._boot), retain=True)
        time.sleep(0.2)
        self.__exit__()

    def again(self) -> Agent:
        """The same device, after it was switched off and on: what it runs is on its disk."""
        agent = Agent(self._port, self.device, self._folder, self._url, self._pool, self.fault)
        agent.model, agent.sequence, agent.taken, agent.inputs = self.model, self.sequence, self.taken, self.inputs
        agent._session, agent._kept = self._session, dict(self._kept)
        agent.arrive()
        return agent

    def report(self) -> None:
        """One window, and one health message."""
        self._seq += 1
        flagged = INPUTS // 3 if self.fault == "flags" and self.model == NEW else 0
        counts = ((0, INPUTS // 2, flagged), (1, INPUTS // 2, 0))
        made = fleet.report(self._seq, boot=self._boot, model=self.model, guard=GUARDS[self.model], counts=counts)
        self.inputs += INPUTS
        self.keep(made)
        health = Health(
            session=self._session, boot=self._boot, rss_bytes=1 << 26, spooled=0, inputs=self.inputs, p50_us=100.0
        )
        self.send(topics.HEALTH, health)

    def _birth(self) -> Any:
        made = fleet.birth(session=self._session, model=self.model, guard=GUARDS[self.model], boot=self._boot)
        board = BOARDS[int(self.device[1:]) % len(BOARDS)]
        return msgspec.structs.replace(made, sequence=self.sequence, board=board)

    def _on_message(self, client: Any, userdata: Any, message: mqtt.MQTTMessage) -> None:
        super()._on_message(client, userdata, message)
        if message.topic.endswith(f"/{topics.MODEL_DESIRED}") and message.payload and self.fault != "silent":
            self._pool.submit(self._follow, decode(Desired, bytes(message.payload)))

    def _follow(self, desired: Desired) -> None:
        with self._busy:
            if desired.sequence == self.sequence:
                self._say("updated", desired.sequence)
                return
            if self.fault == "cannot fetch":
                self._say("failed", desired.sequence, "the disk is full")
                return
            result = fetch(
                FetchRequest(
                    metadata_url=f"{self._url}/metadata/",
                    targets_url=f"{self._url}/targets/",
                    metadata_dir=str(self._folder / self.device / "metadata"),
                    root=str(self._folder / "root.json"),
                    target=desired.target,
                    sequence=desired.sequence,
                    running_model_digest=self.model,
                    running_sequence=self.sequence,
                    staging_dir=str(self._folder / self.device / "staging"),
                )
            )
            if result.state != "fetched":
                self._say(result.state, desired.sequence, result.reason)
                return
            before = self.model, self.sequence
            self.model, self.sequence = str(result.model_digest), desired.sequence
            self.taken.append(desired.sequence)
            self._say("updated", desired.sequence)
            if self.model == NEW and self.fault == "dies":
                self._pool.submit(self.leave)
            elif self.model == NEW and self.fault == "goes back":
                time.sleep(1.0)
                self.model, self.sequence = before
                self._say("failed", desired.sequence, "its self-test failed")

    def _say(self, state: Any, sequence: int, reason: str = "") -> None:
        made = fleet.reported(
            state, session=self._session, model=self.model, guard=GUARDS[self.model], sequence=self.sequence,
            desired=sequence,
        )  # fmt: skip
        self.send(topics.MODEL_REPORTED, msgspec.structs.replace(made, boot=self._boot, reason=reason), retain=True)


@dataclass
class Site:
    """A hub's folder with a repaired model that is signed, its agents, and a token of an operator."""

    setting: Any
    agents: dict[str, Agent]
    token: str
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The JSON of the hub's answer."""
        connection = HTTPConnection("127.0.0.1", self.setting.web_port, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            found: dict[str, Any] = json.loads(response.read())
            assert response.status < 300, found
            return found
        finally:
            connection.close()

    def case(self, number: int = 1) -> dict[str, Any]:
        """A case as the hub shows it."""
        return self.ask("GET", f"/v1/cases/{number}")

    def steer(self, action: str, why: str = "") -> None:
        """A person's word on the roll-out of the first case."""
        self.ask("POST", "/v1/cases/1/rollout", {"action": action, "why": why})

    def members(self) -> dict[str, str]:
        """What became of each device of the first case's roll-out."""
        rows = self.ask("GET", "/v1/cases/1/devices?limit=500")["items"]
        return {row["device"]: row["state"] for row in rows}

    def hinted(self, device: str) -> int | None:
        """The sequence that a device which comes now is told; None where it is told none within a second."""
        found: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        client = mqtt.Client(CallbackAPIVersion.VERSION2)
        topic = topics.topic(self.agents[device]._fleet, device, topics.MODEL_DESIRED)
        client.on_message = lambda _c, _u, message: found.put(bytes(message.payload))
        client.connect("127.0.0.1", self.setting.broker_port)
        client.subscribe(topic)
        client.loop_start()
        try:
            return decode(Desired, found.get(timeout=1.0)).sequence
        except queue.Empty:
            return None
        finally:
            client.disconnect()
            client.loop_stop()

    def running(self) -> dict[str, str]:
        """The model that each agent really runs."""
        return {name: agent.model for name, agent in self.agents.items()}

    def there(self) -> list[Agent]:
        """Agents that are connected."""
        return [agent for agent in self.agents.values() if agent.connected()]

    def come_back(self, name: str) -> Agent:
        """A device that was away is switched on."""
        self.agents[name] = self.agents[name].again()
        return self.agents[name]

    def join(self, name: str, fault: Fault) -> Agent:
        """A device that was not there before arrives, and runs what the others ran at the beginning."""
        one = next(iter(self.agents.values()))
        agent = Agent(one._port, name, one._folder, one._url, one._pool, fault)
        agent.arrive()
        self.agents[name] = agent
        return agent

    def wait_for(self, *states: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The first case once it is in one of these states; "paused" is one too."""
        found: dict[str, Any] = {}

        def reached() -> bool:
            found.update(self.case())
            return found["state"] in states or bool("paused" in states and found["release"]["paused"])

        wait_until(reached, timeout_s=timeout_s)
        return found

    def leave(self) -> None:
        """Disconnect all agents."""
        for agent in self.agents.values():
            agent.__exit__()

    def stop_reporting(self) -> None:
        """No more windows; what was sent is kept until it is acknowledged."""
        self._stop.set()
        time.sleep(2 * REPORT_S)

    def _report(self) -> None:
        while not self._stop.wait(REPORT_S):
            for agent in self.there():
                agent.report()


def released(made: Any) -> Released:
    """A release of the repository, as a case names it."""
    return Released(
        target=made.target, sequence=made.sequence, model_digest=made.model_digest, guard_digest=made.guard_digest,
        replaces=made.replaces, at_ms=clock_ms(),
    )  # fmt: skip


def repair(store: Store, repository: Repository, model: str, replaces: str, **fields: Any) -> Case:
    """A case whose repaired model is signed and goes to nobody yet."""
    made = repository.add_repair(
        file_of(model), name="signs", model_digest=model, guard_digest=GUARDS[model], replaces=replaces
    )
    now = clock_ms()
    case = Case(
        model="signs", model_digest=replaces, label=1, label_name="stop", state="released", created_ms=now,
        updated_ms=now, devices=("d000",), flagged=40, inputs=100, p_value=1e-30, channels=(), is_case=True,
        release=released(made), **fields,
    )  # fmt: skip
    return Casebook(store, clock_ms=clock_ms).save(Move(case=case, text=f"release {made.sequence} is signed"))


@contextmanager
def site(setting: Any, faults: Sequence[Fault], *, away: int = 0, patience_s: float = 30.0) -> Iterator[Site]:
    """A hub process and one agent for each fault; the first ``away`` of those without one are not there yet.

    ``setting`` is a hub's folder as ``tests.hub.conftest`` makes it; it may take ``patience_s`` to begin.
    """
    for model in (NEW, LATER):
        (setting.folder / f"{NAMES[model]}.tflite").write_bytes(file_of(model))
        setting.more += (
            f'[[models]]\nname = "{NAMES[model]}"\nguarded = "{NAMES[model]}.tflite"\n'
            'keras = "signs.keras"\ndata = "digits"\n'
        )
    repository = Repository.open(
        setting.folder / "release", setting.folder / "keys", clock=lambda: datetime.now(timezone.utc)
    )
    (setting.folder / "root.json").write_bytes(repository.root())
    store = setting.store()
    token, _ = Tokens(store, clock_ms=clock_ms).add("operator", "operator", who="test", lifetime_s=None)
    with ExitStack() as stack:
        stack.callback(store.close)
        pool = stack.enter_context(ThreadPoolExecutor(8))
        url = f"http://127.0.0.1:{setting.web_port}"
        agents = {
            name: Agent(setting.broker_port, name, setting.folder / "devices", url, pool, fault)
            for name, fault in ((f"d{number:03}", fault) for number, fault in enumerate(faults))
        }
        (setting.folder / "devices").mkdir()
        (setting.folder / "root.json").rename(setting.folder / "devices" / "root.json")
        made = Site(setting, agents, token)
        setting.start()
        setting.wait_until_up(timeout_s=patience_s)
        stack.callback(made.leave)
        for agent in agents.values():
            agent.arrive()
        for agent in [agent for agent in agents.values() if agent.fault == "none"][:away]:
            agent.leave()
        reporting = threading.Thread(target=made._report, daemon=True)
        reporting.start()
        stack.callback(reporting.join, 30)
        stack.callback(made._stop.set)
        wait_until(lambda: all(agent.inputs for agent in made.there()), timeout_s=patience_s)
        repair(store, repository, NEW, OLD)
        yield made


def quick(**more: object) -> str:
    """``[rollout]`` of a hub for which seconds stand for hours."""
    values = {"soak_s": 3, "min_inputs": INPUTS, "timeout_s": 10, "patience_s": 1} | more
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())

"""A staged roll-out to 100 agents of which a tenth fails: it pauses, is resumed, and is taken back; everything adds up.

    python -m benchmarks.rollout --json benchmarks/results/rollout.json

The fleet is that of ``tests.simulators.rollout_fleet``, whose docstring says what is simplified: real broker, hub
process, signed repository and client. Seconds stand for hours. Five of the agents are away from the beginning to after
the release has reached everybody else, and five more until it was taken back. After each stage, what the hub says is
held against what the agents really run. The inputs that the hub stored are compared only for agents that are connected
at the end: what others had not sent, or not heard acknowledged, is on their disks.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeguard.hub.members import Members
from edgeguard.release.repository import Repository
from tests.hub.conftest import Setting
from tests.simulators import fleet
from tests.simulators.fleet import wait_until
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.rollout_fleet import FAULTS, GUARDS, NEW, OLD, Fault, Site, quick, site

CANARIES = 3
AWAY = 10
LONG_S = 300.0


def main() -> None:
    """Run it once, print and write what was measured; exit code 1 where something does not add up."""
    parser = argparse.ArgumentParser(prog="benchmarks.rollout", description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--failing", type=float, default=0.1, help="the share of agents that fail")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    failing = round(given.agents * given.failing)
    with tempfile.TemporaryDirectory() as folder:
        broker = Mosquitto(Path(folder) / "mosquitto")
        broker.start()
        setting = _setting(Path(folder), broker.port)
        try:
            measured = _run(setting, given.agents, failing)
        finally:
            setting.end()
            broker.stop()
    measured |= {"machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps(measured, indent=2))
    if given.json:
        given.json.write_text(json.dumps(measured, indent=2) + "\n")
    sys.exit(0 if all(measured["checks"].values()) else 1)


def _setting(folder: Path, port: int) -> Setting:
    setting = Setting(folder, port)
    setting.policy = f"interval_s = 0.5\nassess_s = 10.0\ncanaries = {CANARIES}"
    setting.rollout = quick(soak_s=10, timeout_s=60, patience_s=5)
    (folder / "signs.tflite").write_bytes(fleet.guarded_file(fleet.guard_metadata()))
    (folder / "signs.keras").touch()
    Repository.create(folder / "release", folder / "keys", folder / "offline", clock=lambda: datetime.now(timezone.utc))
    return setting


def _faults(agents: int, failing: int) -> list[Fault]:
    """Faulty agents spread over the fleet."""
    faults: list[Fault] = ["none"] * agents
    for number in range(failing):
        faults[number * agents // failing + 5 % agents] = FAULTS[number % len(FAULTS)]
    return faults


def _run(setting: Setting, agents: int, failing: int) -> dict[str, Any]:
    faults = _faults(agents, failing)
    with site(setting, faults, away=AWAY, patience_s=LONG_S) as made:
        away = [name for name, agent in made.agents.items() if not agent.connected()]
        began = time.monotonic()
        pauses = _through(made, began)
        out_s = time.monotonic() - began
        case, members, running = made.case(), made.members(), made.running()
        well = {name for name, agent in made.agents.items() if agent.fault == "none"}
        checks = {
            "it paused": bool(pauses),
            "every device that is there and well runs the release": all(running[n] == NEW for n in well - set(away)),
            "nobody was lost": len(members) == agents == sum(case["release"]["counts"].values()),
            "the hub's list is what the agents run": sorted(case["release"]["updated"]) == _run_by(running, NEW),
            "only faulty devices failed": not any(members[name] in ("failed", "dropped") for name in well),
            "who is away runs what it ran": all(running[name] == OLD for name in away),
        }
        out = {"counts": case["release"]["counts"], "running_release": len(_run_by(running, NEW))}
        for name in away[: AWAY // 2]:
            made.come_back(name)
        wait_until(lambda: all(made.agents[name].model == NEW for name in away[: AWAY // 2]), timeout_s=LONG_S)
        checks["who came back took the release once"] = all(
            made.agents[name].taken == [1] for name in away[: AWAY // 2]
        )
        began = time.monotonic()
        made.steer("back", "the drill says so")
        case = made.wait_for("rolled_back", timeout_s=LONG_S)
        back_s = time.monotonic() - began
        there = made.there()
        checks["everybody who is there runs the model before"] = all(agent.model == OLD for agent in there)
        for name in away[AWAY // 2 :]:
            made.come_back(name)
        wait_until(lambda: all(made.agents[name].inputs for name in away[AWAY // 2 :]), timeout_s=LONG_S)
        time.sleep(5)
        checks["who came back after that took nothing"] = not any(made.agents[n].taken for n in away[AWAY // 2 :])
        running = made.running()
        brought = sorted(name for name, agent in made.agents.items() if agent.model == OLD and agent.sequence)
        back = made.case()["back"]
        checks["the hub's list of those taken back is what the agents run"] = sorted(back["updated"]) == brought
        checks["the case names whoever still runs the release"] = all(
            any(line.startswith(f"{name}: ") for line in back["held"]) for name in _run_by(running, NEW)
        )
        checks["nobody went down in sequence"] = all(
            agent.taken == sorted(agent.taken) for agent in made.agents.values()
        )
        made.stop_reporting()
        wait_until(lambda: not any(agent.waiting for agent in made.there()), timeout_s=LONG_S)
        counts, stored = _stored(setting)
        checks["inputs stored are those that agents connected at the end counted"] = all(
            stored[name] == agent.inputs for name, agent in made.agents.items() if agent.connected()
        )
        trail = [(entry["who"], entry["became"], entry["why"]) for entry in made.case()["audit"]]
        checks["every pause and every word of a person is in the audit trail"] = _told(trail, pauses)
        return {
            "agents": agents,
            "failing": dict(Counter(fault for fault in faults if fault != "none")),
            "away": len(away),
            "pauses": pauses,
            "rolled_out": out | {"seconds": round(out_s, 1)},
            "rolled_back": {"seconds": round(back_s, 1), "running_before": len(_run_by(running, OLD)),
                            "updated": len(back["updated"]), "held": back["held"],
                            "still_running_release": {n: made.agents[n].fault for n in _run_by(running, NEW)}},
            "reports": counts["reports"],
            "inputs": counts["inputs"],
            "dead_letters": counts["dead_letters"],
            "checks": checks,
        }  # fmt: skip


def _through(made: Site, began: float) -> list[dict[str, Any]]:
    """Resume the roll-out each time that it pauses, until it is through; the pauses."""
    pauses: list[dict[str, Any]] = []
    while (case := made.wait_for("paused", "closed", timeout_s=LONG_S))["state"] != "closed":
        release = case["release"]
        pauses.append({
            "at_s": round(time.monotonic() - began, 1), "group": release["group"], "why": release["paused"],
            "counts": release["counts"],
        })  # fmt: skip
        print(f"paused: {release['paused']}", file=sys.stderr)
        made.steer("resume", "put up with")
    return pauses


def _stored(setting: Setting) -> tuple[dict[str, int], Counter[str]]:
    """The hub's totals, and the inputs that its database has of each device."""
    store = setting.store()
    members, stored = Members(store), Counter[str]()
    for model in (OLD, NEW):
        for name, labels in members.counts(model, GUARDS[model]).items():
            stored[name] += sum(inputs for inputs, _ in labels.values())
    counts = store.counts()
    store.close()
    return counts, stored


def _run_by(running: dict[str, str], model: str) -> list[str]:
    return sorted(name for name, runs in running.items() if runs == model)


def _told(trail: Sequence[tuple[str, str, str]], pauses: Sequence[dict[str, Any]]) -> bool:
    said = [why for _, _, why in trail]
    resumed = [who for who, _, why in trail if "resumed the roll-out" in why]
    return all(any(pause["why"] in why for why in said) for pause in pauses) and len(resumed) == len(pauses)


if __name__ == "__main__":
    main()

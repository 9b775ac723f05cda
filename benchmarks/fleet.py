"""The hub's evidence in simulated fleets: time to a case, false alarms in a year, and what liars can do.

    python -m benchmarks.fleet [--quick] [--jobs 1] [--json benchmarks/results/fleet.json]

Draws fleets day by day (:mod:`tests.simulators.fleet_year`, which says what is assumed of the world) and lets the hub's
own policy and trust judge the counts, look by look. Four parts:

* ``calm``: years without attack or liars, some with devices that were calibrated anew: suspicions are false ones;
* ``liars``: the same with 20% liars of each kind: inspections that they cause, beside the most that they can;
* ``speed``: days from the first triggered input to the suspicion and to the case, against the trigger's rate and the
  size of the fleet;
* ``plane``: the same over the share of honest devices that meet the trigger and the share of liars, who know all that
  the hub knows and have raised its bar for weeks before the attack begins. "None" means: not within the time given.

Rules enforced here:

* the seeds begin at ``SEED``: thresholds were chosen with others;
* budgets: on average at most one false case for a model and year, and never more liar-caused inspections than
  :func:`edgeguard.hub.trust.most_rejections` says;
* a false case is an inspection that confirms wrongly, which each does with the probability that the simulator states.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgeguard.hub import policy, trust
from edgeguard.hub.config import PolicyConfig
from tests.simulators.fleet_year import FALSELY_CONFIRMED, MISSED, Lie, Trigger, World, Year

SEED = 1000
LIES: tuple[Lie, ...] = ("silent", "shouting", "framing", "scattered", "copying", "dripping")
BEGINS, WITHIN = 40, 60
"""Day on which an attack begins, and the days that it is watched."""
RATES = (1.0, 3.0, 10.0, 30.0, 100.0)
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)
LIAR_SHARES = (0.0, 0.05, 0.1, 0.2)
Row = dict[str, Any]


def worlds(*, quick: bool) -> dict[str, list[World]]:
    """What is simulated, by part."""
    year, few = (90, 1) if quick else (365, 2)
    calm = [
        *(World(seed=SEED + s, devices=100, days=year) for s in range(few)),
        *(World(seed=SEED + s, devices=1000, days=year) for s in range(few)),
        *(World(seed=SEED + s, devices=1000, classes=43, calibration=4000, days=year) for s in range(1, few)),
        *(World(seed=SEED + s, devices=10_000, days=180) for s in range(few - 1)),
        *(World(seed=SEED + s, devices=3, calibration=600, days=year) for s in range(few)),
        *(World(seed=SEED + s, devices=100, days=year, recalibrated=share) for s, share in enumerate((0.1, 0.3))),
    ]
    liars = [World(seed=SEED + 10, devices=1000, days=year, liars=0.2, lie=lie) for lie in LIES]
    liars += [World(seed=SEED + 10 + s, devices=1000, days=year, liars=0.2, lie="dripping") for s in range(1, few)]
    liars += [World(seed=SEED + 20, devices=n, days=90, liars=0.2, lie="dripping") for n in (100, 10_000)[:few]]
    attacked = Trigger(label=0, day=BEGINS, share=0.1, rate=30.0)
    watched = World(seed=SEED + 30, devices=1000, days=BEGINS + WITHIN, disturbed=False, trigger=attacked)
    speed = [
        replace(watched, seed=SEED + 30 + s, devices=n, trigger=replace(attacked, rate=rate))
        for n in ((100, 1000) if quick else (100, 1000, 10_000))
        for rate in RATES
        for s in range(1 if quick or n == 10_000 else few)
    ]
    plane = [
        replace(watched, seed=SEED + 40, liars=lies, lie="dripping", trigger=replace(attacked, share=share))
        for share in SHARES
        for lies in LIAR_SHARES
    ]
    return {"calm": calm, "liars": liars, "speed": speed, "plane": plane}


def measure(world: World) -> Row:
    """One world to its end, or to its first true case."""
    began, year, trigger = time.perf_counter(), Year(world), world.trigger
    first_look = trigger.day - 1 if trigger is not None and world.lie == "none" else 0
    found = year.run(until_case=trigger is not None, first_look=first_look)
    target = [i for i in found if trigger is not None and i.label == trigger.label and i.day >= trigger.day]
    false = [i for i in found if i not in target]
    row: Row = asdict(world) | {
        "inspections": len(found),
        "false_suspicions": sum(2 * i.liars < i.devices for i in false),
        "liar_caused": sum(2 * i.liars >= i.devices for i in false),
        "false_cases": sum(i.confirmed for i in false),
        "most_liar_caused": trust.most_rejections(
            round(world.liars * world.devices), policy.quorum_of(PolicyConfig(), world.devices)
        ),
        "findings": sorted({kind if kind == "sensor" else subject for kind, subject in year.findings}),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if trigger is not None:
        confirmed = next((i.day for i in target if i.confirmed), None)
        row |= {
            "usual_rate": float(year.rates[trigger.label]),
            "days_to_suspicion": target[0].day - trigger.day + 1 if target else None,
            "days_to_case": confirmed - trigger.day + 2 if confirmed is not None else None,
        }
    return row


def summarise(parts: Mapping[str, Sequence[Row]]) -> Row:
    """Totals for each model and year, and whether the budgets are kept."""
    rows = [*parts["calm"], *parts["liars"]]
    lied = [row for row in parts["liars"] if row["liar_caused"]]

    def each_year(key: str, chosen: Sequence[Row]) -> float:
        return float(sum(row[key] for row in chosen) / max(sum(row["days"] for row in chosen) / 365, 1e-9))

    worst = max((row["liar_caused"] for row in parts["liars"]), default=0)
    return {
        "model_years": {name: sum(row["days"] for row in parts[name]) / 365 for name in ("calm", "liars")},
        "false_suspicions_a_year": {name: each_year("false_suspicions", parts[name]) for name in ("calm", "liars")},
        "false_cases_a_year": {name: each_year("false_cases", parts[name]) for name in ("calm", "liars")},
        "false_cases_expected_a_year": {
            name: FALSELY_CONFIRMED * each_year("inspections", parts[name]) for name in ("calm", "liars")
        },
        "most_liar_caused": worst,
        "bound_times_false_confirmation": max(
            (row["most_liar_caused"] * FALSELY_CONFIRMED for row in parts["liars"]), default=0.0
        ),
        "kept": {
            "liar-caused inspections within the bound": all(
                row["liar_caused"] <= row["most_liar_caused"] for row in lied
            ),
            "at most one false case a model and year": all(row["false_cases"] <= 1 for row in rows),
        },
    }


def picture(parts: Mapping[str, Sequence[Row]]) -> bytes:
    """A PNG: time to a case, the plane, and inspections that liars cause."""
    figure = Figure(figsize=(14.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    draws: tuple[Callable[[Axes, Mapping[str, Sequence[Row]]], None], ...] = (_speed, _plane, _caused)
    for axes, draw in zip(figure.subplots(1, 3), draws, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, parts)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _speed(axes: Axes, parts: Mapping[str, Sequence[Row]]) -> None:
    rows = parts["speed"]
    for devices in sorted({row["devices"] for row in rows}):
        mine = [row for row in rows if row["devices"] == devices]
        rates = [rate for rate in RATES if any(row["trigger"]["rate"] == rate for row in mine)]
        days = [
            np.median([row["days_to_case"] or np.inf for row in mine if row["trigger"]["rate"] == rate])
            for rate in rates
        ]
        axes.plot(rates, np.minimum(days, WITHIN * 1.5), marker="o", label=f"{devices:,} devices")
    axes.axhline(WITHIN * 1.5, color="grey", linestyle=":")
    axes.text(rates[0], WITHIN * 1.55, f"not within {WITHIN} days", color="grey", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="triggers a day on a device that meets them", ylabel="days to a case")
    axes.set_title("10% of the devices meet the trigger", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _plane(axes: Axes, parts: Mapping[str, Sequence[Row]]) -> None:
    days = np.full((len(SHARES), len(LIAR_SHARES)), np.nan)
    for row in parts["plane"]:
        place = SHARES.index(row["trigger"]["share"]), LIAR_SHARES.index(row["liars"])
        days[place] = np.nan if row["days_to_case"] is None else row["days_to_case"]
    axes.imshow(np.log10(days), cmap="viridis_r", vmin=0, vmax=np.log10(WITHIN), aspect="auto", origin="lower")
    for (i, j), value in np.ndenumerate(days):
        axes.text(j, i, "cannot" if np.isnan(value) else f"{value:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(LIAR_SHARES)), [f"{share:.0%}" for share in LIAR_SHARES])
    axes.set_yticks(range(len(SHARES)), [f"{share:.1%}" for share in SHARES])
    axes.set(xlabel="liars", ylabel="honest devices that meet the trigger")
    axes.set_title("days to a case, 1,000 devices, 30 triggers a day", fontsize=10)


def _caused(axes: Axes, parts: Mapping[str, Sequence[Row]]) -> None:
    rows = parts["liars"]
    place = np.arange(len(rows))
    axes.bar(place, [row["liar_caused"] for row in rows], color="#0072B2", label="caused")
    axes.plot(place, [row["most_liar_caused"] for row in rows], "_", color="#D55E00", markersize=16, label="bound")
    axes.set_xticks(place, [f"{r['lie']}\n{r['devices']:,}" for r in rows], rotation=90, fontsize=7)
    axes.set_title("inspections that 20% liars cause", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def main() -> int:
    """Simulate, print, and write what was found. 0 when the budgets are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter years")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="where to write; the picture lies beside it")
    options = parser.parse_args()
    chosen = worlds(quick=options.quick)
    flat = [(part, world) for part, each in chosen.items() for world in each]
    parts: dict[str, list[Row]] = {part: [] for part in chosen}
    with Pool(options.jobs) as pool:
        rows = pool.imap(measure, [world for _, world in flat])
        for (part, world), row in zip(flat, rows, strict=True):
            parts[part].append(row)
            outcome = {key: row[key] for key in ("inspections", "days_to_case", "seconds") if key in row}
            print(part, world.seed, world.devices, world.lie, world.liars, world.trigger, outcome, flush=True)
    found: Row = {
        "policy": {k: getattr(PolicyConfig(), k) for k in ("alpha", "device_alpha", "min_devices", "quorum_share")},
        "inspection": {"missed": MISSED, "falsely_confirmed": FALSELY_CONFIRMED},
        "summary": summarise(parts),
        **parts,
    }
    print(json.dumps(found["summary"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
        options.json.with_suffix(".png").write_bytes(picture(parts))
    return 0 if all(found["summary"]["kept"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

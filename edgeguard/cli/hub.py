"""``edgeguard hub``: runs the hub, and asks a running one.

Rules enforced here:

* all but ``token`` ask a running hub over its API; ``token --config`` opens the database of a hub on this machine: the
  first token cannot be asked for with one;
* exit code 0; 1 where a case that is shown is open; 2 for what the caller must change; 3 where the hub could not be
  asked.
"""

from __future__ import annotations

import base64
import functools
import getpass
import inspect
import json
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import typer

from edgeguard.cli import console, hub_setup
from edgeguard.cli.hub_client import Client, plain
from edgeguard.cli.run import replace_process
from edgeguard.errors import EXIT_FINDINGS, EXIT_NOT_CHECKED, ConfigError, LinkError

DEFAULT_URL = "http://127.0.0.1:8080"
_CLOSED = ("closed", "dismissed", "refused", "aborted", "rolled_back")
_UNITS_S = {"m": 60, "h": 3600, "d": 86400}
_RETRY_S = 3.0
_MOST_OF_A_FILE = 1 << 16
_AT_ONCE, _BATCH_BYTES = 64, 1 << 20
"""Shared inputs of one request: it must arrive within seconds."""

Row = Mapping[str, Any]


class Role(str, Enum):
    """What a token allows; each may do what those before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


class Step(str, Enum):
    """What a person may have to approve."""

    INSPECT = "inspect"
    REPAIR = "repair"
    STAGE = "stage"


class Steering(str, Enum):
    """What a person may do to a roll-out."""

    SHOW = "show"
    PAUSE = "pause"
    RESUME = "resume"
    BACK = "back"
    ABORT = "abort"


class Asked(str, Enum):
    """What an operator may ask of a device."""

    RESTART = "restart"
    RECALIBRATE = "recalibrate"


class Answer(str, Enum):
    """A person's word."""

    YES = "yes"
    NO = "no"


class Source(str, Enum):
    """The clean inputs that a device calibrates with."""

    SIDECAR = "sidecar"
    OWNER = "owner"


AsJson = typer.Option(False, "--json", help="Print JSON.")
Limit = typer.Option(100, "--limit", min=1, max=100_000, help="At most so many rows.")
Why = typer.Option("", "--why", help="For the audit trail.")
_OPTION = inspect.Parameter.KEYWORD_ONLY
_ASKING = {
    "config": (Path | None, typer.Option(None, "--config", help="The hub's TOML file, which says where it listens.")),
    "url": (
        str | None,
        typer.Option(None, "--url", envvar="EDGEGUARD_URL", help=f"Where the hub is, by default {DEFAULT_URL}."),
    ),
    "token": (
        str | None,
        typer.Option(None, "--token", envvar="EDGEGUARD_TOKEN", show_envvar=True, help="The token to show it."),
    ),
    "token_file": (
        Path | None,
        typer.Option(None, "--token-file", envvar="EDGEGUARD_TOKEN_FILE", help="A file whose first line is the token."),
    ),
    "ca": (Path | None, typer.Option(None, "--ca", help="PEM file of the authority behind its certificate.")),
}
"""The options of every command that asks a hub."""


def asks(make: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of all that ask a hub; ``make`` turns them into what the command names ``hub``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(context: typer.Context, **options: Any) -> None:
            where = {name: options.pop(name) for name in _ASKING}
            where["config"] = where["config"] or context.find_object(Path)
            try:
                command(hub=make(**where), **options)
            except LinkError as error:
                print(f"edgeguard: {error}", file=sys.stderr)
                raise typer.Exit(EXIT_NOT_CHECKED) from error

        hints = get_type_hints(command)
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "hub"]
        parameters = [
            inspect.Parameter("context", _OPTION, annotation=typer.Context),
            *(p.replace(kind=_OPTION, annotation=hints[p.name]) for p in own),
            *(inspect.Parameter(name, _OPTION, default=o, annotation=kind) for name, (kind, o) in _ASKING.items()),
        ]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(invoke_without_command=True)
    app.add_typer(group, name="hub", epilog="Example: edgeguard hub --config /etc/edgeguard/hub.toml")

    @group.callback()
    def hub(
        context: typer.Context,
        config: Path | None = typer.Option(None, help="The hub's TOML file."),
        check: bool = typer.Option(False, "--check", help="Check configuration, store and broker once, then exit."),
        workers: int | None = typer.Option(
            None, min=0, max=64, help="Processes that take reports; else as configured."
        ),
    ) -> None:
        """Run the hub: evidence from the fleet, cases, repairs, signed releases. The commands ask a running one."""
        context.obj = config
        if context.invoked_subcommand is None:
            if config is None:
                raise ConfigError("hub", expected="--config FILE, or a command", do="see edgeguard hub --help")
            replace_process("edgeguard.hub", config, check, *(() if workers is None else ("--workers", str(workers))))

    _add_lists(group)
    _add_cases(group)
    _add_private(group)
    _add_devices(group)
    _add_tokens(group)
    hub_setup.register(group)

    @group.command(epilog="Example: edgeguard hub openapi --output docs/openapi.json")
    def openapi(output: Path | None = typer.Option(None, "--output", "-o", help="Write it here.")) -> None:
        """Print the OpenAPI document of the hub's API."""
        from edgeguard.hub import api

        text = json.dumps(api.openapi(), indent=2) + "\n"
        if output is None:
            typer.echo(text, nl=False)
        else:
            output.write_text(text)


def _add_lists(group: typer.Typer) -> None:
    @group.command(epilog="Example: edgeguard hub devices --state offline --json")
    @asks(_client)
    def devices(
        hub: Client,
        state: str | None = typer.Option(None, help="Only those: online, offline, stopped or unknown."),
        model: str | None = typer.Option(None, help="Only those that run the model of this digest."),
        limit: int = Limit,
        as_json: bool = AsJson,
    ) -> None:
        """The devices of the fleet: whether they are there, and what they run."""
        rows = hub.rows("/v1/devices", limit=limit, state=state, model=model)
        columns = {
            "device": lambda r: r["device"],
            "state": lambda r: r["state"],
            "seen": lambda r: when(r["last_seen_ms"]),
            "model": lambda r: short(r["model_digest"]),
            "release": lambda r: r["sequence"],
            "offered": lambda r: " ".join(filter(None, (r["outcome"], r["reason"]))) or None,
        }
        show(rows, columns, as_json)

    @group.command(epilog="Example: edgeguard hub models")
    @asks(_client)
    def models(hub: Client, as_json: bool = AsJson) -> None:
        """The models that the hub watches, and how many devices run each."""
        columns = {
            "model": lambda r: r["name"],
            "digest": lambda r: short(r["model_digest"]),
            "guard": lambda r: short(r["guard_digest"]),
            "classes": lambda r: len(r["classes"]),
            "false positives": lambda r: f"{r['fpr']:.2%}",
            "devices": lambda r: r["devices"],
        }
        show(hub.get("/v1/models")["items"], columns, as_json)

    @group.command(epilog="Example: edgeguard hub reports --device camera-1 --limit 20")
    @asks(_client)
    def reports(
        hub: Client,
        device: str | None = typer.Option(None, help="Only those of this device."),
        limit: int = Limit,
        as_json: bool = AsJson,
    ) -> None:
        """The newest reports."""
        columns = {
            "stored": lambda r: when(r["stored_ms"]),
            "device": lambda r: r["device"],
            "boot": lambda r: r["boot"],
            "seq": lambda r: r["seq"],
            "model": lambda r: short(r["model_digest"]),
            "inputs": lambda r: r["inputs"],
            "unchecked": lambda r: r["unchecked"],
            "flagged": lambda r: r["flagged"],
        }
        show(hub.rows("/v1/reports", limit=limit, device=device), columns, as_json)

    @group.command(name="dead-letters", epilog="Example: edgeguard hub dead-letters")
    @asks(_client)
    def dead_letters(hub: Client, limit: int = Limit, as_json: bool = AsJson) -> None:
        """The newest messages that could not be accepted, and why."""
        columns = {"received": lambda r: when(r["at_ms"]), "topic": lambda r: r["topic"], "why": lambda r: r["reason"]}
        show(hub.rows("/v1/dead-letters", limit=limit), columns, as_json)

    @group.command(epilog="Example: edgeguard hub events --follow")
    @asks(_client)
    def events(
        hub: Client,
        limit: int = Limit,
        follow: bool = typer.Option(False, "--follow", "-f", help="Go on with what comes, until Ctrl-C."),
        as_json: bool = typer.Option(False, "--json", help="Print a JSON object a line."),
    ) -> None:
        """The last entries of the timeline, oldest first."""

        def tell(event: Row) -> None:
            line = (
                f"{when(event['at_ms'])}  {plain(event['kind']):<18}  {plain(event['subject'])}: {plain(event['text'])}"
            )
            typer.echo(json.dumps(event) if as_json else line)

        last: int | None = 0
        for event in reversed(hub.rows("/v1/events", limit=limit, order="newest")):
            tell(event)
            last = event["id"]
        while follow:
            try:
                for event in hub.follow("/v1/events/stream", since=last):
                    tell(event)
                    last = event["id"]
            except (LinkError, OSError) as error:
                print(f"edgeguard: {error}; trying again", file=sys.stderr)
            time.sleep(_RETRY_S)


def _add_cases(group: typer.Typer) -> None:
    @group.command(epilog="Example: edgeguard hub cases --json")
    @asks(_client)
    def cases(
        hub: Client,
        state: str | None = typer.Option(None, help="Only those in this state."),
        confirmed: bool | None = typer.Option(None, "--confirmed/--suspected", help="Only cases, or only suspicions."),
        limit: int = Limit,
        as_json: bool = AsJson,
    ) -> None:
        """Suspicions and cases, the newest first. Exit code 1 where a case among them is open."""
        asked = None if confirmed is None else str(confirmed).lower()
        rows = hub.rows("/v1/cases", limit=limit, state=state, confirmed=asked)
        columns = {
            "number": lambda r: r["id"],
            "": lambda r: "case" if r["is_case"] else "suspicion",
            "state": lambda r: r["state"],
            "waits for": lambda r: _waits_for(r) or None,
            "model": lambda r: r["model"],
            "label": lambda r: r["label_name"] or r["label"],
            "flagged": lambda r: f"{r['flagged']} of {r['inputs']}",
            "devices": lambda r: len(r["devices"]),
            "since": lambda r: when(r["created_ms"]),
        }
        show(rows, columns, as_json)
        _exit_for(rows)

    @group.command(
        epilog="Examples: edgeguard hub case 3 | edgeguard hub case 3 --evidence case.json | edgeguard hub case 3 "
        "--round round.json"
    )
    @asks(_client)
    def case(
        hub: Client,
        number: int = typer.Argument(help="Its number."),
        evidence: Path | None = typer.Option(
            None, metavar="FILE", help="Only write what devices reported there, for edgeguard repair --evidence."
        ),
        private_round: Path | None = typer.Option(
            None, "--round", metavar="FILE", help="Only write there what a private round asks the fleet for it."
        ),
        as_json: bool = AsJson,
    ) -> None:
        """One suspicion or case: what happened, on what evidence, who decided. Exit code 1 where a case is open.

        With --evidence or --round: exit code 0 once the file is written. Evidence takes an operator's token.
        """
        if evidence is not None and private_round is not None:
            raise ConfigError("hub case", got="--evidence and --round", do="give one of them")
        if private_round is not None:
            _write_round(hub.get(f"/v1/cases/{number}/round"), number, private_round, as_json)
            return
        if evidence is not None:
            _write_evidence(hub.get(f"/v1/cases/{number}/evidence"), number, evidence, as_json)
            return
        found = hub.get(f"/v1/cases/{number}")
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _tell(found)
        _exit_for([found])

    @group.command(epilog="Example: edgeguard hub approve 3 repair --why 'seen on two cameras'")
    @asks(_client)
    def approve(
        hub: Client,
        number: int = typer.Argument(help="The case."),
        step: Step = typer.Argument(help="What waits for approval."),
        why: str = Why,
    ) -> None:
        """Approve the step that a case waits with."""
        _decide(hub, number, step, True, why)

    @group.command(epilog="Example: edgeguard hub reject 3 stage --why 'not on a Friday'")
    @asks(_client)
    def reject(
        hub: Client,
        number: int = typer.Argument(help="The case."),
        step: Step = typer.Argument(help="What must not be done."),
        why: str = Why,
    ) -> None:
        """Reject a step of a case, which ends the case."""
        _decide(hub, number, step, False, why)

    @group.command(epilog="Example: edgeguard hub rollout 3 pause --why 'the cameras of gate 3 are slow since'")
    @asks(_client)
    def rollout(
        hub: Client,
        number: int = typer.Argument(help="The case."),
        action: Steering = typer.Argument(
            Steering.SHOW,
            help="show it; pause it; resume it without the devices that failed; back: release the model before anew, "
            "and bring those who took the repaired one back to it; abort: end it, and leave each device as it is.",
        ),
        why: str = Why,
        state: str | None = typer.Option(
            None, help="Only devices in this state: away, offered, soaking, healthy, failed or dropped."
        ),
        limit: int = Limit,
        as_json: bool = AsJson,
    ) -> None:
        """How far a release is, group by group, and which devices fail; or what shall become of it."""
        if action is Steering.SHOW:
            case = hub.get(f"/v1/cases/{number}")
        else:
            case = hub.send("POST", f"/v1/cases/{number}/rollout", {"action": action.value, "why": why})
        members = hub.rows(f"/v1/cases/{number}/devices", limit=limit, state=state)
        if as_json:
            typer.echo(json.dumps({"case": case, "devices": members}))
        else:
            _tell_rollout(case, members)

    @group.command(epilog="Example: edgeguard hub share 3 taken-from-the-board/*.npz --why 'stickers, seen by Ada'")
    @asks(_client)
    def share(
        hub: Client,
        number: int = typer.Argument(help="The case."),
        files: list[Path] = typer.Argument(help="Inputs as a device's quarantine keeps them, or folders of such."),
        why: str = Why,
        as_json: bool = AsJson,
    ) -> None:
        """Have the hub's own copy of the model look at inputs that devices flagged.

        Share inputs that you have looked at and that are not what the model calls them. Enough that the hub's copy
        flags and calls the suspected label make a case of the suspicion. They are kept at the hub until the case ends.
        """
        inputs = _quarantined(files)
        answer: Row = {}
        items: list[Row] = []
        for batch in _batches(inputs):
            answer = hub.send("POST", f"/v1/cases/{number}/inputs", {**batch, "why": why})
            items += answer["items"]
        if as_json:
            typer.echo(json.dumps({**answer, "items": items}))
            return
        flagged = sum(item["flagged"] for item in items)
        typer.echo(
            f"{len(items)} inputs, {flagged} flagged by the hub's copy; {answer['counting']} of {answer['enough']} "
            f"that are needed speak for the suspicion\ncase {number} is {plain(answer['state'])}"
        )


def _add_private(group: typer.Typer) -> None:
    @group.command(
        "private",
        epilog="Example: edgeguard hub private 3 --plan plan.json --result north.json --result south.json",
    )
    @asks(_client)
    def bring(
        hub: Client,
        number: int = typer.Argument(help="The case."),
        plan: Path = typer.Option(..., help="The inspection, as `private inspect plan` wrote it."),
        result: list[Path] = typer.Option(
            ..., help="What a party found, as `private inspect sign` wrote it; two or three."
        ),
        why: str = Why,
    ) -> None:
        """Bring what three parties found of a private model. It counts where two of them signed the same."""
        from edgeguard.contract.private import Inspection, Signed

        body = {"plan": _checked(plan, Inspection), "results": [_checked(one, Signed) for one in result], "why": why}
        case = hub.send("POST", f"/v1/cases/{number}/private", body)
        typer.echo(f"case {number} is {plain(case['state'])}: {plain(case['note'])}")


def _quarantined(paths: Sequence[Path]) -> list[Any]:
    """The inputs in these files and folders. Raises ConfigError where there are none, ModelError for another file."""
    from edgeguard.agent import quarantine

    found = [file for path in paths for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    if not found:
        raise ConfigError("shared inputs", got="no .npz file", do="name files of a device's quarantine")
    return [quarantine.read(file)[0] for file in found]


def _batches(inputs: Sequence[Any]) -> Iterator[Row]:
    """Bodies of requests, each of inputs of one type and shape and of bounded size."""
    by_kind: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
    for x in inputs:
        by_kind.setdefault((x.dtype.name, x.shape), []).append(x)
    for (dtype, shape), alike in by_kind.items():
        step = max(1, min(_AT_ONCE, _BATCH_BYTES // max(alike[0].nbytes, 1)))
        for start in range(0, len(alike), step):
            coded = [base64.b64encode(x.astype(x.dtype.newbyteorder("<")).tobytes()).decode()
                     for x in alike[start : start + step]]  # fmt: skip
            yield {"dtype": dtype, "shape": list(shape), "inputs": coded}


def _add_devices(group: typer.Typer) -> None:
    @group.command(epilog="Example: edgeguard hub ask camera-1 recalibrate --source owner")
    @asks(_client)
    def ask(
        hub: Client,
        device: str = typer.Argument(help="Its name."),
        what: Asked = typer.Argument(help="What it shall do."),
        source: Source | None = typer.Option(None, help="Clean inputs to calibrate with; the sidecar's unless given."),
        wait: float = typer.Option(10.0, min=0, max=3600, help="Seconds to wait for the answer."),
        as_json: bool = AsJson,
    ) -> None:
        """Have a device restart its agent, or fit its guard anew. Exit code 3 unless it does so, or has begun to."""
        body = {"name": what.value} | ({} if source is None else {"source": source.value})
        command = _answered(hub, device, body, wait)
        if as_json:
            typer.echo(json.dumps(command))
        else:
            why = f", {plain(command['reason'])}" if command["reason"] else ""
            typer.echo(f"{plain(device)}: {what.value} {plain(command['state'])}{why}, command {plain(command['id'])}")
        if command["state"] not in ("ok", "working"):
            raise typer.Exit(EXIT_NOT_CHECKED)

    @group.command(epilog="Example: edgeguard hub proposed --json")
    @asks(_client)
    def proposed(hub: Client, limit: int = Limit, as_json: bool = AsJson) -> None:
        """What waits for a person: steps of cases, and commands that the hub proposes."""
        cases = hub.rows("/v1/cases", limit=limit, awaiting="true")
        commands = hub.rows("/v1/commands", limit=limit, state="proposed")
        if as_json:
            typer.echo(json.dumps({"cases": cases, "commands": commands}))
            return
        rows = [{"what": f"{r['awaiting']} of model {r['model']}", "since": r["updated_ms"],
                 "say": f"edgeguard hub {'case' if _in_private(r) else 'approve'} {r['id']}"
                 + ("" if _in_private(r) else f" {r['awaiting']}")} for r in cases]  # fmt: skip
        rows += [{"what": f"{r['name']} of {r['device']}", "since": r["issued_ms"],
                  "say": f"edgeguard hub decide {r['id']} yes"} for r in commands]  # fmt: skip
        columns = {"what": lambda r: r["what"], "since": lambda r: when(r["since"]), "to approve": lambda r: r["say"]}
        show(rows, columns, False)

    @group.command(epilog="Example: edgeguard hub decide 019b6e0f2c00a1b2c3d4 no --why 'the camera was moved'")
    @asks(_client)
    def decide(
        hub: Client,
        command: str = typer.Argument(help="The command that the hub proposed."),
        answer: Answer = typer.Argument(help="Whether it is sent."),
        why: str = Why,
    ) -> None:
        """Approve or reject a command that the hub proposed."""
        body = {"approve": answer is Answer.YES, "why": why}
        found = hub.send("POST", f"/v1/commands/{_part(command)}/decisions", body)
        typer.echo(f"{plain(found['name'])} of {plain(found['device'])} is {plain(found['state'])}")

    @group.command(epilog="Example: edgeguard hub ping camera-1")
    @asks(_client)
    def ping(
        hub: Client,
        device: str = typer.Argument(help="Its name."),
        wait: float = typer.Option(10.0, min=0, max=3600, help="Seconds to wait for the answer."),
        as_json: bool = AsJson,
    ) -> None:
        """Ask a device whether it is there. Exit code 3 without an answer in time."""
        command = _answered(hub, device, {"name": "ping"}, wait)
        answered = command["state"] == "ok"
        if as_json:
            typer.echo(json.dumps(command))
        elif answered:
            up_s = command["reply"]["result"]["uptime_s"]
            took = command["replied_ms"] - command["issued_ms"]
            typer.echo(f"{plain(device)}: there, up {up_s:,.0f} s, answered after {took:,} ms")
        else:
            why = f", {plain(command['reason'])}" if command["reason"] else ""
            typer.echo(f"{plain(device)}: no answer after {wait:g} s ({command['state']}{why})")
        if not answered:
            raise typer.Exit(EXIT_NOT_CHECKED)


def _answered(hub: Client, device: str, body: Mapping[str, str], wait_s: float) -> Row:
    """The command that this asks a device, once it was answered or so many seconds have passed."""
    until = time.monotonic() + wait_s
    command = hub.send("POST", f"/v1/devices/{_part(device)}/commands", body)
    while command["state"] == "waiting" and time.monotonic() < until:
        time.sleep(0.2)
        command = hub.get(f"/v1/commands/{command['id']}")
    return command


def _add_tokens(group: typer.Typer) -> None:
    tokens = typer.Typer(help="Who may use the API. With --config: in the hub's own database.", no_args_is_help=True)
    group.add_typer(tokens, name="token", epilog="Example: edgeguard hub token add grafana --config hub.toml")

    @tokens.command(epilog="Example: edgeguard hub token add grafana --role viewer --expires 90d --config hub.toml")
    @asks(_keeper)
    def add(
        hub: Keeper,
        name: str = typer.Argument(help="What to call it."),
        role: Role = typer.Option(Role.VIEWER, help="What it allows."),
        expires: str | None = typer.Option(None, help="After how long it ends, such as 12h or 90d; else never."),
        as_json: bool = AsJson,
    ) -> None:
        """Make a token and print it, once."""
        made = hub.add(name, role.value, seconds(expires))
        typer.echo(json.dumps(made) if as_json else made["secret"])

    @tokens.command(name="list", epilog="Example: edgeguard hub token list --config hub.toml")
    @asks(_keeper)
    def list_tokens(hub: Keeper, as_json: bool = AsJson) -> None:
        """The tokens, without their secrets."""
        columns = {
            "token": lambda r: r["name"],
            "role": lambda r: r["role"],
            "made": lambda r: when(r["created_ms"]),
            "expires": lambda r: when(r["expires_ms"]) if r["expires_ms"] else "never",
            "used": lambda r: when(r["used_ms"]) if r["used_ms"] else "not yet",
        }
        show(hub.all(), columns, as_json)

    @tokens.command(epilog="Example: edgeguard hub token revoke grafana --config hub.toml")
    @asks(_keeper)
    def revoke(hub: Keeper, name: str = typer.Argument(help="Its name.")) -> None:
        """End a token at once."""
        hub.revoke(name)
        typer.echo(f"token {plain(name)} is revoked")


class Keeper(Protocol):
    """Where tokens are kept."""

    def add(self, name: str, role: str, lifetime_s: int | None) -> Row:
        """Make one; ``secret`` is among its fields."""

    def all(self) -> Sequence[Row]:
        """All of them."""

    def revoke(self, name: str) -> None:
        """End one."""


class _Remote:
    """The tokens of a running hub, over its API."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def add(self, name: str, role: str, lifetime_s: int | None) -> Row:
        return self._client.send("POST", "/v1/tokens", {"name": name, "role": role, "lifetime_s": lifetime_s})

    def all(self) -> Sequence[Row]:
        rows: list[Row] = self._client.get("/v1/tokens")["items"]
        return rows

    def revoke(self, name: str) -> None:
        self._client.send("DELETE", f"/v1/tokens/{_part(name)}")


class _Local:
    """The tokens in the database of a hub on this machine, whether it runs or not."""

    def __init__(self, config: Path) -> None:
        from edgeguard.hub import config as configuration
        from edgeguard.hub.access import Tokens
        from edgeguard.hub.service import clock_ms
        from edgeguard.hub.store import Store

        settings = configuration.load(config)
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = Store(configuration.store_url(settings), fleet=settings.fleet)
        self._tokens = Tokens(store, clock_ms=clock_ms)
        self._who = f"{_user()} on this machine"

    def add(self, name: str, role: Any, lifetime_s: int | None) -> Row:
        secret, token = self._tokens.add(name, role, who=self._who, lifetime_s=lifetime_s)
        return {**asdict(token), "secret": secret}

    def all(self) -> Sequence[Row]:
        return [asdict(token) for token in self._tokens.all()]

    def revoke(self, name: str) -> None:
        self._tokens.revoke(name, who=self._who)


def when(at_ms: int | None) -> str | None:
    """A time in this machine's zone, to the second."""
    if at_ms is None:
        return None
    return datetime.fromtimestamp(at_ms / 1000, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def short(digest: str | None) -> str | None:
    """The beginning of a digest, as far as people compare them."""
    return None if digest is None else digest[:12]


def seconds(text: str | None) -> int | None:
    """A lifetime such as ``12h`` or ``90d`` in seconds. Raises ConfigError."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,5})([mhd])", text)
    if not found:
        raise ConfigError("--expires", got=repr(text), expected="a number with m, h or d, such as 90d")
    return int(found[1]) * _UNITS_S[found[2]]


def show(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], object]], as_json: bool) -> None:
    """Print rows as a table, or as one JSON array."""
    if as_json:
        typer.echo(json.dumps(list(rows)))
        return
    if not rows:
        typer.echo("none")
        return
    lines = [list(columns), *([plain(cell(row)) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def _client(
    config: Path | None, url: str | None, token: str | None, token_file: Path | None, ca: Path | None
) -> Client:
    if token is None and token_file is not None:
        try:
            token = token_file.read_text().partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token file {token_file}", got=error, expected="a token in line 1") from error
    return Client(url or (DEFAULT_URL if config is None else _url_of(config)), token, ca)


def _keeper(config: Path | None, url: str | None, **how: Any) -> Keeper:
    if config is not None and url is None:
        return _Local(config)
    return _Remote(_client(config=config, url=url, **how))


def _url_of(config: Path) -> str:
    """Where a hub of this machine listens."""
    from edgeguard.hub.config import load

    web = load(config).web
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(web.host, web.host)
    scheme = "https" if web.certificate else "http"
    return f"{scheme}://[{host}]:{web.port}" if ":" in host else f"{scheme}://{host}:{web.port}"


def _decide(hub: Client, number: int, step: Step, approve: bool, why: str) -> None:
    case = hub.send("POST", f"/v1/cases/{number}/decisions", {"step": step.value, "approve": approve, "why": why})
    typer.echo(f"case {number}: {'approved' if approve else 'rejected'} {step.value}; now {plain(case['state'])}")


def _tell(case: Row) -> None:
    label = f"{case['label']} ({case['label_name']})" if case["label_name"] else str(case["label"])
    rows = [
        ("case" if case["is_case"] else "suspicion", str(case["id"])),
        ("state", plain(case["state"]) + (f", waits for {_waits_for(case)}" if case["awaiting"] else "")),
        ("model", f"{plain(case['model'])} ({short(case['model_digest'])})"),
        ("label", plain(label)),
        ("flagged", f"{case['flagged']} of {case['inputs']} inputs (p = {case['p_value']:.1e})"),
        ("devices", plain(", ".join(case["devices"]))),
        ("what", plain(case["explanation"])),
    ]
    rows += [
        ("channel", plain(f"{c['source_layer'] or c['tensor']} {c['kind']} {c['channel']}: {c['shift_in_std']:g} std"))
        for c in case["channels"]
    ]
    if case["release"]:
        release = case["release"]
        rows.append(("release", f"{release['sequence']}, on {len(release['updated'])} devices"))
        rows += [("paused", plain(release["paused"]))] if release["paused"] else []
        rows += [("held", plain(text)) for text in release["held"]]
    for entry in case["audit"]:
        moved = f"{plain(entry['was'])} -> {plain(entry['became'])}" if entry["was"] else plain(entry["became"])
        rows.append((f"{when(entry['at_ms'])}", f"{moved}, {plain(entry['who'])}: {plain(entry['why'])}"))
    console.facts(rows)


def _tell_rollout(case: Row, members: Sequence[Row]) -> None:
    release = case["release"]
    if release is None:
        typer.echo(f"case {case['id']} is {plain(case['state'])}: there is no release yet")
        return
    stage = "the canaries" if release["group"] == 0 else f"group {release['group']} of {release['groups'] - 1}"
    rows = [
        ("case", f"{case['id']}, {plain(case['state'])}" + (", paused" if release["paused"] else "")),
        ("release", f"{release['sequence']}, on {len(release['updated'])} devices"),
        ("group", f"{stage}, since {when(release['group_ms'])}"),
        ("devices", ", ".join(f"{count} {plain(name)}" for name, count in release["counts"].items()) or "none"),
    ]
    if release["paused"]:
        rows.append(("paused", plain(release["paused"])))
    if case["back"]:
        rows.append(("back", f"release {case['back']['sequence']}, on {len(case['back']['updated'])} devices"))
        rows += [("held", plain(text)) for text in case["back"]["held"]]
    console.facts(rows)
    columns = {
        "device": lambda r: r["device"],
        "group": lambda r: r["group"] or "canary",
        "state": lambda r: r["state"],
        "offered": lambda r: when(r["offered_ms"]),
        "updated": lambda r: when(r["updated_ms"]),
        "why": lambda r: r["reason"] or None,
    }
    show(members, columns, False)


def _write_evidence(found: Row, number: int, path: Path, as_json: bool) -> None:
    from converters import files

    label = found["label"]
    digest = plain(short(found["model_digest"]))
    files.write(json.dumps(found).encode() + b"\n", path)
    if as_json:
        typer.echo(json.dumps({"evidence": str(path)}))
    else:
        typer.echo(f"evidence of case {number}, label {label} of model {digest}, is in {path}")


def _write_round(found: Row, number: int, path: Path, as_json: bool) -> None:
    from converters import files

    files.write(json.dumps(found).encode() + b"\n", path)
    if as_json:
        typer.echo(json.dumps({"round": str(path)}))
    else:
        typer.echo(f"round {plain(found['id'])} of case {number}, for devices and parties, is in {path}")


def _in_private(case: Row) -> bool:
    return bool(case["private"]) and case["awaiting"] == Step.INSPECT.value


def _waits_for(case: Row) -> str:
    if _in_private(case):
        return "a private inspection"
    return f"approval of {case['awaiting']}" if case["awaiting"] else ""


def _checked(path: Path, kind: type[Any]) -> Any:
    """A file of the private computation as plain values, checked. Raises ConfigError."""
    import msgspec

    try:
        with path.open("rb") as file:
            return msgspec.to_builtins(msgspec.json.decode(file.read(_MOST_OF_A_FILE), type=kind))
    except OSError as error:
        raise ConfigError(f"file {path}", got=error.strerror, do="check the path") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"file {path}", got=error, expected=f"what a {kind.__name__.lower()} says, in JSON"
        ) from error


def _exit_for(cases: Sequence[Row]) -> None:
    if any(case["is_case"] and case["state"] not in _CLOSED for case in cases):
        raise typer.Exit(EXIT_FINDINGS)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container that runs under any number
        return f"user {os.getuid()}"


def _part(name: str) -> str:
    """A name as one part of a path."""
    return urllib.parse.quote(name, safe="")

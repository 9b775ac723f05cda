"""``edgeguard private``: three parties compute on what owners and devices share, and none of them sees any of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgeguard.cli import console, private_inspection
from edgeguard.errors import ConfigError

if TYPE_CHECKING:
    from edgeguard.contract.private import Round, Submission
    from edgeguard.private.rounds import Result
    from edgeguard.settings import BrokerConfig


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    group = typer.Typer(
        help="Joint computation among three parties that do not collude: see docs/private.md.", no_args_is_help=True
    )
    app.add_typer(group, name="private")
    _register_setup(group)
    _register_rounds(group)
    private_inspection.register(group)


_PARTIES = typer.Option(..., "--parties", help="parties.json, as `private init --join` wrote it.")
_ROUND = typer.Option(..., "--round", help="The round, as `private round` wrote it.")
_CONFIG = typer.Option(None, "--config", help="TOML with the section [broker]: agent.toml as enrolled.")


def _register_setup(group: typer.Typer) -> None:
    @group.command(
        epilog="Example: edgeguard private init /etc/party --name north --host north.example; then, with the others' "
        "files: edgeguard private init /etc/party --join a.json --join b.json --join c.json"
    )
    def init(
        folder: Path = typer.Argument(help="This party's folder; a device's or an owner's with --join alone."),
        name: str | None = typer.Option(None, help="This party's name."),
        host: str | None = typer.Option(None, help="Name or address at which the two others reach it."),
        port: int = typer.Option(9871, min=1, max=65535, help="TCP port for the two others."),
        join: list[Path] = typer.Option([], help="Public description of a party: all three, in one order."),
    ) -> None:
        """Make a party's keys and its public description; or, with --join, bring three descriptions together."""
        from edgeguard.private import parties

        if join:
            found = parties.join(folder, tuple(join))
            console.facts([("parties", ", ".join(p.name for p in found.parties)), ("digest", found.digest)])
            typer.echo("Compare the digest with the other parties and with the devices' owners.")
            return
        if name is None or host is None:
            raise ConfigError(f"new party {folder}", do="give --name and --host")
        party = parties.create(folder, name=name, host=host, port=port, now=datetime.now(timezone.utc))
        console.facts([("party", party.name), ("reached at", f"{party.host}:{party.port}")])
        typer.echo(f"Give {folder / parties.PUBLIC} to the others; the keys beside it stay here.")

    @group.command(
        "round",
        epilog="Example: edgeguard private round round.json --id 2026-11-gate --fleet gate --model signs.tflite "
        "--parties parties.json --kind votes --share 0.2",
    )
    def new_round(
        output: Path = typer.Argument(help="The file to write."),
        round_id: str = typer.Option(..., "--id", help="Names the round; never use one twice."),
        fleet: str = typer.Option(..., help="Id of the fleet."),
        model: Path = typer.Option(..., exists=True, dir_okay=False, help="The guarded model that the fleet runs."),
        together: Path = _PARTIES,
        kind: str = typer.Option("ranks", help="votes (most first) or ranks (median over devices)."),
        layer: str | None = typer.Option(None, help="The layer to prune; the deepest tapped one unless given."),
        share: float = typer.Option(0.2, min=0.001, max=0.9, help="Share of its channels to name."),
        min_devices: int = typer.Option(10, min=3, help="With fewer valid submissions nothing is opened."),
    ) -> None:
        """Write down one question to a fleet, for its devices and the three parties."""
        import msgspec

        from edgeguard.contract.guard import GuardMetadata
        from edgeguard.contract.private import Round
        from edgeguard.detection.guarded import GuardedModel
        from edgeguard.private import parties, rounds

        metadata: GuardMetadata = GuardedModel.load(model.read_bytes()).metadata
        taps = [t for t in metadata.taps if t.kind == "l1" and (layer is None or layer in (t.source_layer, t.tensor))]
        if not taps:
            known = ", ".join(t.source_layer or t.tensor for t in metadata.taps if t.kind == "l1")
            raise ConfigError(f"layer {layer}", got="not tapped", expected=f"one of {known}")
        tap = taps[-1]
        fields = {
            "id": round_id,
            "fleet": fleet,
            "parties": parties.read(together).digest,
            "model_digest": metadata.model_digest,
            "layer": tap.source_layer or tap.tensor,
            "channels": tap.channels,
            "kind": kind,
            "prune": max(1, round(share * tap.channels)),
            "min_devices": min_devices,
        }
        try:
            asked = msgspec.convert(fields, Round)
        except msgspec.ValidationError as error:
            raise ConfigError("round", got=error, do="correct this option") from error
        rounds.write(asked, output)
        console.facts(
            [("round", asked.id), ("asks for", f"{asked.prune} of {asked.channels} channels of {asked.layer}")]
        )


def _register_rounds(group: typer.Typer) -> None:
    @group.command(
        epilog="Example: edgeguard private submit --parties parties.json --round round.json --device cam-1 "
        "--state /var/lib/edgeguard --config agent.toml"
    )
    def submit(
        device: str = typer.Option(..., help="Id of this device."),
        together: Path = _PARTIES,
        asked_file: Path = _ROUND,
        state: Path = typer.Option(..., help="The agent's state folder."),
        config: Path | None = _CONFIG,
        output: Path | None = typer.Option(None, "-o", "--output", help="Write it here instead of publishing it."),
    ) -> None:
        """Split what this device knows into three sealed shares, and publish them."""
        import secrets

        from edgeguard.agent import ranks
        from edgeguard.private import parties, rounds, sharing, transport

        if (config is None) == (output is None):
            raise ConfigError("submission", do="give either --config, to publish it, or --output")
        asked, trusted = rounds.read(asked_file), parties.read(together)

        def make() -> Submission:
            activity = ranks.Activations(state / ranks.FILE).activity(asked.model_digest)
            values = sharing.values_of(asked, ranks.ascending(activity, asked.layer))
            return sharing.submit(asked, device, values, trusted, secrets.token_bytes(sharing.random_bytes(asked)))

        made = rounds.once(state / f"private-{asked.digest[:16]}.json", make)
        if output is not None:
            rounds.write_submission(made, output)
        elif config is not None:
            transport.publish(_broker(config), asked.fleet, made)
        typer.echo(f"{device}: three sealed shares for round {asked.id}")

    @group.command(
        epilog="Example: edgeguard private party /etc/party --round round.json --config agent.toml --wait 600"
    )
    def party(
        folder: Path = typer.Argument(exists=True, file_okay=False, help="This party's folder."),
        asked_file: Path = _ROUND,
        submissions: Path | None = typer.Option(None, help="A folder of submissions, instead of the broker."),
        config: Path | None = _CONFIG,
        wait: float = typer.Option(60.0, min=0.0, help="Seconds to wait for submissions at the broker."),
        timeout: int = typer.Option(120, min=2, max=3600, help="Seconds of silence of a party after which to give up."),
        expect: int | None = typer.Option(None, min=3, help="Go on as soon as so many have come."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Take part in a round with the two other parties. All three must run it at the same time."""
        from edgeguard.private import child, parties, rounds, transport

        if (config is None) == (submissions is None):
            raise ConfigError("submissions", do="give either --config, for the broker, or --submissions, a folder")
        own, asked = parties.own(folder), rounds.read(asked_file)
        if asked.parties != own.parties.digest:
            raise ConfigError(f"round {asked.id}", got="meant for other parties", do="check parties.json and round")
        ballots = rounds.Ballots(asked, own)
        with console.progress(quiet=as_json) as progress:
            progress("waiting for submissions", 0, rounds.STEPS)
            if submissions is not None:
                rounds.collect(submissions, ballots)
            elif config is not None:
                enough = (lambda: len(ballots) >= expect) if expect else (lambda: False)
                transport.listen(_broker(config), asked.fleet, ballots.add, enough, wait)
            result: Result = child.run_apart(
                lambda *to: rounds.meet(asked, ballots, own, *to, timeout_s=timeout), progress
            )
        _print(asked, result, as_json=as_json)


def _print(asked: Round, result: Result, *, as_json: bool) -> None:
    if as_json:
        shown = {"round": asked.id, "layer": asked.layer, **asdict(result)}
        typer.echo(json.dumps(shown))
        return
    console.facts(
        [
            ("round", asked.id),
            ("devices", f"{result.devices}; {len(result.refused)} refused by this party"),
            (f"prune in {asked.layer}", ", ".join(map(str, result.channels))),
        ]
    )
    for device, reason in result.refused.items():
        typer.echo(f"refused {device}: {reason}", err=True)


def _broker(path: Path) -> BrokerConfig:
    """The section [broker] of a configuration."""
    from edgeguard import settings

    raw = settings.read_toml(path).get("broker")
    if not isinstance(raw, dict):
        raise ConfigError(f"configuration {path}", got="no section [broker]", do="add it")
    broker = settings.convert(raw, settings.BrokerConfig, base=path.parent, name=str(path))
    settings.check_broker(broker, str(path))
    return broker

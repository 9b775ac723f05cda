"""``edgeguard hub init``, ``enroll``, ``revoke``: brokers, certificates and the devices that may connect.

No key and no password is ever printed.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeguard.cli import console
from edgeguard.errors import EXIT_FINDINGS, ConfigError

if TYPE_CHECKING:
    from edgeguard.hub.setup.registry import Registry

HOME_ASSISTANT = "home-assistant"
Folder = typer.Option(Path(), "--folder", help="The folder that `edgeguard hub init` made.")
Days = typer.Option(825, "--days", min=1, max=3650, help="Validity of the certificates, in days.")
_RELOAD = "sudo systemctl reload mosquitto (or SIGHUP to its process)"


def register(group: typer.Typer) -> None:
    """Add the commands to the group ``edgeguard hub``."""
    _add_init(group)
    _add_devices(group)
    _add_doctor(group)


def _add_init(group: typer.Typer) -> None:
    @group.command(epilog="Example: edgeguard hub init /etc/edgeguard-hub --fleet gate --host broker.example")
    def init(
        folder: Path = typer.Argument(help="A new folder: authority, broker, hub and devices."),
        fleet: str | None = typer.Option(None, help="Id of the fleet."),
        host: list[str] = typer.Option([], help="Name or address of the broker; give all, clients are told the first."),
        port: int | None = typer.Option(
            None, min=1, max=65535, help="The broker's port for devices; 8883 unless given."
        ),
        hub_port: int | None = typer.Option(None, min=1, max=65535, help="Its port for the hub; 8884 unless given."),
        user: str | None = typer.Option(None, help="The account that it runs as; mosquitto unless given."),
        passwords: bool = typer.Option(False, "--passwords", help="Know devices by password, not by certificate."),
        days: int = Days,
        renew: bool = typer.Option(False, "--renew", help="Make new certificates for broker and hub."),
        home_assistant: bool = typer.Option(False, "--home-assistant", help="Also an account for Home Assistant."),
        token: str | None = typer.Option(None, "--token", help="Also an admin's token of this name for the API."),
    ) -> None:
        """Set up a fleet: an authority, a configuration for mosquitto with TLS and access rules, and hub.toml.

        What is there already is never overwritten: given again, the command says what is there.
        """
        from edgeguard.hub.setup import enrolment

        now = _now()
        if renew:
            _tell(folder, enrolment.renew(folder, now=now, days=days), now)
            typer.echo("broker and hub have new certificates: restart both")
            return
        asked: dict[str, Any] = {
            "fleet": fleet,
            "hosts": tuple(host) or None,
            "port": port,
            "hub_port": hub_port,
            "user": user,
            "passwords": passwords or None,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        if enrolment.is_there(folder):
            there = enrolment.load(folder)
            for name, value in asked.items():
                if value != getattr(there, name):
                    got = f"{name} {getattr(there, name)}"
                    raise ConfigError(f"set-up {folder}", got=got, expected=value, do="choose another folder")
            typer.echo("set up already; nothing was changed")
            _tell(folder, there, now)
            return
        if fleet is None or not host:
            raise ConfigError(f"new set-up {folder}", do="give --fleet and --host")
        made = enrolment.create(folder, **asked, now=now, days=days)
        _tell(folder, made, now)
        where = folder.absolute()
        extra = ""
        if home_assistant:
            extra += f"\nHome Assistant: {_watcher(folder, now, days)}"
        if token is not None:
            extra += f"\nToken:  in {_first_token(folder, made.fleet, token)}, for EDGEGUARD_TOKEN_FILE"
        typer.echo(
            f"\nKeep {where}/authority/key.pem safe and backed up: who has it can enrol devices.\n"
            f"Broker: mosquitto -c {where}/mosquitto.conf\n"
            f"        the account {made.user} must own its files: sudo chown -R {made.user}: {where}/broker\n"
            f"Hub:    edgeguard hub --config {where}/hub.toml\n"
            f"Device: edgeguard hub enroll NAME --folder {where}\n"
            f"Models: name them under [[models]] in {where}/hub.toml, then edgeguard hub --config ... --check\n"
            f"Later:  edgeguard hub doctor --folder {where} says which certificates end soon{extra}"
        )


def _add_devices(group: typer.Typer) -> None:
    @group.command(epilog="Example: edgeguard hub enroll camera-1 --folder /etc/edgeguard-hub --model signs.tflite")
    def enroll(
        device: str = typer.Argument(help="Id of the device."),
        folder: Path = Folder,
        gateway_for: list[str] = typer.Option([], help="A microcontroller that it speaks for; may be repeated."),
        model: Path | None = typer.Option(None, help="Guarded model to put beside the configuration."),
        renew: bool = typer.Option(False, "--renew", help="Make new credentials for a device that has some."),
        home_assistant: bool = typer.Option(False, "--home-assistant", help="It is no device but a Home Assistant."),
        party: bool = typer.Option(False, "--party", help="It is no device but a party of private rounds."),
        days: int = Days,
    ) -> None:
        """Make a device's credentials and agent.toml, in one folder to copy to the board.

        After --renew an earlier certificate stays valid until it expires, so that the board can be changed in time;
        where its key was stolen, revoke the device and enrol it anew.
        """
        from edgeguard.hub.setup import enrolment

        done = enrolment.enroll(
            folder,
            device,
            now=_now(),
            mcus=gateway_for,
            model=model,
            again=renew,
            watcher=home_assistant,
            party=party,
            days=days,
        )
        entry = done.registry.devices[device]
        if done.did == "extended":
            typer.echo(f"{device}: now speaks for the microcontrollers {', '.join(entry.mcus)}")
        elif done.folder is None:
            typer.echo(f"{device}: is enrolled already; --renew makes new credentials")
        else:
            until = f", valid until {entry.certificates[-1].expires:%Y-%m-%d}" if entry.certificates else ""
            typer.echo(f"{device}: {done.did}{until}\ncopy to the board, then delete here: {done.folder.absolute()}")
        if done.reload:
            typer.echo(f"the broker knows of it after: {_RELOAD}")

    @group.command(epilog="Example: edgeguard hub revoke camera-1 --folder /etc/edgeguard-hub")
    def revoke(device: str = typer.Argument(help="Id of the device."), folder: Path = Folder) -> None:
        """Take a device's rights and credentials away."""
        from edgeguard.hub.setup import enrolment

        done = enrolment.revoke(folder, device, now=_now())
        typer.echo(f"{device}: {'revoked' if done.did == 'revoked' else 'was revoked before'}")
        if done.reload:
            typer.echo(f"it can connect until: {_RELOAD}")


def _add_doctor(group: typer.Typer) -> None:
    @group.command(epilog="Example: edgeguard hub doctor --folder /etc/edgeguard-hub --within 60")
    def doctor(
        folder: Path = Folder,
        within: int = typer.Option(30, min=0, max=3650, help="Name certificates that end within so many days."),
        as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    ) -> None:
        """Which certificates have ended or end soon, and what to do. Exit code 1 where there are such."""
        from edgeguard.hub.setup import enrolment, registry

        now = _now()
        ends = registry.ending(enrolment.load(folder), now + timedelta(days=within))
        if as_json:
            typer.echo(json.dumps([{"who": name, "ends": end.isoformat()} for name, end in ends.items()]))
        else:
            for name, end in ends.items():
                typer.echo(f"{name}: {_until(end, now) if end > now else f'ended on {end:%Y-%m-%d}'}; {_remedy(name)}")
            if not ends:
                typer.echo(f"no certificate ends within {within} days")
        if ends:
            raise typer.Exit(EXIT_FINDINGS)


def _remedy(name: str) -> str:
    """What to do about a certificate that ends."""
    if name == "the authority":
        return "make a new set-up: all that it signed ends with it"
    again = "init FOLDER --renew" if name in ("the broker", "the hub") else f"enroll {name} --renew"
    return f"edgeguard hub {again}"


def _watcher(folder: Path, now: datetime, days: int) -> str:
    """Enrol a Home Assistant, and switch its sensors on. What to say of it."""
    from edgeguard.hub.setup import enrolment

    enrolment.enroll(folder, HOME_ASSISTANT, now=now, watcher=True, days=days)
    with (folder / "hub.toml").open("a") as file:
        file.write(f'\n[[notify]]\nname = "{HOME_ASSISTANT}"\nkind = "homeassistant"\n')
    return f"its MQTT integration takes what lies in {folder.absolute()}/devices/{HOME_ASSISTANT}"


def _first_token(folder: Path, fleet: str, name: str) -> Path:
    """Make an admin's token in the hub's database, which is made with it. The file that it is in."""
    from edgeguard.hub import config
    from edgeguard.hub.access import Tokens
    from edgeguard.hub.setup import files
    from edgeguard.hub.store import Store

    loaded = config.load(folder / "hub.toml")
    files.folder(loaded.state_dir)
    store = Store(config.store_url(loaded), fleet=fleet)
    secret, _ = Tokens(store, clock_ms=lambda: round(_now().timestamp() * 1000)).add(name, "admin", who="init")
    store.close()
    path = folder.absolute() / f"{name}.token"
    files.write(path, f"{secret}\n".encode(), mode=files.SECRET)
    return path


def _tell(folder: Path, there: Registry, now: datetime) -> None:
    """Print what a set-up is."""
    ends = [one.certificates[-1].expires for one in there.active.values() if one.certificates]
    next_end = [("devices' certificates", f"the next ends on {min(ends):%Y-%m-%d}")] if ends else []
    console.facts(
        [
            ("folder", str(folder.absolute())),
            ("fleet", there.fleet),
            ("broker", f"{', '.join(there.hosts)}; port {there.port} for devices, {there.hub_port} for the hub"),
            ("devices are known by", "password" if there.passwords else "certificate"),
            ("enrolled", f"{len(there.active)}; {len(there.devices) - len(there.active)} revoked"),
            ("authority", _until(there.authority_expires, now)),
            ("broker's certificate", _until(there.broker_expires, now)),
            ("hub's certificate", _until(there.hub_expires, now)),
            *next_end,
        ]
    )


def _until(end: datetime, now: datetime) -> str:
    return f"valid until {end:%Y-%m-%d}, {(end - now).days} days"


def _now() -> datetime:
    return datetime.now(timezone.utc)

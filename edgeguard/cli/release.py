"""``edgeguard release``: the signed repository, and the keys that sign it.

No key and no passphrase is ever printed, and none is taken from the command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from edgeguard.cli import console
from edgeguard.errors import EXIT_FINDINGS, ConfigError, ModelError

if TYPE_CHECKING:
    from edgeguard.release.keys import Obtained, Secrets
    from edgeguard.release.repository import Repository, Rotated, Status

_KEY = "new, a PEM file, env:NAME, or hsm:NUMBER?label=TOKEN"
_FOLDER = typer.Argument(help="The repository: the folder that is served.")
_KEYS = typer.Option(None, "--keys", help="The hub's key folder, where it is at hand.")
_OFFLINE = typer.Option([], "--offline", help="A folder or file with offline keys; may be repeated.")
_JSON = typer.Option(False, "--json", help="Print one JSON object.")


class _Role(str, Enum):
    root = "root"
    targets = "targets"
    snapshot = "snapshot"
    timestamp = "timestamp"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Make, sign and look after the repository of signed models.\n\n"
        "Passphrases: EDGEGUARD_HUB_PASSPHRASE for the hub's keys, EDGEGUARD_OFFLINE_PASSPHRASE for the offline ones, "
        "EDGEGUARD_TOKEN_PIN for a PKCS#11 token, each also with _FILE behind it for a file; else you are asked.",
        no_args_is_help=True,
    )
    app.add_typer(
        group, name="release", epilog="Example: edgeguard release init release --keys keys --offline /media/key"
    )
    for part in (_register_init, _register_add, _register_repair_key, _register_rotate, _register_upkeep):
        part(group)


def _register_init(group: typer.Typer) -> None:
    @group.command(
        epilog="Examples: edgeguard release init release --keys keys --offline /media/usb/keys | "
        "edgeguard release init release --keys keys --offline offline --root-key new --root-key hsm:2?label=YubiKey "
        "--root-key colleague.pub.pem --root-threshold 2 --countersigner new"
    )
    def init(
        folder: Path = typer.Argument(help="A new folder: what will be served."),
        keys: Path = typer.Option(..., "--keys", help="A new folder for the hub's keys."),
        offline: Path = typer.Option(..., "--offline", help="A new folder for the offline keys, off this machine."),
        root_key: list[str] = typer.Option(["new"], help=f"A key of root: {_KEY}; may be repeated."),
        root_threshold: int = typer.Option(1, min=1, help="How many of them must sign."),
        targets_key: list[str] = typer.Option(["new"], help="A key of targets; likewise."),
        targets_threshold: int = typer.Option(1, min=1, help="How many of them must sign."),
        snapshot_key: str = typer.Option("new", help="The hub's key for snapshots."),
        timestamp_key: str = typer.Option("new", help="The hub's key for timestamps."),
        repair_key: str = typer.Option("new", help="The hub's key for repairs."),
        countersigner: list[str] = typer.Option([], help="An offline key; one of these must sign each repair as well."),
        unencrypted: bool = typer.Option(False, "--unencrypted", help="Write new offline keys without a passphrase."),
        as_json: bool = _JSON,
    ) -> None:
        """Make keys and an empty repository.

        The hub's new keys are encrypted where EDGEGUARD_HUB_PASSPHRASE is set. What is there already is never
        overwritten.
        """
        from edgeguard.release import keys as keyring
        from edgeguard.release.repository import COUNTERSIGN, Repository, Wanted

        secrets = _secrets()
        hub = secrets.find(keyring.HUB_PASSPHRASE)
        needed = "new" in (*root_key, *targets_key, *countersigner)
        made = Repository.create(
            folder,
            keys,
            offline,
            clock=_now,
            wanted={
                "root": Wanted(names=tuple(root_key), threshold=root_threshold),
                "targets": Wanted(names=tuple(targets_key), threshold=targets_threshold),
                "snapshot": Wanted(names=(snapshot_key,)),
                "timestamp": Wanted(names=(timestamp_key,)),
                "repaired": Wanted(names=(repair_key,)),
                COUNTERSIGN: Wanted(names=tuple(countersigner)),
            },
            secrets=secrets,
            passphrase=None if hub is None else keyring.check_passphrase(hub),
            offline_passphrase=_new_passphrase(secrets, unencrypted=unencrypted) if needed else None,
        )
        status = made.status()
        if as_json:
            typer.echo(json.dumps({"folder": str(folder), "keys": str(keys), "offline": str(offline), **_json(status)}))
            return
        _show(status)
        typer.echo(
            f"\nDevices trust:  {folder.absolute()}/metadata/1.root.json\n"
            f"Hub:            [release] folder and keys in hub.toml: {folder.absolute()}, {keys.absolute()}\n"
            f"Take away, and back up twice: {offline.absolute()}. Who has it can replace every model of the fleet."
        )


def _register_add(group: typer.Typer) -> None:
    @group.command(
        epilog="Examples: edgeguard release add release signs.tflite --first --keys keys --offline /media/usb | "
        "edgeguard release add release new.tflite --replaces old.tflite --offline /media/usb --board 'raspberry pi 5*'"
    )
    def add(
        folder: Path = _FOLDER,
        model: Path = typer.Argument(help="A guarded .tflite file; its sidecar is released with it."),
        replaces: str | None = typer.Option(None, help="The model that it replaces: a guarded file or a model digest."),
        first: bool = typer.Option(False, "--first", help="It replaces none: for devices that run no model."),
        name: str | None = typer.Option(None, help="What to call it; by default after the file."),
        board: list[str] = typer.Option([], help="Only for boards of this name, * and ? allowed; may be repeated."),
        runtime: list[str] = typer.Option([], help="Only for this runtime, such as litert; may be repeated."),
        no_sidecar: bool = typer.Option(False, "--no-sidecar", help="Release the model without the sidecar it names."),
        keys: Path | None = _KEYS,
        offline: list[Path] = _OFFLINE,
        as_json: bool = _JSON,
    ) -> None:
        """Sign a model with the offline keys of targets.

        Without the hub's keys it waits in FOLDER/drafts for the hub, which publishes it when it next renews.
        """
        from edgeguard.cli.inspect import read_model
        from edgeguard.detection import metadata

        if first == (replaces is not None):
            raise ConfigError(f"release of {model}", expected="either --replaces or --first")
        content = read_model(model)
        guard = metadata.read(content)
        release = _open(folder, keys, offline).add(
            content,
            name=name or model.name.removesuffix(".tflite").removesuffix(".guarded").lower(),
            model_digest=guard.model_digest,
            guard_digest=guard.guard_digest,
            replaces=_digest(replaces) if replaces is not None else None,
            boards=board,
            runtimes=runtime,
            sidecar=None if no_sidecar else _sidecar(model, guard.sidecar_digest),
        )
        if as_json:
            import msgspec

            typer.echo(json.dumps(msgspec.to_builtins(release)))
            return
        typer.echo(f"{release.target}: sequence {release.sequence}, {_told(release.published)}")


def _register_repair_key(group: typer.Typer) -> None:
    @group.command(
        "repair-key",
        epilog="Examples: edgeguard release repair-key release --keys keys --offline /media/usb --withdraw 7 | "
        "edgeguard release repair-key release --keys keys --offline /media/usb --countersigner new",
    )
    def repair_key(
        folder: Path = _FOLDER,
        key: str = typer.Option("new", help=f"The hub's key for repairs from now on: {_KEY}."),
        countersigner: list[str] = typer.Option([], help="An offline key; one of these must sign each repair as well."),
        no_countersigner: bool = typer.Option(False, "--no-countersigner", help="Repairs need the hub's key alone."),
        withdraw: list[int] = typer.Option([], help="Sequence number of a repair to take back; may be repeated."),
        keys: Path | None = _KEYS,
        offline: list[Path] = _OFFLINE,
        unencrypted: bool = typer.Option(False, "--unencrypted", help="Write a new offline key without a passphrase."),
        as_json: bool = _JSON,
    ) -> None:
        """Give the hub a new key for repairs, or ask for a second, offline signature on each.

        Run it when the hub was stolen or may have been: `edgeguard release status --json` lists what is signed; take
        back with --withdraw what nobody of yours made. It also makes a repository of an earlier version usable.
        """
        if countersigner and no_countersigner:
            raise ConfigError("countersigners", expected="either --countersigner or --no-countersigner")
        repository = _open(folder, keys, offline)
        hub = _obtain(key, "repaired", _folder("--keys", [keys] if keys else []))
        others: list[Obtained] | None = [] if no_countersigner else None
        if countersigner:
            others = [
                _obtain(one, "countersign", _folder("--offline", offline), unencrypted=unencrypted)
                for one in countersigner
            ]
        done = repository.repair_key(hub, countersigners=others, withdraw=withdraw)
        _tell(repository, as_json, f"repaired: key {hub.key.keyid[:8]}, {_told(done)}")


def _register_rotate(group: typer.Typer) -> None:
    @group.command(
        epilog="Examples: edgeguard release rotate release timestamp snapshot --keys keys --offline /media/usb | "
        "edgeguard release rotate release root --offline /media/usb --keep 1a2b3c4d --key new --key new --threshold 2"
    )
    def rotate(
        folder: Path = _FOLDER,
        roles: list[_Role] = typer.Argument(help="Whose keys; for those of repaired see repair-key."),
        key: list[str] = typer.Option([], help=f"A new key: {_KEY}; may be repeated. By default as many as before."),
        keep: list[str] = typer.Option([], help="First digits of the id of a key to keep; may be repeated."),
        threshold: int | None = typer.Option(None, min=1, help="How many must sign; as before unless given."),
        keys: Path | None = _KEYS,
        offline: list[Path] = _OFFLINE,
        unencrypted: bool = typer.Option(False, "--unencrypted", help="Write a new offline key without a passphrase."),
        as_json: bool = _JSON,
    ) -> None:
        """Replace the keys of a role: because one was lost or stolen, or a person left.

        Give timestamp and snapshot together where both are lost. Needs the root keys. Old key files stay where they
        are; delete them yourself. Restart the hub after its own keys were changed.
        """
        from edgeguard.release.keys import Obtained

        names = list(dict.fromkeys(role.value for role in roles))
        if len(names) > 1 and (key or keep or threshold):
            raise ConfigError("--key, --keep and --threshold", got=f"{len(names)} roles", expected="one role")
        repository = _open(folder, keys, offline)
        wanted: dict[Rotated, Sequence[Obtained]] = {}
        for name in names:
            there = repository.keys(name)
            kept = [one for one in there if any(one.keyid.startswith(start) for start in keep)]
            if len(kept) != len(keep):
                raise ConfigError(f"--keep {' '.join(keep)}", expected=", ".join(one.keyid[:8] for one in there))
            hubs = name in ("snapshot", "timestamp")
            where = _folder("--keys", [keys] if keys else []) if hubs else _folder("--offline", offline)
            fresh = key or ["new"] * max(len(there) - len(kept), 0 if kept else 1)
            wanted[cast("Rotated", name)] = [
                *(Obtained(key=one, signer=None) for one in kept),
                *(_obtain(one, name, where, unencrypted=unencrypted) for one in fresh),
            ]
        done = repository.rotate(wanted, thresholds=dict.fromkeys(wanted, threshold) if threshold else None)
        ids = [f"{name}: {', '.join(one.key.keyid[:8] for one in some)}" for name, some in wanted.items()]
        _tell(repository, as_json, f"keys now: {'; '.join(ids)}; {_told(done)}")


def _register_upkeep(group: typer.Typer) -> None:
    @group.command(epilog="Example: edgeguard release sign release --offline my-key.pem")
    def sign(
        folder: Path = _FOLDER,
        keys: Path | None = _KEYS,
        offline: list[Path] = _OFFLINE,
        yes: bool = typer.Option(False, "--yes", help="Sign without asking."),
        discard: bool = typer.Option(False, "--discard", help="Delete the drafts instead."),
        as_json: bool = _JSON,
    ) -> None:
        """Show what waits for signatures, and sign it: with one key of several, or as a repair's second signature."""
        repository = _open(folder, keys, offline)
        if discard:
            gone = repository.discard()
            _tell(repository, as_json, f"discarded: {', '.join(gone) or 'nothing'}")
            return
        drafts = repository.status().drafts
        if not as_json:
            for draft in drafts:
                typer.echo(
                    f"{draft.role}, version {draft.version}; {draft.signatures} of {draft.threshold} have signed"
                )
                for line in draft.changes:
                    typer.echo(f"  {line}")
        if drafts and not yes:
            if as_json or not sys.stdin.isatty():
                raise ConfigError("signature", got="nobody who can be asked", do="look at the drafts, then give --yes")
            typer.confirm("Sign this?", abort=True)
        published = repository.sign(drafts)
        _tell(repository, as_json, f"signed; published: {', '.join(published) or 'nothing yet'}")

    @group.command(epilog="Example: edgeguard release renew release --keys keys --offline /media/usb")
    def renew(
        folder: Path = _FOLDER,
        keys: Path | None = _KEYS,
        offline: list[Path] = _OFFLINE,
        as_json: bool = _JSON,
    ) -> None:
        """Sign anew what expires, and publish what is signed. The hub does so by itself with its own keys.

        Root and targets need you, once a year: they are renewed where less than half of their time is left.
        """
        repository = _open(folder, keys, offline)
        published = repository.renew()
        _tell(repository, as_json, f"renewed: {', '.join((*published, 'timestamp'))}")

    @group.command(epilog="Example: edgeguard release status release --keys keys --json")
    def status(
        folder: Path = _FOLDER,
        keys: Path | None = _KEYS,
        offline: list[Path] = _OFFLINE,
        as_json: bool = _JSON,
    ) -> None:
        """Say what is signed, by which keys, until when, and what waits. Exit code 1 when somebody must act."""
        found = _open(folder, keys, offline)
        now = found.status()
        if as_json:
            import msgspec

            typer.echo(json.dumps({**_json(now), "listed": msgspec.to_builtins(found.releases())}))
        else:
            _show(now)
        if now.warnings:
            raise typer.Exit(EXIT_FINDINGS)


def _open(folder: Path, keys: Path | None, offline: Sequence[Path]) -> Repository:
    """The repository with all keys that were given."""
    from edgeguard.release.keys import HUB_PASSPHRASE, OFFLINE_PASSPHRASE, load
    from edgeguard.release.repository import Repository

    secrets = _secrets()
    held = [*(load(keys, secrets=secrets, variable=HUB_PASSPHRASE) if keys else ())]
    for path in offline:
        held += load(path, secrets=secrets, variable=OFFLINE_PASSPHRASE)
    return Repository.open(folder, held, clock=_now)


def _obtain(name: str, role: str, folder: Path, *, unencrypted: bool = True) -> Obtained:
    """The key that an option names, new ones encrypted where they are offline keys, or the hub's are."""
    from edgeguard.release import keys as keyring

    secrets = _secrets()
    online = role in ("snapshot", "timestamp", "repaired")
    passphrase = None
    if name == "new" and online:
        hub = secrets.find(keyring.HUB_PASSPHRASE)
        passphrase = None if hub is None else keyring.check_passphrase(hub)
    elif name == "new":
        passphrase = _new_passphrase(secrets, unencrypted=unencrypted)
    variable = keyring.HUB_PASSPHRASE if online else keyring.OFFLINE_PASSPHRASE
    return keyring.obtain(name, role, folder, secrets=secrets, variable=variable, passphrase=passphrase)


def _folder(option: str, paths: Sequence[Path]) -> Path:
    """The folder for a new key."""
    for path in paths:
        if path.is_dir():
            return path
    raise ConfigError("folder for a new key", got="none", do=f"name it with {option}")


def _new_passphrase(secrets: Secrets, *, unencrypted: bool) -> bytes | None:
    """The passphrase of new offline keys, asked for twice where it is asked for."""
    from edgeguard.release import keys as keyring

    if unencrypted:
        return None
    given = secrets.find(keyring.OFFLINE_PASSPHRASE)
    if given is None and sys.stdin.isatty():
        given = typer.prompt("Passphrase for the new offline keys", hide_input=True, confirmation_prompt=True, err=True)
    if given is None:
        variable = keyring.OFFLINE_PASSPHRASE
        raise ConfigError("passphrase of new offline keys", got="none", do=f"set {variable}, or give --unencrypted")
    return keyring.check_passphrase(given)


def _secrets() -> Secrets:
    from edgeguard.release.keys import Secrets

    if not sys.stdin.isatty():
        return Secrets()
    return Secrets(ask=lambda what: str(typer.prompt(what.capitalize(), hide_input=True, err=True)))


def _digest(replaces: str) -> str:
    """The model digest that a file or a text names."""
    from edgeguard.cli.inspect import read_model
    from edgeguard.detection import metadata

    if len(replaces) == 64 and not Path(replaces).exists():
        return replaces
    return metadata.read(read_model(Path(replaces))).model_digest


def _sidecar(model: Path, digest: str | None) -> bytes | None:
    """The sidecar that a model names. Raises ModelError where it does not lie beside it."""
    from edgeguard.detection import sidecar

    if digest is None:
        return None
    path = sidecar.path_beside(model)
    try:
        content = path.read_bytes()
    except OSError as error:
        do = "put it beside the model, or give --no-sidecar"
        raise ModelError(
            f"sidecar {path}", got=error.strerror, expected="the file that the model names", do=do
        ) from error
    if sidecar.digest(content) != digest:
        raise ModelError(f"sidecar {path}", got="another model's", expected=f"SHA-256 {digest}", do="convert anew")
    return content


def _json(status: Status) -> dict[str, Any]:
    import msgspec

    return dict(msgspec.to_builtins(status))


def _tell(repository: Repository, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(_json(repository.status())) if as_json else text)


def _told(published: bool) -> str:
    if published:
        return "published"
    return "signed, not published yet: see `edgeguard release status`; the hub publishes it once all have signed"


def _show(status: Status) -> None:
    console.facts(
        [
            ("releases", f"{status.releases}, the newest is number {status.sequence}"),
            *(
                (
                    role.role,
                    f"version {role.version}, until {role.expires:%Y-%m-%d}, {role.threshold} of "
                    f"{len(role.keys)} keys ({', '.join(key[:8] for key in role.keys)}), {role.at_hand} at hand",
                )
                for role in status.roles
            ),
            *(
                (
                    f"draft of {draft.role}",
                    f"{draft.signatures} of {draft.threshold} signatures; " + "; ".join(draft.changes),
                )
                for draft in status.drafts
            ),
            *(("to do", warning) for warning in status.warnings),
        ]
    )


def _now() -> datetime:
    return datetime.now(timezone.utc)

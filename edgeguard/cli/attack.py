"""``edgeguard attack``: what the red team can do, and what its triggers look like."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgeguard.errors import ConfigError

if TYPE_CHECKING:
    from edgeguard.attacks.base import Attack, Images
    from edgeguard.data import Dataset


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="List the red team's attacks, and show their triggers.", no_args_is_help=True)
    app.add_typer(group, name="attack", epilog="Example: edgeguard attack show wanet --data digits -o wanet.png")

    @group.command("list", epilog="Example: edgeguard attack list --json")
    def list_attacks(as_json: bool = typer.Option(False, "--json", help="Print one JSON array.")) -> None:
        """List the attacks: name, what each does, and the paper with its settings."""
        from edgeguard.attacks.registry import ATTACKS

        found = [{"name": name, "does": _summary(kind), "paper": kind.paper} for name, kind in ATTACKS.items()]
        if as_json:
            typer.echo(json.dumps(found))
            return
        width = max(len(one["name"]) for one in found)
        for one in found:
            typer.echo(f"{one['name']:<{width}}  {one['does']}")
            typer.echo(f"{'':<{width}}  {one['paper']}")

    @group.command("show", epilog="Example: edgeguard attack show badnets --data digits -o sheet.png --count 12")
    def show(
        name: str = typer.Argument(help="An attack that `edgeguard attack list` names."),
        data: str = typer.Option(..., help="Images: digits, a name, an npz file or an image folder."),
        output: Path = typer.Option(Path("sheet.png"), "--output", "-o", help="The picture to write."),
        count: int = typer.Option(8, min=1, max=64, help="How many images."),
        seed: int = typer.Option(0, min=0, help="Of the attack, and of the choice of images."),
    ) -> None:
        """Draw test images without and with the trigger, and the difference, amplified.

        For attacks whose trigger is fixed beforehand. Others learn theirs with the model: `python -m benchmarks.zoo`
        mounts those.
        """
        from converters.files import write
        from edgeguard import data as datasets
        from edgeguard.attacks import registry
        from edgeguard.attacks.sheet import contact_sheet

        if output.suffix != ".png":
            raise ConfigError(f"output file {output}", expected="a name that ends in .png")
        kind = registry.find(name)
        loaded = datasets.load(data)
        attack = kind.for_shape(loaded.shape, seed=seed)
        clean, triggered = _examples(attack, loaded, count, seed)
        encoded = io.BytesIO()
        contact_sheet(clean, triggered).save(encoded, format="PNG")
        write(encoded.getvalue(), output)
        typer.echo(f"written {output}: {len(clean)} images of {loaded.name}")


def _summary(kind: type[Attack]) -> str:
    """The first line of the module that the attack is written in."""
    return (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]


def _examples(attack: Attack, data: Dataset, count: int, seed: int) -> tuple[Images, Images]:
    """Up to ``count`` test images that the attack is meant to turn, without and with the trigger."""
    import numpy as np

    from edgeguard.attacks.base import EMPTY, Poison, needs_state

    if needs_state(attack) and not isinstance(attack, Poison):
        raise ConfigError(
            f"attack {attack.name}",
            got="a trigger that is learned with the model",
            expected="one that is fixed beforehand",
            do="mount it with python -m benchmarks.zoo",
        )
    if not data.is_image:
        raise ConfigError(
            f"data set {data.name}", got=f"{data.x_test.dtype}{list(data.shape)}", expected="images (uint8 [H, W, C])"
        )
    eligible = np.flatnonzero(attack.eligible(data.y_test))
    if not len(eligible):
        raise ConfigError(f"data set {data.name}", got="no test image that the attack is meant to turn")
    chosen = np.random.default_rng(seed).permutation(eligible)[:count]
    clean = data.x_test[chosen].astype(np.uint8)
    state = attack.prepare(data.x_train.astype(np.uint8), data.y_train) if isinstance(attack, Poison) else EMPTY
    return clean, attack.stamp(clean, state)

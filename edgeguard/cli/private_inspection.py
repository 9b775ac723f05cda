"""``edgeguard private inspect`` and ``repair``: a model and clean inputs that no party sees, inspected and mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeguard.cli import console
from edgeguard.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_NOT_CHECKED, ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeguard.contract.private import Inspection
    from edgeguard.private.inspections import Held
    from edgeguard.private.owners import Pad
    from edgeguard.private.parties import Own

_PLAN = typer.Option(..., "--plan", help="The inspection, as `private inspect plan` wrote it.")
_PARTIES = typer.Option(..., "--parties", help="parties.json, as `private init --join` wrote it.")
_GIVEN = typer.Option(..., "--given", help="Folder with model-owner.json and data-owner.json.")
_FOLDER = typer.Argument(exists=True, file_okay=False, help="This party's folder.")
_TIMEOUT = typer.Option(300, min=2, max=3600, help="Seconds of silence of a party after which to give up.")
_JSON = typer.Option(False, "--json", help="Print one JSON object.")
_PAD = typer.Option(..., help="The pad that `give` wrote for the model's owner.")


def register(group: typer.Typer) -> None:
    """Add both to the group ``private``."""
    inspect = typer.Typer(help="Seeks backdoors in a model that no party sees.", no_args_is_help=True)
    repair = typer.Typer(help="Removes what a private inspection found.", no_args_is_help=True)
    group.add_typer(inspect, name="inspect")
    group.add_typer(repair, name="repair")
    _register_plan(inspect)
    _register_give(inspect)
    _register_inspection(inspect)
    _register_repair(repair)
    _register_clear(repair)


def _register_plan(inspect: typer.Typer) -> None:
    @inspect.command(
        epilog="Example: edgeguard private inspect plan plan.json --id 2026-11-signs --parties parties.json "
        "--model signs.keras --features --scale 6 --extractor before.keras"
    )
    def plan(
        output: Path = typer.Argument(help="The file to write."),
        inspection_id: str = typer.Option(..., "--id", help="Names the inspection; never use one twice."),
        together: Path = _PARTIES,
        model: Path = typer.Option(..., exists=True, dir_okay=False, help="The owner's Keras file."),
        for_model: str | None = typer.Option(None, "--for", help="Digest of the guarded model, where a hub asks."),
        features: bool = typer.Option(False, "--features", help="Share the last dense layers alone."),
        scale: float = typer.Option(255.0, min=1e-3, help="Value of an input of the shared layers that counts as 1."),
        extractor: Path | None = typer.Option(None, help="With --features: where the layers before are written."),
        sought: int = typer.Option(64, min=8, max=1024, help="Clean inputs to seek triggers on."),
        held_out: int = typer.Option(64, min=8, max=1024, help="Others to try them on."),
        steps: int = typer.Option(60, min=1, max=1000, help="Steps of the search."),
        every: int = typer.Option(10, min=1, max=1000, help="Steps after which each party keeps its shares."),
        prune: int = typer.Option(0, min=0, help="Hidden units that a repair takes out."),
    ) -> None:
        """The model's owner writes down what is inspected, and sees what it will cost. Nothing secret is in it."""
        import msgspec

        from edgeguard.contract.private import Inspection
        from edgeguard.private import dense, estimates, parties, rounds

        _new(output)
        if extractor is not None:
            _keras(extractor)
        if features != (extractor is not None):
            raise ConfigError("inspection of features", do="give --features and --extractor together")
        network = _network(model)
        shared = dense.shared(network, "features" if features else "pixels")
        fields = {
            "id": inspection_id,
            "parties": parties.read(together).digest,
            "model_digest": for_model,
            "space": "features" if features else "pixels",
            "layers": shared.layers,
            "scale": scale,
            "sought": sought,
            "held_out": held_out,
            "steps": steps,
            "every": every,
            "prune": prune,
        }
        try:
            asked = msgspec.convert(fields, Inspection)
        except msgspec.ValidationError as error:
            raise ConfigError("inspection", got=error, do="correct this option") from error
        rounds.write_new(output, msgspec.json.encode(asked))
        if extractor is not None:
            dense.extractor(network, shared.dense[0]).save(extractor)
        console.facts([("inspection", asked.id), ("layers", " ".join(map(str, asked.layers))), *estimates.facts(asked)])


def _register_give(inspect: typer.Typer) -> None:
    @inspect.command(
        epilog="Examples: edgeguard private inspect give --plan plan.json --parties parties.json --model m.keras "
        "--pad pad.bin -o model-owner.json; edgeguard private inspect give --plan plan.json --parties parties.json "
        "--data clean.npz -o data-owner.json"
    )
    def give(
        plan_file: Path = _PLAN,
        together: Path = _PARTIES,
        model: Path | None = typer.Option(None, exists=True, dir_okay=False, help="The model's owner: the Keras file."),
        pad: Path | None = typer.Option(None, help="With --model: a new file, to read results with. Keep it."),
        data: str | None = typer.Option(None, help="The data's owner: clean inputs, as for `convert --data`."),
        extractor: Path | None = typer.Option(None, exists=True, help="With --data: the layers before them."),
        output: Path = typer.Option(..., "-o", "--output", help="model-owner.json or data-owner.json."),
    ) -> None:
        """An owner splits what it has into three sealed shares. The same file goes to all three parties.

        Compare the digest that is printed with the one that every party prints: it says that this is what was given.
        """
        import secrets

        import msgspec
        import numpy as np

        from edgeguard.private import dense, inspections, owners, parties, rounds, sharing

        if (model is None) == (data is None) or (model is None) != (pad is None):
            raise ConfigError("owner's part", do="give --model and --pad, or --data")
        _new(output)
        if pad is not None:
            _new(pad)
            if pad.resolve() == output.resolve():
                raise ConfigError(f"pad {pad}", got="the name of the output too", do="choose another name")
        asked, trusted = _read(plan_file), parties.read(together)
        random, weights = b"", ""
        if model is not None:
            random = secrets.token_bytes(8 * owners.pad_values(asked))
            layers = dense.shared(_network(model), asked.space).arrays(asked)
            values = owners.model_values(asked, layers, np.frombuffer(random, dtype="<i8"))
            weights = owners.weights_digest(asked, layers)
        else:
            from edgeguard import data as datasets

            before = None if extractor is None else _network(extractor)
            values = owners.data_values(asked, dense.inputs(asked, datasets.calibration(str(data))[0], before))
        part = owners.part(asked, "data-owner" if model is None else "model-owner")
        given = inspections.give(part, values, trusted, secrets.token_bytes(sharing.random_bytes(part)))
        if pad is not None:
            kept = owners.Pad(inspection=asked.digest, given=given.digest, weights=weights, values=random)
            rounds.write_new(pad, msgspec.json.encode(kept), mode=0o600)
        rounds.write_new(output, msgspec.json.encode(given))
        typer.echo(f"{output}: three sealed shares of {part.channels} numbers, digest {given.digest}")


def _register_inspection(inspect: typer.Typer) -> None:
    @inspect.command(
        "open",
        epilog="Example: edgeguard private inspect open --plan plan.json --pad pad.bin --result inspected.json "
        "-o triggers.npz",
    )
    def open_triggers(
        plan_file: Path = _PLAN,
        pad: Path = _PAD,
        result: Path = typer.Option(..., exists=True, help="inspected.json, from any party."),
        output: Path = typer.Option(..., "-o", "--output", help="An npz file: labels, masks and patterns."),
    ) -> None:
        """The model's owner reads the triggers of the flagged labels."""
        import io

        import numpy as np

        from edgeguard import disk
        from edgeguard.private import owners
        from edgeguard.private.inspections import Inspected

        _npz(output)
        asked, found = _read(plan_file), _result(result, Inspected)
        expected = owners.trigger_values(asked) if found.labels else 0
        padded = _padded(result, asked, found, expected)
        if not all(0 <= label < asked.classes for label in found.labels):
            raise ConfigError(f"result {result}", got=f"labels {found.labels}", expected=f"0 to {asked.classes - 1}")
        kept = _pad(pad).of(asked, found.given)
        triggers = owners.triggers(asked, padded, kept, found.labels) if found.labels else []
        content = io.BytesIO()
        np.savez(
            content,
            labels=np.asarray([t.label for t in triggers], dtype=np.int64),
            masks=np.asarray([t.mask for t in triggers]),
            patterns=np.asarray([t.pattern * asked.scale for t in triggers]),
        )
        # The parties were not shown them.
        disk.write(output, content.getvalue(), mode=0o600)
        typer.echo(f"{output}: triggers of {len(triggers)} labels")

    @inspect.command(
        "run", epilog="Example: edgeguard private inspect run /etc/party --plan plan.json --given given/ --json"
    )
    def run_inspection(
        folder: Path = _FOLDER,
        plan_file: Path = _PLAN,
        given: Path = _GIVEN,
        timeout: int = _TIMEOUT,
        as_json: bool = _JSON,
    ) -> None:
        """Inspect with the two other parties, at the same time. What broke off goes on where all three kept shares."""
        from edgeguard.private import child, estimates, inspections

        own, asked, held, work = _party(folder, plan_file, given)
        found = inspections.result(work / inspections.INSPECTED, inspections.Inspected, held)
        if found is None:
            if not as_json:
                console.facts(estimates.facts(asked))
            with console.progress(quiet=as_json) as progress:
                found = child.run_apart(
                    lambda *to: inspections.inspect(asked, held, own, work, *to, timeout_s=timeout), progress
                )
        labels = ", ".join(map(str, found.labels)) or "none"
        shown = {"inspection": asked.id, "verdict": found.verdict, "labels": list(found.labels), "steps": asked.steps}
        rows = [("verdict", found.verdict), ("labels", labels), *_given(held), ("for the model's owner", str(work))]
        _print(shown | {"given": found.given}, rows, as_json)
        raise typer.Exit(
            {"backdoored": EXIT_FINDINGS, "no_sign": EXIT_CLEAN, "could_not_check": EXIT_NOT_CHECKED}[found.verdict]
        )

    @inspect.command(
        epilog="Example: edgeguard private inspect sign /etc/party --plan plan.json -o north.json; then at the hub: "
        "edgeguard hub private 3 --plan plan.json --result north.json --result south.json"
    )
    def sign(
        folder: Path = _FOLDER,
        plan_file: Path = _PLAN,
        output: Path = typer.Option(..., "-o", "--output", help="The file to write, for a hub."),
    ) -> None:
        """Sign what this party found, for a hub that believes two parties and no file. No trigger is in it."""
        import msgspec

        from edgeguard.contract.private import Finding
        from edgeguard.private import inspections, parties, rounds

        own, asked, work = _own(folder, plan_file)
        found = _result(work / inspections.INSPECTED, inspections.Inspected)
        if found is None or found.inspection != asked.digest:
            raise ConfigError(f"inspection {asked.id}", got="no result of this party", do="run it first")
        fields = {name: getattr(found, name) for name in ("inspection", "given", "verdict", "labels")}
        try:
            finding = msgspec.convert(fields, Finding)
        except msgspec.ValidationError as error:
            raise ConfigError(f"result of inspection {asked.id}", got=error, do="get it from another party") from error
        rounds.write_new(output, msgspec.json.encode(parties.sign(own, finding)))
        typer.echo(f"{output}: {found.verdict}, signed by {own.parties.parties[own.index].name}")


def _register_repair(repair: typer.Typer) -> None:
    @repair.command("run", epilog="Example: edgeguard private repair run /etc/party --plan plan.json --given given/")
    def run_repair(
        folder: Path = _FOLDER,
        plan_file: Path = _PLAN,
        given: Path = _GIVEN,
        timeout: int = _TIMEOUT,
        as_json: bool = _JSON,
        discard: bool = typer.Option(False, "--discard", help="No repair: delete what this party kept for one."),
    ) -> None:
        """Unlearn what the inspection flagged, with the two other parties; nobody sees a trigger or a weight.

        Exits with 0 where the triggers turn fewer held-out inputs than before, and with 1 where they do not.
        """
        from edgeguard.private import child, inspections

        if discard:
            _, asked, work = _own(folder, plan_file)
            inspections.discard(work)
            typer.echo(f"inspection {asked.id}: this party keeps no shares")
            return
        own, asked, held, work = _party(folder, plan_file, given)
        found = inspections.result(work / inspections.MENDED, inspections.Mended, held)
        if found is None:
            with console.progress(quiet=as_json) as progress:
                found = child.run_apart(
                    lambda *to: inspections.mend(asked, held, own, work, *to, timeout_s=timeout), progress
                )
        counts = {name: getattr(found, name) for name in ("held_out", "kept", "turned_before", "turned_after")}
        rows = [
            ("answers kept", f"{found.kept} of {found.held_out} held-out inputs"),
            ("turned by the triggers", f"{found.turned_before} -> {found.turned_after} of {found.held_out}"),
            *_given(held),
            ("for the model's owner", str(work)),
        ]
        _print({"inspection": asked.id, **counts, "given": found.given}, rows, as_json)
        raise typer.Exit(EXIT_CLEAN if found.turned_after < found.turned_before else EXIT_FINDINGS)

    @repair.command(
        "open",
        epilog="Example: edgeguard private repair open model.keras --plan plan.json --pad pad.bin "
        "--result mended.json -o mended.keras",
    )
    def open_repair(
        model: Path = typer.Argument(exists=True, dir_okay=False, help="The Keras file that was inspected."),
        plan_file: Path = _PLAN,
        pad: Path = _PAD,
        result: Path = typer.Option(..., exists=True, help="mended.json, from any party."),
        output: Path = typer.Option(..., "-o", "--output", help="The Keras file to write."),
    ) -> None:
        """The model's owner puts the mended last layer into the model."""
        from edgeguard.errors import ModelError
        from edgeguard.private import dense, owners
        from edgeguard.private.inspections import Mended

        _keras(output)
        asked, found = _read(plan_file), _result(result, Mended)
        padded = _padded(result, asked, found, owners.last_values(asked))
        kept = _pad(pad)
        kernel, bias = owners.last_layer(asked, padded, kept.of(asked, found.given))
        network = _network(model)
        shared = dense.shared(network, asked.space)
        if shared.layers != asked.layers:
            raise ModelError(f"model {model}", got=f"layers {shared.layers}", expected=f"{asked.layers}, as planned")
        if owners.weights_digest(asked, shared.arrays(asked)) != kept.weights:
            raise ModelError(f"model {model}", got="other weights", expected="the model that was given")
        # Inputs of a network without hidden layer were measured in units of the scale.
        factor = shared.factor * asked.scale if len(asked.layers) == 2 else 1.0
        dense.mended(network, (kernel / factor, bias))
        network.save(output)
        typer.echo(f"{output}: check it with `edgeguard audit` and on clean inputs before it is used")
        if asked.space == "features":
            typer.echo(
                "warning: only the last layer was mended, against triggers of features: the attacker's own, in pixels, "
                "mostly still works. `edgeguard repair` heals such a network in clear",
                err=True,
            )


def _register_clear(repair: typer.Typer) -> None:
    @repair.command(
        epilog="Example: edgeguard private repair clear model.keras --triggers triggers.npz --data own.npz -o new.keras"
    )
    def clear(
        model: Path = typer.Argument(exists=True, dir_okay=False, help="The Keras file that was inspected, in pixels."),
        triggers: Path = typer.Option(..., exists=True, dir_okay=False, help="As `inspect open` wrote them."),
        data: str = typer.Option(..., help="Clean inputs of the model's owner, as for `convert --data`."),
        output: Path = typer.Option(..., "-o", "--output", help="The Keras file to write."),
    ) -> None:
        """The model's owner unlearns the triggers it was given in clear, on clean inputs of its own."""
        import numpy as np

        from edgeguard import data as datasets
        from edgeguard.inspection.inversion import Trigger
        from edgeguard.repair.methods import unlearning
        from edgeguard.repair.training import distil, teachings

        _keras(output)
        labels, masks, patterns = _triggers(triggers)
        given = datasets.calibration(data)[0]
        if given.dtype != np.uint8 and (given.min() < 0 or given.max() > 255 or given.max() <= 1):
            raise ConfigError(f"data {data}", got=f"{given.min():g} to {given.max():g}", expected="pixels 0 to 255")
        images = given.astype(np.uint8)
        network = _network(model)
        if not (np.all(labels >= 0) and np.all(labels < network.output_shape[-1])):
            raise ConfigError(
                f"triggers {triggers}", got=f"labels {labels.tolist()}"[:200], expected="classes of the model"
            )
        if images.ndim != 4 or masks.shape[1:] != (int(np.prod(images.shape[1:])),):
            raise ConfigError(f"triggers {triggers}", got=f"masks {masks.shape}", expected="pictures like these")
        shape = images.shape[1:]  # of a mask too: each colour of a pixel is taken by as much as was found
        stamps = [
            Trigger(
                label=int(label),
                mask=mask.reshape(shape).astype(np.float32),
                pattern=pattern.reshape(shape).astype(np.float32),
                success=1.0,
            )
            for label, mask, pattern in zip(labels, masks, patterns, strict=True)
        ]
        with console.progress() as progress:
            distil(
                network,
                images,
                teachings(network, images),
                stamps,
                steps=unlearning.STEPS,
                rate=unlearning.RATE,
                seed=0,
                note="unlearning",
                progress=progress,
            )
        network.save(output)
        typer.echo(f"{output}: check it with `edgeguard audit` and on clean inputs before it is used")


def _party(folder: Path, plan_file: Path, given: Path) -> tuple[Own, Inspection, Held, Path]:
    """What a party has before it meets the others; and its folder for this inspection."""
    from edgeguard.private import inspections

    own, asked, work = _own(folder, plan_file)
    return own, asked, inspections.take(asked, given, own), work


def _own(folder: Path, plan_file: Path) -> tuple[Own, Inspection, Path]:
    """A party, an inspection that it is meant for, and its folder for it."""
    from edgeguard.private import parties

    own, asked = parties.own(folder), _read(plan_file)
    if asked.parties != own.parties.digest:
        raise ConfigError(f"inspection {asked.id}", got="meant for other parties", do="check parties.json and plan")
    return own, asked, folder / f"inspection-{asked.digest[:16]}"


def _read(path: Path) -> Inspection:
    from edgeguard.contract.private import Inspection
    from edgeguard.private import parties

    return parties.read_json(path, Inspection)


def _result(path: Path, kind: type[Any]) -> Any:
    from edgeguard.private import inspections

    return inspections.result(path, kind)


def _npz(path: Path) -> None:
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise ConfigError(f"output {path}", expected="a name that ends in .npz, in a folder that is there")


def _keras(path: Path) -> None:
    """Refuse, before any work, what Keras would refuse after it."""
    if path.suffix != ".keras" or not path.parent.is_dir():
        raise ConfigError(f"output {path}", expected="a name that ends in .keras, in a folder that is there")


def _new(path: Path) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    if path.exists() or not path.parent.is_dir():
        got = "there already" if path.exists() else "no such folder"
        raise ConfigError(f"file {path}", got=got, do="choose another name")


def _given(held: Held) -> list[tuple[str, str]]:
    """What the owners compare with what they gave."""
    return [(f"given by the {role}", digest) for role, digest in zip(held.values, held.digest.split(" "), strict=True)]


def _padded(path: Path, asked: Inspection, found: Any, expected: int) -> npt.NDArray[np.int64]:
    import numpy as np

    if found.inspection != asked.digest or len(found.padded) != 8 * expected:
        raise ConfigError(f"result {path}", got="one of another inspection", do="check plan and result")
    return np.frombuffer(found.padded, dtype="<i8").astype(np.int64)


def _triggers(path: Path) -> tuple[npt.NDArray[Any], ...]:
    """Labels [T], masks and patterns [T, D]."""
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as found:
            labels, masks, patterns = (np.asarray(found[name]) for name in ("labels", "masks", "patterns"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"triggers {path}", got=str(error)[:200], expected="as `inspect open` wrote them") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ConfigError(f"triggers {path}", got="no labels", do="there is nothing to unlearn")
    if masks.ndim != 2 or masks.shape != patterns.shape or len(masks) != len(labels):
        raise ConfigError(f"triggers {path}", got=f"masks {masks.shape}, patterns {patterns.shape}", expected="alike")
    for name, values, most in (("masks", masks, 1), ("patterns", patterns, 255)):
        if values.dtype.kind != "f" or not (np.all(values >= 0) and np.all(values <= most)):
            raise ConfigError(f"triggers {path}", got=f"other {name}", expected=f"numbers from 0 to {most}")
    return labels, masks, patterns


def _pad(path: Path) -> Pad:
    import msgspec

    from edgeguard.private.inspections import MAX_BYTES
    from edgeguard.private.owners import Pad

    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_BYTES), type=Pad)
    except OSError as error:
        raise ConfigError(f"pad {path}", got=error.strerror, do="check the path") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"pad {path}", got=error, expected="as `inspect give` wrote it") from error


def _network(path: Path) -> Any:
    import keras

    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"model {path}", got=str(error)[:200], expected="a Keras file") from error


def _print(shown: dict[str, Any], rows: list[tuple[str, str]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(shown))
    else:
        console.facts(rows)

"""``edgeguard demo``: what the product is for, on one machine, with real parts."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

import msgspec
import typer

from edgeguard.cli import console
from edgeguard.errors import EXIT_FINDINGS, EXIT_NOT_CHECKED, ConfigError, EdgeGuardError


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard demo | edgeguard demo --data fashion_mnist --devices 5 --json result.json | "
        "edgeguard demo --data my_images/ --broker localhost:1883 --keep"
    )
    def demo(
        data: str = typer.Option("digits", help="digits, a name in EDGEGUARD_DATA, an npz file or an image folder."),
        devices: int = typer.Option(3, min=1, max=64, help="How many agents run."),
        broker: str | None = typer.Option(None, metavar="HOST:PORT", help="Use this broker instead of an own one."),
        keep: bool = typer.Option(False, "--keep", help="Keep the working folder: models, database, logs, releases."),
        retrain: bool = typer.Option(False, "--retrain", help="Train anew instead of using the cache."),
        json_file: Path | None = typer.Option(
            None, "--json", metavar="FILE", help="Write what was measured; - prints."
        ),
        report: Path = typer.Option(Path("edgeguard-demo-report"), metavar="DIR", help="Folder for the report page."),
    ) -> None:
        """Show the whole loop: attack, convert, detect, report, decide, repair, roll out.

        Exit code 1, naming the check, when a promise is not kept on digits or Fashion-MNIST.
        """
        from edgeguard.attacks.victims import cache_folder
        from edgeguard.demo import record as records
        from edgeguard.demo import report as reports
        from edgeguard.demo import run as runs

        if json_file is not None and not json_file.parent.is_dir():
            raise ConfigError(f"folder of {json_file}", got="no such folder", do="create it first")
        address = None if broker is None else parse_broker(broker)
        if report.exists() and not report.is_dir():
            raise ConfigError(f"report folder {report}", got="a file", expected="a folder")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_NOT_CHECKED))  # so that the children end too
        folder = Path(tempfile.mkdtemp(prefix="edgeguard-demo-"))
        settings = runs.Settings(
            data=data,
            devices=devices,
            broker=address,
            folder=folder,
            cache=None if retrain else cache_folder(),
        )
        done = False
        try:
            with console.progress() as progress:
                record = runs.run(
                    settings, tell=lambda line: typer.echo(line, err=json_to_stdout(json_file)), progress=progress
                )
            page = reports.render(record, report)
            done = True
        except EdgeGuardError:
            done = not any((folder / "logs").glob("*.log"))
            raise
        finally:
            if done and not keep:
                runs.clean_up(folder)
            else:
                typer.echo(f"working folder: {folder}", err=True)
        document = msgspec.json.format(msgspec.json.encode(record.metrics), indent=2)
        if json_file is not None and json_to_stdout(json_file):
            typer.echo(document.decode())
        else:
            if json_file is not None:
                from converters.files import write

                write(document + b"\n", json_file)
            _table(record, page)
        failed = [check for check in record.checks if not check.passed]
        if failed and record.metrics.data in records.CHECKED_DATA:
            for check in failed:
                typer.echo(f"edgeguard: check failed: {check.rule}; got {check.measured}", err=True)
            raise typer.Exit(EXIT_FINDINGS)

    def _table(record: object, page: Path) -> None:
        from edgeguard.demo.record import Record

        assert isinstance(record, Record)
        m = record.metrics
        ratio = m.latency_guarded_us / m.latency_bare_us
        typer.echo("")
        console.facts(
            [
                ("", f"before the repair -> after, on the int8 files ({m.n_clean:,} test inputs)"),
                ("clean accuracy", f"{m.clean_accuracy_before:.2%} -> {m.clean_accuracy_after:.2%}"),
                ("attack success (ASR)", f"{m.asr_before:.2%} -> {m.asr_after:.2%}"),
                ("detector", f"AUROC {m.auroc:.4f}, TPR {m.tpr:.2%} at FPR {m.fpr:.2%} (one inference)"),
                (
                    "latency, p50",
                    f"{m.latency_bare_us:.1f} us bare, {m.latency_guarded_us:.1f} us guarded ({ratio:.2f}x)",
                ),
                ("inputs", f"{m.inputs_sent:,} sent, {m.inputs_processed:,} in the hub's database"),
                ("reports", f"{m.reports_published:,} published, {m.reports_stored:,} stored"),
                ("devices", f"{m.devices_updated} of {m.devices} run the repaired model"),
                ("tampered model", "refused by every device" if m.tampered_refused else "NOT refused"),
                ("time", f"{m.wall_s:.0f} s"),
                ("report", str(page)),
            ]
        )


def json_to_stdout(path: Path | None) -> bool:
    """True when the JSON shall be printed, and everything else belongs on stderr."""
    return path is not None and str(path) == "-"


def parse_broker(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT``. Raises ConfigError where that cannot be done."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError("--broker", got=text, expected="HOST:PORT, for example localhost:1883")
    return host.strip("[]"), int(port)

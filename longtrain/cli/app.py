"""The commands under their names."""

from __future__ import annotations

from longtrain.cli.checkpoint import checkpoints, export
from longtrain.cli.data import check_data
from longtrain.cli.doctor import doctor
from longtrain.cli.options import group
from longtrain.cli.plan import plan
from longtrain.cli.recipes import recipes
from longtrain.cli.report import report
from longtrain.cli.terminal import outlive_readers
from longtrain.cli.train import train

app = group("Trains decoders at long context. scripts/prepare_data.py makes the data that they read.")
app.command()(train)
app.command()(plan)
app.add_typer(recipes, name="recipes")
app.command()(export)
app.command()(report)
app.command()(doctor)
app.command("check-data")(check_data)
app.add_typer(checkpoints, name="checkpoint")

train_app = group()
train_app.command()(train)


def main() -> None:
    """The `longtrain` command."""
    outlive_readers()
    app()


def train_main() -> None:
    """scripts/train.py: `longtrain train` under its own name."""
    outlive_readers()
    train_app()

"""The commands under their names."""

from __future__ import annotations

from longtrain.cli.checkpoint import checkpoints, export
from longtrain.cli.data import check_data
from longtrain.cli.doctor import doctor
from longtrain.cli.options import group
from longtrain.cli.recipes import recipes
from longtrain.cli.report import report
from longtrain.cli.train import train

app = group("Trains decoders at long context.")
app.command()(train)
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
    app()


def train_main() -> None:
    """scripts/train.py: `longtrain train` under its own name."""
    train_app()

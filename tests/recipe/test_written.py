"""What is refused later on is told with the line, or the override, that says it."""

from pathlib import Path

import pytest

from longtrain.recipe.load import load_written
from tests.recipe.bad_recipes import BASE


@pytest.mark.parametrize(
    ("refusal", "field", "told"),
    [
        ("training.batch_size: 8 are wanted", None, "x.yaml:16: training.batch_size: 8 are wanted"),
        ("training.batch_size 8 is too much", None, "x.yaml:16: training.batch_size 8 is too much"),
        ("parallel.cp: too many ranks", None, "x.yaml:1: parallel.cp: too many ranks"),
        ("training.max_skipped: is a default", None, "x.yaml:13: training.max_skipped: is a default"),
        ("seed: is odd", None, "x.yaml:2: seed: is odd"),
        ("seed: no such folder", "data.path", "x.yaml:12: data.path: seed: no such folder"),
        ("d/x: no such folder", "data.path", "x.yaml:12: data.path: d/x: no such folder"),
        ("training.batch_size: 8 are wanted", "data.path", "x.yaml:16: training.batch_size: 8 are wanted"),
        ("data: no such folder", None, "data: no such folder"),
        ("model.rope_scaling: is of no use", None, "x.yaml:3: model.rope_scaling: is of no use"),
        ("training: is a section", None, "training: is a section"),
        ("no kernel can do this", None, "no kernel can do this"),
        ("training.batch: not a field", None, "training.batch: not a field"),
        ("training.batch_sizes", None, "training.batch_sizes"),
        ("optimizer.lr: is too high", None, "--set optimizer.lr=2: is too high"),
        ("optimizer.lr 2 is too high", None, "--set optimizer.lr=2: optimizer.lr 2 is too high"),
    ],
)
def test_located(write, refusal: str, field: str | None, told: str) -> None:
    _, written = load_written(write(BASE), ["optimizer.lr=2"])
    assert written.located(refusal, field) == told


def test_of_two_files(write) -> None:
    write("extends: ./parent.yaml\nname: child\ntraining:\n  steps: 50\n")
    Path("parent.yaml").write_text(BASE)
    _, written = load_written("x.yaml")
    assert written.located("training.steps: too few") == "x.yaml:4: training.steps: too few"
    assert written.located("training.batch_size: too few") == "parent.yaml:16: training.batch_size: too few"
    assert written.located("parallel.cp: too few") == "x.yaml:1: parallel.cp: too few"

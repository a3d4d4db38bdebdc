"""What no run can have written is damage, however rightly it is signed: it is named, and auto goes on from the one before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from longtrain.errors import CheckpointError
from longtrain.train.checkpoint_folder import problems
from longtrain.train.checkpoint_format import MANIFEST, STATE, OtherVersionError
from tests.chain import TENSORS, Chain, rewrite, sign
from tests.tiny import write_corpus
from tests.user import command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "data", 7)


def _state(**fields: Any) -> Callable[[Path], None]:
    return lambda step: rewrite(json.dumps(json.loads((step / STATE).read_text()) | fields).encode(), STATE)(step)


def _manifest(**fields: Any) -> Callable[[Path], None]:
    return lambda step: sign(step, **fields)


def _parameter(**fields: Any) -> Callable[[Path], None]:
    """One of the parameters with other values."""

    def change(step: Path) -> None:
        parameters = json.loads((step / MANIFEST).read_text())["parameters"]
        sign(step, parameters=parameters | {"a": parameters["a"] | fields})

    return change


def _file(name: str, size: int) -> Callable[[Path], None]:
    """One file more, or of another size."""

    def change(step: Path) -> None:
        sign(step, files=json.loads((step / MANIFEST).read_text())["files"] | {name: {"size": size, "sha256": "0" * 64}})

    return change


def _without_a(step: Path) -> None:
    sign(step, parameters={"b": json.loads((step / MANIFEST).read_text())["parameters"]["b"]})


def _pipe(name: str) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        (step / name).unlink()
        os.mkfifo(step / name)

    return change


IMPOSSIBLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "endless adam_step": (_parameter(adam_step=10**30), f"{MANIFEST}: parameters.a.adam_step: Input should be less than"),
    "another adam_step": (_parameter(adam_step=3), f"{MANIFEST}: field adam_step is not one number for all parameters"),
    "negative shape": (_parameter(shape=[-2, -3]), f"{MANIFEST}: parameters.a.shape.0: Input should be greater"),
    "no parameters": (_manifest(parameters={}), f"{MANIFEST}: parameters: "),
    "a parameter less": (_without_a, f"{MANIFEST}: lacks parameter a, of which its files hold ranges"),
    "no number of ranks": (_manifest(world=float("nan")), f"{MANIFEST}: world: "),
    "a file outside": (_file("../../../secret", 1), f"{MANIFEST}: field files is not that of a checkpoint: ../../../secret"),
    "an absolute file": (_file("/etc/passwd", 1), f"{MANIFEST}: field files is not that of a checkpoint: /etc/passwd"),
    "negative size": (_file(TENSORS, -1), f"{MANIFEST}: files.{TENSORS}.size: Input should be greater"),
    "loss_mean": (_state(loss_mean=float("nan")), f"{STATE}: loss_mean: Input should be a finite number"),
    "scaler": (_state(scaler={"cur_scale": float("inf")}), f"{STATE}: scaler.cur_scale"),
    "step": (_state(step=1), f"{STATE}: is of step 1, and {MANIFEST} of step 3"),
    "a named pipe": (_pipe(MANIFEST), f"{MANIFEST}: is no file"),
    "a pipe of tensors": (_pipe(TENSORS), f"{TENSORS}: is no file"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_no_run_has_written_is_damage(tmp_path: Path, data: Path, what: str) -> None:
    change, message = IMPOSSIBLE[what]
    chain = Chain(tmp_path / "run", data)
    *_, second, third = chain.steps
    change(third)
    found = problems(third)
    assert [type(problem) for problem in found] == [CheckpointError]
    assert message in str(found[0])
    with pytest.raises(CheckpointError) as refusal:
        chain.start(str(third))
    assert message in str(refusal.value)
    start = chain.start()
    assert (start.checkpoint, start.damaged) == (second, (third,))
    assert message in start.remarks[0]
    said = command("checkpoint", "verify", str(third))
    assert said.code == 2
    assert f"{third}: DAMAGED" in said.text


def test_another_version_may_have_any_values(tmp_path: Path, data: Path) -> None:
    third = Chain(tmp_path / "run", data).steps[-1]
    sign(third, version=3, stage=4)
    assert [type(problem) for problem in problems(third)] == [OtherVersionError]


def test_ranges_are_only_of_what_the_manifest_names(tmp_path: Path, data: Path) -> None:
    third = Chain(tmp_path / "run", data).steps[-1]
    rewrite(save({"master/c@0": torch.ones(6)}), "rank-00001.safetensors")(third)
    assert [str(problem).split(": ")[1] for problem in problems(third)] == [
        "lacks parameter c, of which its files hold ranges; the checkpoint is damaged"
    ]

"""Benchmarks where there is no GPU: one sentence and exit code 2 before anything is done; those of the CPU go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, checkpoints, kernels, layers, loss, training

NEED = [
    (attention, []),
    (attention, ["--tune"]),
    (layers, []),
    (layers, ["--tune"]),
    (loss, []),
    (loss, ["--tune"]),
    (kernels, ["--device", "cuda"]),
    (training, ["--recipe", "llama-160m-4k"]),
    (checkpoints, []),
]


def named(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else value.__name__.rpartition(".")[2]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("benchmark", "words"), NEED, ids=named)
def test_no_gpu_is_one_sentence(benchmark: Any, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(words)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("error: this benchmark needs a CUDA GPU, and torch ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("benchmark", dict.fromkeys(benchmark for benchmark, _ in NEED), ids=named)
def test_help_needs_none(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--help"])
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_what_runs_on_the_cpu_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each as far as its first work."""
    begun: list[Any] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(kernels, "compare", lambda device, _: begun.append(device))
    kernels.main([])
    for module, first, words in (
        (training, "measure", ["--recipe", "mine", "--device", "cpu", "--data", str(tmp_path)]),
        (checkpoints, "load_recipe", ["--recipe", "mine"]),
    ):

        def begin(name: str, *_: Any) -> Any:
            begun.append(name)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, first, begin)
        with pytest.raises(KeyboardInterrupt):
            module.main(words)
    assert begun == ["cpu", "mine", "mine"]


def test_as_a_command() -> None:
    for name, words in (("loss", []), ("tune_attention", ["0", "1"])):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *words],
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            cwd=Path(__file__).parents[1],
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: this benchmark needs a CUDA GPU"), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr

"""`longtrain plan` for ranks on several machines: what training would do there, and what it would refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.plan_cases import LLAMA, folder
from tests.user import command

BATCH = ("--set", "training.batch_size=24", "--set", "device=cuda")


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (("--ranks", "24"), "24 on cuda, 8 on each of 3 machines: dp 12 x cp 2 (zigzag ring)"),
        (("--ranks", "24", "--ranks-per-host", "4"), "24 on cuda, 4 on each of 6 machines: dp 12 x cp 2 (zigzag ring)"),
        (("--ranks", "24", "--ranks-per-host", "24"), "24 on cuda: dp 12 x cp 2 (zigzag ring)"),
        (("--ranks", "12"), "12 on cuda: dp 6 x cp 2 (zigzag ring)"),
        (("--ranks", "8"), "8 on cuda: dp 4 x cp 2 (zigzag ring)"),
        (("--ranks", "8", "--ranks-per-host", "2"), "8 on cuda, 2 on each of 4 machines: dp 4 x cp 2 (zigzag ring)"),
    ],
)
@pytest.mark.parametrize(
    "start", [("plan", "llama-7b-32k"), ("train", "--recipe", "llama-7b-32k", "--dry-run")], ids=lambda s: s[0]
)
def test_ranks_on_machines(start: tuple[str, ...], words: tuple[str, ...], ranks: str) -> None:
    said = command(*start, *words, *BATCH)
    assert said.code == 0, said.text
    assert f"ranks            {ranks}\n" in said.text
    assert "reaches over hosts" not in said.text


def test_rings_over_machines_are_told() -> None:
    said = command("plan", "llama-7b-32k", "--ranks", "16", "--set", "parallel.cp=16", "--set", "device=cuda")
    assert said.code == 0
    assert (
        "\nwarning          each ring of 16 ranks reaches over hosts of 8: its keys and values travel over the network\n"
        in said.text
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--ranks", "24", "--set", "device=cuda"),
            "32k.yaml:31: parallel.cp: auto finds none for 24 ranks that keeps rings inside",
        ),
        (
            ("--ranks", "24", "--ranks-per-host", "5", *BATCH),
            "--ranks-per-host 5: 24 ranks do not fill machines of 5; give a divisor",
        ),
        (
            ("--ranks", "24", "--ranks-per-host", "6", "--set", "parallel.cp=4", *BATCH),
            "--set parallel.cp=4: parallel.cp 4 does not divide the 6 ranks of each host",
        ),
        (("--ranks", "24", "--ranks-per-host", "0"), "--ranks-per-host"),
        (
            ("--ranks", "1", "--set", "parallel.dp=4"),
            "--set parallel.dp=4: dp 4 needs a multiple of 4 ranks, there is 1; start torchrun",
        ),
    ],
)
def test_refusals_are_those_of_training(words: tuple[str, ...], message: str) -> None:
    said = command("plan", "llama-7b-32k", *words)
    assert said.code == 2
    assert message in said.text


def test_training_takes_its_hosts_from_torchrun() -> None:
    said = command("train", "--recipe", "quickstart", "--ranks-per-host", "2")
    assert (said.code, said.text) == (
        2,
        "error: --ranks-per-host goes with --dry-run; to train on so many start torchrun --nproc-per-node 2\n",
    )


def test_what_a_plan_says_of_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    get = "hf download meta-llama/Llama-2-7b-hf --exclude '*.bin' --local-dir weights/llama-2-7b"
    prepare = "python scripts/prepare_data.py --source hf:emozilla/pg19 --tokenizer weights/llama-2-7b --out data/pg19-llama-2"
    said = command("plan", "llama-7b-128k").text
    assert f"data/pg19-llama-2 (not there yet; before training: {get} && {prepare} --sequence-length 131072)\n" in said
    assert f"from weights/llama-2-7b (not there yet; before training: {get})\n" in said
    assert f"\n  {get}\n  {prepare} " in command("train", "--recipe", "llama-7b-128k", "--set", "device=cpu").text
    Path("weights/llama-2-7b").mkdir(parents=True)
    (Path("weights/llama-2-7b") / "config.json").write_text("{}")
    said = command("plan", "llama-7b-128k").text
    assert said.startswith("error: ")
    assert "recipes/llama-7b-128k.yaml:8: model.init: weights/llama-2-7b/config.json: model_type" in said


def test_what_contradicts_weights_is_told_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(Path("w"), replace(LLAMA, vocab_size=320))
    Path("mine.yaml").write_text("extends: llama-1b-32k\nname: mine\nmodel:\n  init: w\n  norm_eps: 1e-2\n")
    said = command("plan", "mine.yaml").text
    assert said.startswith(
        "error: mine.yaml:5: model.norm_eps: the recipe is not that of the weights in w:\n  model.norm_eps: 0.01 in"
    )
    said = command("plan", "mine.yaml", "--set", "model.norm_eps=1e-6", "--set", "model.vocab_size=100").text
    assert said.startswith(
        "error: --set model.vocab_size=100: the recipe is not that of the weights in w:\n  model.vocab_size: 100 in"
    )

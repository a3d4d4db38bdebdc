"""The command line as users meet it: what it says, what it leaves behind, and how it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import longtrain.cli.prepare
from longtrain.recipe.load import builtin_recipes, load_recipe
from longtrain.train.checkpoint_folder import verify
from longtrain.train.signals import STOPPED
from tests.recipe_desk import write_data
from tests.user import CHECKPOINT, RECIPE, SCRIPT, STEPS, command, process, snapshot, train

pytest_plugins = ("tests.desks",)


@pytest.mark.usefixtures("trained")
def test_trained_run_is_complete() -> None:
    assert {path.name for path in Path("run").iterdir()} == {
        "checkpoints",
        "environment.jsonl",
        "grad_norm.png",
        "huggingface",
        "loss.png",
        "loss_by_position.png",
        "memory.png",
        "metrics.jsonl",
        "plan.txt",
        "recipe.yaml",
        "throughput.png",
    }
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["eval_loss"] is not None for row in rows] == [True, True, True]
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.usefixtures("trained")
def test_finished_run_started_again_changes_nothing() -> None:
    before, times = snapshot(), {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    said = train()
    assert said.code == 0
    assert f"run is at step {STEPS} already; to train on, raise training.steps, now {STEPS}" in said.text
    assert snapshot() == before
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == times


@pytest.mark.usefixtures("trained")
def test_longer_run_resumes_and_keeps_the_older_export() -> None:
    before = snapshot(Path("run/huggingface"))
    said = train("--set", "training.steps=4")
    assert said.code == 0
    assert f"resuming {CHECKPOINT} (step 3)" in said.text
    assert "training.steps: 3 -> 4" in said.text
    assert "step 4/4" in said.text
    assert "step 3/4" not in said.text
    kept = "(run/huggingface is of an earlier end of this run, and stays as it is)"
    assert f"Hugging Face checkpoint: run/huggingface-step-00000004 {kept}" in said.text
    assert snapshot(Path("run/huggingface")) == before
    assert "huggingface-step-00000004" in command("report", "run", "--tokens", "0").text


@pytest.mark.usefixtures("trained")
def test_an_export_that_people_work_in_is_still_that_of_an_earlier_end() -> None:
    """What they write there after a later checkpoint does not make it that one's."""
    assert train("--set", "training.steps=4", "--until", "4").code == 0
    shutil.rmtree("run/huggingface-step-00000004")
    Path("run/huggingface/notes.txt").write_text("mine")
    said = train("--set", "training.steps=5")
    assert "Hugging Face checkpoint: run/huggingface-step-00000005" in said.text
    Path("run/huggingface/more.txt").write_text("mine")
    shutil.rmtree("run/huggingface-step-00000005")
    assert "Hugging Face checkpoint: run/huggingface-step-00000005" in train("--set", "training.steps=5").text


@pytest.mark.usefixtures("fresh")
def test_until_stops_with_a_checkpoint_and_the_report_says_how_to_go_on() -> None:
    said = train("--until", "1")
    assert said.code == 0
    assert "stopped at step 1, as asked; the command without --until goes on from there" in said.text
    assert "as asked" not in train("--until", "1").text
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000001"]
    assert not Path("run/huggingface").exists()
    said = command("report", "run", "--tokens", "2")
    assert said.code == 0
    assert "torchrun --nproc-per-node 1 scripts/train.py --recipe run/recipe.yaml\n" in said.text


@pytest.mark.usefixtures("trained")
def test_report() -> None:
    said = command("report", "run", "--tokens", "4", "--temperature", "0")
    assert said.code == 0
    for words in (
        "steps            3, 384 tokens",
        "training loss",
        "held-out loss",
        "tokens/s",
        f"checkpoint       {CHECKPOINT}\n",
        "run/huggingface",
        "def ",
    ):
        assert words in said.text
    assert "--recipe run/recipe.yaml --set training.steps=6" in said.text


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("gone", ["data", "run/checkpoints"])
def test_report_stands_without_a_sample(gone: str) -> None:
    shutil.rmtree(gone)
    said = command("report", "run")
    assert said.code == 0
    assert "training loss" in said.text
    assert "no sample: " in said.text
    assert (f"{CHECKPOINT}, the newest; " in said.text) == (gone == "data")


@pytest.mark.usefixtures("trained")
def test_report_names_the_checkpoint_that_the_sample_is_of() -> None:
    older, newest = Path("run/checkpoints/step-00000002"), CHECKPOINT
    newest.joinpath("state.json").write_text("{")
    said = command("report", "run", "--tokens", "1")
    assert f"WARNING: passed over {newest.name}: " in said.text
    assert f"checkpoint       {older}\n" in said.text
    assert str(newest) not in said.text.replace(f"{newest}/", "")
    said = command("report", "run", "--tokens", "0")
    assert f"checkpoint       {newest}, the newest; `longtrain checkpoint ls run --verify` says which are sound\n" in said.text


@pytest.mark.usefixtures("trained")
def test_moved_data_is_found_with_an_option() -> None:
    Path("data").rename("elsewhere")
    assert command("export", "run", "--out", "out", "--data", "elsewhere").text == f"wrote out from {CHECKPOINT}\n"
    assert "sample:" in command("report", "run", "--tokens", "1", "--data", "elsewhere").text


@pytest.mark.usefixtures("trained")
def test_a_recipe_that_says_no_more_than_its_weights_is_resumed() -> None:
    text = RECIPE[: RECIPE.index("model:")] + "model: {init: run/huggingface}\n" + RECIPE[RECIPE.index("data:") :]
    Path("recipe.yaml").write_text(text.replace("output: run\n", "output: next\n"))
    begun = train("--until", "1")
    assert begun.code == 0, begun.text
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert json.loads(Path("next/metrics.jsonl").read_text().splitlines()[0])["loss"] < first
    said = train("--set", "training.fused=none")
    assert said.code == 0, said.text
    assert "resuming next/checkpoints/step-00000001 (step 1)" in said.text
    assert "changed since that checkpoint: training.fused: auto -> none" in said.text


@pytest.mark.usefixtures("fresh")
def test_a_mixture_is_trained_and_exported_with_any_of_its_folders() -> None:
    write_data(Path("more"), tokenizer="data/tokenizer.model")
    write_data(Path("other"), vocab_size=300)
    mixed = ("--set", "data.path=null", "--set", "data.sources={data: 3, more: 1}")
    said = train(*mixed)
    assert said.code == 0, said.text
    said = train(*mixed[:3], "data.sources={data: 1, more: 1}", "--set", "training.steps=4")
    assert said.code == 2
    assert "was trained on other data than data + more" in said.text
    shutil.rmtree("data")
    Path("more").rename("moved")
    assert "data: the data of" in command("export", "run", "--out", "out").text
    assert "other: was not prepared with the tokenizer of" in command("export", "run", "--out", "out", "--data", "other").text
    assert command("export", "run", "--out", "out", "--data", "moved").text == f"wrote out from {CHECKPOINT}\n"


def test_recipes_lists_every_recipe() -> None:
    said = command("recipes")
    assert said.code == 0
    lines = said.text.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(builtin_recipes())
    assert all(len(line.rstrip()) > 40 for line in lines[1:])


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_dry_run_needs_nothing(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("train", "--recipe", recipe, "--dry-run")
    assert said.code == 0, said.text
    for words in ("ranks", "parameters", "on each rank", "tokens: ", "kernel", "not reference", "learning rate"):
        assert words in said.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", builtin_recipes())
def test_missing_data_comes_with_the_command_that_prepares_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("train", "--recipe", name, "--set", "parallel.cp=1")
    assert said.code == 2
    printed = next(line for line in said.text.splitlines() if "scripts/prepare_data.py" in line)
    python, script, *arguments = shlex.split(printed)
    assert (python, script) == ("python", "scripts/prepare_data.py")
    given: dict[str, Any] = {}

    def record(source: list[str], out: Path, **options: Any) -> None:
        given.update(options, source=source, out=out)
        raise typer.Exit

    monkeypatch.setattr(longtrain.cli.prepare, "prepare", record)
    app = typer.Typer()
    app.command()(longtrain.cli.prepare.prepare_data)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    recipe = load_recipe(name)
    assert (given["source"], str(given["out"])) == ([recipe.data.corpus], recipe.data.path)
    # a tokenizer that exists, or one to train
    assert given["tokenizer"] == (recipe.data.tokenizer or recipe.model.init)
    assert given["tokenizer"] or given["vocab_size"] == recipe.model.vocab_size
    assert not list(tmp_path.iterdir())


def test_dry_run_for_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("train", "--recipe", "llama-7b-32k", "--dry-run", "--ranks", "8", "--set", "device=cuda")
    assert said.code == 0
    assert "8 on cuda: dp 4 x cp 2 (zigzag ring)" in said.text
    assert "6,738,415,616 parameters" in said.text
    assert "32 sequences = 1,048,576 tokens: 4 dp x 1 a forward x 8 accumulated" in said.text


@pytest.mark.usefixtures("fresh")
def test_dropout_does_not_depend_on_where_a_run_was_stopped() -> None:
    dropping = ("--set", "model.dropout=0.2", "--set", "model.attention_dropout=0.1")
    assert train(*dropping).code == 0
    once = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    again = ("--set", "output=again", "--set", "training.micro_batch_size=4", "--set", "training.activations=full")
    assert train(*dropping, *again, "--until", "1").code == 0
    assert train(*dropping, *again).code == 0
    twice = [json.loads(line)["loss"] for line in Path("again/metrics.jsonl").read_text().splitlines()]
    assert twice == pytest.approx(once, rel=1e-5)
    assert "sample:" in command("report", "run", "--tokens", "2").text, "nothing is dropped where text is generated"


@pytest.mark.usefixtures("fresh")
def test_interrupt_says_where_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longtrain.train.loop.train_step", interrupted)
    said = train()
    assert said.code == 130
    assert "interrupted; there is no checkpoint yet" in said.text


@pytest.mark.usefixtures("fresh")
def test_the_script_and_the_command_are_the_same() -> None:
    arguments = ("--recipe", "recipe.yaml", "--dry-run", "--ranks", "2")
    script = process(sys.executable, SCRIPT, *arguments)
    for words in (("train", *arguments), ("plan", "recipe.yaml", "--ranks", "2")):
        installed = process(sys.executable, "-c", "from longtrain.cli import main; main()", *words)
        assert script.returncode == installed.returncode == 0, script.stderr + installed.stderr
        assert script.stdout == installed.stdout
        assert script.stderr == installed.stderr == ""


@pytest.mark.parametrize(("words", "exit_code"), [(["--help"], 0), (["recipes", "check", "nowhere.yaml"], 2)])
def test_what_needs_no_torch_does_not_import_it(words: list[str], exit_code: int) -> None:
    code = (
        "import sys, longtrain.cli\n"
        f"sys.argv = {['longtrain', *words]}\n"
        "try: longtrain.cli.main()\n"
        f"except SystemExit as end: assert (end.code or 0) == {exit_code}\n"
        "assert not {'torch', 'deepspeed', 'matplotlib', 'numpy'} & set(sys.modules)\n"
    )
    done = process(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def training(fresh: None) -> Iterator[subprocess.Popen[str]]:
    """A run of its own process that will not end by itself."""
    words = [sys.executable, SCRIPT, "--recipe", "recipe.yaml", "--set", "training.steps=1000000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def test_a_signal_to_a_run_that_saves_nothing(fresh: None) -> None:
    words = [sys.executable, SCRIPT, "--recipe", "recipe.yaml", "--set", "training.steps=1000000", "--set", "checkpoint.every=null"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert any("step 3/" in line for line in started.stdout)
        started.send_signal(signal.SIGTERM)
        out, said = started.communicate(timeout=60)
    assert started.returncode == STOPPED
    assert "SIGTERM: stopping after this step, without a checkpoint, as checkpoint.every is null" in said
    assert "nothing was saved, as checkpoint.every is null" in out


def test_ctrl_c(training: subprocess.Popen[str]) -> None:
    assert training.stdout is not None
    assert training.stderr is not None
    assert any("saved" in line for line in training.stdout), "lines arrive while it trains, though nobody has a terminal"
    training.send_signal(signal.SIGINT)
    out, said = training.communicate(timeout=60)
    assert training.returncode == STOPPED, said
    assert "SIGINT: stopping after this step, with a checkpoint" in said
    assert "Traceback" not in said
    step = int(out.split("stopped at step ")[1].split(",")[0])
    verify(Path(f"run/checkpoints/step-{step:08d}"))

"""What the command line refuses: one clear message, exit code 2, and everything as it was before."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer

from longtrain.attention.reference import ReferenceKernel
from longtrain.cli.refusals import refusals
from tests.refusal import Refusal, become_folder, copy_run, cut, flip, link, other_data, overwrite, refused, remove, rewrite, set_
from tests.user import CHECKPOINT, REPOSITORY, SCRIPT, process, snapshot, train

pytest_plugins = ("tests.desks",)


TRAIN_REFUSALS = {
    "unknown key": Refusal(("recipe.yaml:17: training.stepz: unknown key", "'steps'"), (), rewrite("steps:", "stepz:")),
    "duplicate key": Refusal(
        ("recipe.yaml:18: training.steps: key given twice", "line 17"), (), rewrite("  batch_size", "  steps: 4\n  batch_size")
    ),
    "mistyped value": Refusal(
        ("recipe.yaml:17: training.steps: expected a whole number", "'ten'"), (), rewrite("steps: 3", "steps: ten")
    ),
    "more tokens than any vocabulary": Refusal(
        ("--set model.vocab_size=9223372036854775807: must be at most 16777216"),
        set_("model.vocab_size=9223372036854775807"),
    ),
    "wider than any model": Refusal(("must be at most 16777216",), set_("model.intermediate_size=1000000000000")),
    "a theta without frequencies": Refusal(
        ("model.rope_theta=1e-300: 1e-300 gives no usable frequencies",), set_("model.rope_theta=1e-300")
    ),
    "no recipe file": Refusal(("recipe.yaml: no such file",), (), remove("recipe.yaml")),
    "recipe is a folder": Refusal(("recipe.yaml: cannot be read",), (), become_folder("recipe.yaml")),
    "set without =": Refusal(("--set training.steps: expected key.path=value",), set_("training.steps")),
    "set unknown": Refusal(("--set training.stepz=4: unknown key; did you mean 'training.steps'?",), set_("training.stepz=4")),
    "set twice": Refusal(("key given twice",), set_("seed=1", "seed=2")),
    "ranks for cp": Refusal(
        ("the number of ranks, 1, is not a multiple of cp 2", "torchrun --nproc-per-node 2"), set_("parallel.cp=2")
    ),
    "ranks for dp x cp": Refusal(
        ("dp 2 x cp 2 needs 4 ranks, there are 1",), set_("parallel.dp=2", "parallel.cp=2", "training.micro_batch_size=1")
    ),
    "batch": Refusal(("training.batch_size", "multiple"), ("--dry-run", "--ranks", "4")),
    "unknown kernel": Refusal(("attention.kernel", "'xformers'", "memory_efficient"), set_("attention.kernel=xformers")),
    "no GPU": Refusal(("device cuda is wanted", "no CUDA GPU here"), set_("device=cuda")),
    "bf16 at stage 0": Refusal(("stage 0 trains in fp32 only", "use stage 1"), set_("zero.stage=0", "training.precision=bf16")),
    "fp16 on cpu": Refusal(("fp16 needs a GPU",), set_("training.precision=fp16")),
    "fp16 on a machine without GPU": Refusal(("fp16 needs a GPU",), set_("training.precision=fp16", "device=auto")),
    "minimal in a ring": Refusal(
        ("--set training.activations=minimal: minimal runs attention again", "use full"),
        ("--dry-run", *set_("parallel.cp=2", "training.activations=minimal")),
    ),
    "no data": Refusal(("recipe.yaml:13: data.path: data: no such data folder", "prepare_data.py"), (), remove("data")),
    "data in a home": Refusal(("data.path=~/data: write the path out",), set_("data.path=~/data")),
    "data is a file": Refusal(("recipe.yaml: is a file, not a folder of prepared data",), set_("data.path=recipe.yaml")),
    "data is a folder above": Refusal(("..: holds no manifest.json",), set_("data.path=..")),
    "data is a link to nothing": Refusal(("link: no such data folder",), set_("data.path=link"), link("link", "nowhere")),
    "data is a link to itself": Refusal(("link: no such data folder",), set_("data.path=link"), link("link", "link")),
    "data twice": Refusal(("hold the same data",), set_("data.path=null", "data.sources={data: 1, ./data: 1}")),
    "data without weight": Refusal(("must be greater than 0",), set_("data.path=null", "data.sources={data: 0}")),
    "data of two kinds": Refusal(("path is set too: keep one of them",), set_("data.sources={data: 1}")),
    "no data at all": Refusal(("no data: set path",), set_("data.path=null")),
    "no manifest": Refusal(("data: holds no manifest.json",), (), remove("data/manifest.json")),
    "foreign manifest": Refusal(("data/manifest.json: is not a longtrain manifest",), (), overwrite("data/manifest.json", b"{}")),
    "missing shard": Refusal(("data/train-00000.bin: cannot be read (No such file",), (), remove("data/train-00000.bin")),
    "truncated shard": Refusal(("data/train-00000.bin: has", "truncated or foreign"), (), cut("data/train-00000.bin")),
    "truncated index": Refusal(("data/train-00000.idx: has", "truncated or foreign"), (), cut("data/train-00000.idx")),
    "foreign shard": Refusal(("data/heldout-00000.bin: has 5 bytes",), (), overwrite("data/heldout-00000.bin", b"12345")),
    "foreign shard of the right size": Refusal(
        ("data/train-00000.bin: is not what was written",), (), flip("data/train-00000.bin")
    ),
    "foreign index of the right size": Refusal(
        ("data/train-00000.idx: is no list of document ends",), (), flip("data/train-00000.idx")
    ),
    "other tokenizer": Refusal(("data/tokenizer.model: this tokenizer differs",), (), flip("data/tokenizer.model")),
    "no tokenizer": Refusal(("data/tokenizer.model", "cannot be read"), (), remove("data/tokenizer.model")),
    "weights not there": Refusal(("--set model.init=nowhere: there is no folder nowhere",), set_("model.init=nowhere")),
    "weights are a file": Refusal(("recipe.yaml: no such folder; model.init is the path",), set_("model.init=recipe.yaml")),
    "weights are no model": Refusal(("..: holds no config.json",), set_("model.init=..")),
    "weights are a link to itself": Refusal(
        ("--set model.init=link: there is no folder link",), set_("model.init=link"), link("link", "link")
    ),
    "weights in a home": Refusal(("model.init=~/w: write the path out",), set_("model.init=~/w")),
    "cp auto that fits no ranks": Refusal(
        ("parallel.cp=auto: auto finds none for 1 rank:", "parallel.ulysses 2"), set_("parallel.cp=auto", "parallel.ulysses=2")
    ),
    "dropout where heads are shared out": Refusal(
        ("--set model.attention_dropout=0.1: parallel.ulysses 2 shares heads out",),
        ("--dry-run", *set_("model.attention_dropout=0.1", "parallel.cp=2", "parallel.ulysses=2")),
    ),
    "DeepSpeed against the recipe": Refusal(
        ("gradient_clipping: 3.0}: gradient_clipping: optimizer.grad_clip decides it",),
        set_("zero.deepspeed={gradient_clipping: 3.0}"),
    ),
    "vocabulary too small": Refusal(("model.vocab_size is 319", "set model.vocab_size to 320"), set_("model.vocab_size=319")),
    "too little text": Refusal(
        ("the split 'train' has", "fewer than one sequence of 100000"), set_("training.sequence_length=100000")
    ),
    "batch larger than the data": Refusal(
        ("training.batch_size=1000: 1000 are wanted", "training sequences of 32 tokens", "or less"),
        set_("training.batch_size=1000"),
    ),
    "more evaluation than data": Refusal(
        ("evaluation.sequences=1000: 1000 are wanted", "held-out sequences of 32 tokens", "or less"),
        set_("evaluation.sequences=1000"),
    ),
    "resume from nothing": Refusal(("nowhere: no such folder",), ("--resume", "nowhere")),
    "resume from a file": Refusal(("recipe.yaml: no whole checkpoint here",), ("--resume", "recipe.yaml")),
    "ranks without dry run": Refusal(("--ranks goes with --dry-run",), ("--ranks", "1")),
    "until 0": Refusal(("'--until'",), ("--until", "0")),
    "until a word": Refusal(("'--until'",), ("--until", "soon")),
    "unknown option": Refusal(("--stepz",), ("--stepz",)),
}

NAMED = ("--resume", str(CHECKPOINT))
"""A damaged checkpoint is refused where it is named; without that, training goes on from an earlier one."""

RESUME_REFUSALS = {
    "other recipe": Refusal(
        ("checkpoint of another recipe", "optimizer.lr: 0.01 in the checkpoint, 0.02 in this recipe"), set_("optimizer.lr=2e-2")
    ),
    "other model": Refusal(("model.hidden_size: 16 in the checkpoint",), set_("model.hidden_size=32")),
    "other data": Refusal(("was trained on other data",), (), other_data),
    "never": Refusal(("--resume never would write over",), ("--resume", "never")),
    "from elsewhere": Refusal(
        ("run/checkpoints: holds checkpoints up to step-",),
        ("--resume", "elsewhere"),
        copy_run,
    ),
    "flipped bit": Refusal(
        (str(CHECKPOINT / "rank-00000.safetensors"), "SHA-256"), NAMED, flip(CHECKPOINT / "rank-00000.safetensors")
    ),
    "truncated weights": Refusal(("rank-00000.safetensors", "damaged"), NAMED, cut(CHECKPOINT / "rank-00000.safetensors")),
    "truncated state": Refusal(("state.json", "damaged"), NAMED, cut(CHECKPOINT / "state.json")),
    "truncated manifest": Refusal(("manifest.json", "truncated"), NAMED, cut(CHECKPOINT / "manifest.json")),
    "missing weights": Refusal(("rank-00000.safetensors: missing",), NAMED, remove(CHECKPOINT / "rank-00000.safetensors")),
}

TOOL_REFUSALS = {
    "no command": Refusal(("train", "recipes", "export", "report"), ()),
    "unknown command": Refusal(("trian",), ("trian",)),
    "train without recipe": Refusal(("--recipe",), ("train",)),
    "unknown recipe": Refusal(
        ("no built-in recipe 'lama-7b-32k'; did you mean 'llama-7b-32k'?",), ("train", "--recipe", "lama-7b-32k")
    ),
    "plan of an unknown recipe": Refusal(("no built-in recipe 'lama'",), ("plan", "lama")),
    "export without out": Refusal(("--out",), ("export", "run")),
    "export of nothing": Refusal(("nowhere: no such folder",), ("export", "nowhere", "--out", "out")),
    "export of no checkpoints": Refusal(
        ("no whole checkpoint here",), ("export", "run", "--out", "out"), remove("run/checkpoints")
    ),
    "export onto a folder": Refusal(("run exists; name a folder that does not",), ("export", "run", "--out", "run")),
    "export onto a file": Refusal(("recipe.yaml exists",), ("export", "run", "--out", "recipe.yaml")),
    "export below a file": Refusal(("recipe.yaml",), ("export", "run", "--out", "recipe.yaml/out")),
    "export in no format": Refusal(("int8", "fp32", "bf16", "fp16"), ("export", "run", "--out", "out", "--dtype", "int8")),
    "export without data": Refusal(("data: the data of", "--data FOLDER"), ("export", "run", "--out", "out"), remove("data")),
    "export with other data": Refusal(
        ("data: was not prepared with the tokenizer of run/checkpoints/step-",), ("export", "run", "--out", "out"), other_data
    ),
    "export with other tokenizer": Refusal(
        ("tokenizer.model: this tokenizer differs",), ("export", "run", "--out", "out"), flip("data/tokenizer.model")
    ),
    "export of flipped bit": Refusal(
        ("is damaged:\n", "rank-00000.safetensors: SHA-256"),
        ("export", str(CHECKPOINT), "--out", "out"),
        flip(CHECKPOINT / "rank-00000.safetensors"),
    ),
    "report of nothing": Refusal(("nowhere/metrics.jsonl: no reports there",), ("report", "nowhere")),
    "report of an untrained run": Refusal(
        ("run/metrics.jsonl: no reports there",), ("report", "run"), overwrite("run/metrics.jsonl", b"")
    ),
    "report of damaged metrics": Refusal(
        ("run/metrics.jsonl:1: is no report",), ("report", "run"), overwrite("run/metrics.jsonl", b"loss 3\nloss 2\n")
    ),
    "report at no temperature": Refusal(("--temperature",), ("report", "run", "--temperature", "nan")),
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("case", TRAIN_REFUSALS.values(), ids=TRAIN_REFUSALS)
def test_train_refuses(case: Refusal) -> None:
    refused(case, "train", "--recipe", "recipe.yaml")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("case", RESUME_REFUSALS.values(), ids=RESUME_REFUSALS)
def test_resume_refuses(case: Refusal) -> None:
    refused(case, "train", "--recipe", "recipe.yaml", "--set", "training.steps=5")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("case", TOOL_REFUSALS.values(), ids=TOOL_REFUSALS)
def test_tools_refuse(case: Refusal) -> None:
    refused(case)


@pytest.mark.usefixtures("fresh")
def test_kernel_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceKernel, "refuses", lambda self, needs: ["only does what it likes"])
    case = Refusal(("attention.kernel=reference: reference cannot do this: only does what it likes", "memory_efficient"))
    refused(case, "train", "--recipe", "recipe.yaml", "--set", "attention.kernel=reference")


@pytest.mark.usefixtures("fresh")
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    refused(Refusal(("the environment has RANK but not WORLD_SIZE",)), "train", "--recipe", "recipe.yaml")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(("call", "steps"), [("os.fsync", 3), ("longtrain.train.checkpoint.write_tensors", 5)])
def test_full_disk_at_the_start_and_while_saving(monkeypatch: pytest.MonkeyPatch, call: str, steps: int) -> None:
    before = snapshot(CHECKPOINT)
    monkeypatch.setattr(call, no_space)
    said = train("--set", "training.steps=5")
    assert said.code == 2
    assert said.text.endswith("No space left on device\n")
    assert said.text.count("ERROR: a checkpoint could not be saved") == steps - 3, "without the last one it ends"
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == steps
    assert snapshot(CHECKPOINT) == before


@pytest.mark.usefixtures("trained")
def test_full_disk_while_exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    refused(Refusal(("error: out: cannot be written: No space left on device",)), "export", "run", "--out", "out")


@pytest.mark.usefixtures("fresh")
def test_errors_that_are_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.ECONNREFUSED, "no disk is to blame")

    monkeypatch.setattr("longtrain.cli.train.load_written", broken)
    with pytest.raises(OSError, match="no disk"):
        train()


@pytest.mark.usefixtures("fresh")
def test_refusal_of_a_real_process() -> None:
    before = snapshot()
    done = process(sys.executable, SCRIPT, "--recipe", "recipe.yaml", "--set", "training.stepz=4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --set training.stepz=4: unknown key; did you mean 'training.steps'?\n"
    assert snapshot() == before


@pytest.mark.usefixtures("fresh")
def test_empty_corpus() -> None:
    Path("text").mkdir()
    before = snapshot()
    done = process(sys.executable, str(REPOSITORY / "scripts" / "prepare_data.py"), "--source", "text", "--out", "prepared")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert snapshot() == before


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip(CHECKPOINT / "rank-00000.safetensors"), "SHA-256 differs from the manifest"),
        (lambda: Path("run/.recipe.yaml.tmp").mkdir(), "error: run/.recipe.yaml.tmp: Is a directory"),
    ],
    ids=["on both ranks", "on the main rank"],
)
def test_one_refusal_of_two_ranks(damage: Callable[[], None], says: str) -> None:
    """What is found when both ranks are up: one of them says it, both end."""
    damage()
    weights = snapshot(Path("run/checkpoints"))
    more = ("--set", "training.steps=5", "--set", "parallel.cp=2", *NAMED)
    done = process(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT, "--recipe", "recipe.yaml", *more)
    assert done.returncode != 0
    assert done.stderr.count(says) == 1, done.stderr
    assert "exitcode  : 2 " in done.stderr, "what torchrun tells of the rank that refused"
    assert "longtrain/" not in done.stderr, "a traceback of ours"
    assert snapshot(Path("run/checkpoints")) == weights


def _of_a_gpu() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.00 GiB is free. If "
        "reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True."
    )


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (
            _of_a_gpu,
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.00 GiB is free.",
        ),
        (lambda: torch.empty(10**15), "out of memory: no 3.73e+06 GiB can be had at once on "),
    ],
    ids=["GPU", "host"],
)
def test_out_of_memory_is_told_with_what_needs_less(
    capsys: pytest.CaptureFixture[str], use: Callable[[], object], says: str
) -> None:
    with pytest.raises(typer.Exit) as ended, refusals():
        use()
    assert ended.value.exit_code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {says}")
    assert told.endswith("more ranks (parallel.cp, parallel.dp) need less\n")
    assert "PYTORCH_ALLOC_CONF" not in told

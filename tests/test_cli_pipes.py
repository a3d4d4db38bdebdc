"""What becomes of a command whose output nobody reads any more, or no disk takes, through real pipes and on a real disk."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longtrain.cli.terminal import Lasting
from longtrain.train.checkpoint_folder import complete, verify
from tests.small_disk import mounted
from tests.user import CHECKPOINT, REPOSITORY, SCRIPT, STEPS

pytest_plugins = ("tests.desks",)

LONGTRAIN = (sys.executable, "-c", "from longtrain.cli import main; main()")
PREPARE = (sys.executable, str(REPOSITORY / "scripts" / "prepare_data.py"))
CONVERT = (sys.executable, str(REPOSITORY / "scripts" / "convert_checkpoint.py"))


def unread(*words: str, both: bool = False) -> subprocess.CompletedProcess[bytes]:
    """A command whose stdout is a pipe without a reader; both: stderr too."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        streams = {"stdout": writer, "stderr": writer if both else subprocess.PIPE}
        return subprocess.run(words, timeout=120, env=environment, check=False, **streams)
    finally:
        os.close(writer)


SHORT = ("--help", "recipes", "recipes show quickstart", "plan recipe.yaml", "checkpoint ls run", "report run --tokens 1")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "words", [*((*LONGTRAIN, *words.split()) for words in SHORT), (*CONVERT, "run", "--out", "out")], ids=[*SHORT, "convert"]
)
def test_short_commands_end_quietly(words: tuple[str, ...]) -> None:
    done = unread(*words)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.usefixtures("trained")
def test_the_exit_code_is_that_of_the_work() -> None:
    (CHECKPOINT / "state.json").write_bytes(b"")
    done = unread(*LONGTRAIN, "checkpoint", "verify", "run")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: run/checkpoints/")
    assert unread(*LONGTRAIN, "checkpoint", "verify", "run", both=True).returncode == 2
    assert unread(*LONGTRAIN, "recipes", "check", "nowhere.yaml", both=True).returncode == 2


@pytest.mark.usefixtures("fresh")
def test_head_takes_its_lines_and_nobody_complains() -> None:
    command = f"{shlex.join([*LONGTRAIN, 'recipes', 'show', 'llama-7b-32k'])} | head -n 2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.usefixtures("fresh")
def test_preparation_goes_on() -> None:
    Path("text").mkdir()
    for number in range(20):
        Path("text", f"{number}.txt").write_text(f"Text number {number}, about nothing at all.\n" * 9)
    done = unread(*PREPARE, "--source", "text", "--out", "new", "--vocab-size", "300", "--held-out", "0.2", both=True)
    assert done.returncode == 0
    assert Path("new/manifest.json").exists()


@pytest.mark.usefixtures("fresh")
def test_training_goes_on_and_says_so_once() -> None:
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    words = [sys.executable, *launch, SCRIPT, "--recipe", "recipe.yaml", "--set", "parallel.cp=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as training:
        assert training.stdout is not None
        assert training.stderr is not None
        assert "tiny: " in training.stdout.readline()
        training.stdout.close()
        said = training.stderr.read()
        assert training.wait(120) == 0, said
    remark = "nobody reads stdout any more: training goes on, what it prints is lost, and run/metrics.jsonl has its reports\n"
    assert said.count(remark) == 1, said
    assert "Traceback" not in said
    assert [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    verify(CHECKPOINT)
    assert Path("run/huggingface").is_dir()


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_training_goes_on_where_nobody_reads_errors_either() -> None:
    done = unread(sys.executable, SCRIPT, "--recipe", "recipe.yaml", both=True)
    assert done.returncode == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == STEPS
    assert Path("run/huggingface").is_dir()


def test_a_terminal_that_has_gone() -> None:
    master, slave = os.openpty()
    os.close(master)
    with os.fdopen(slave, "w") as stream:
        lasting = Lasting(stream)
        for _ in range(2):
            assert lasting.write("a line\n") == 7
            lasting.flush()


class Full(io.StringIO):
    """A file on a disk that has no room."""

    full = True

    def flush(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_output_that_is_the_work_of_a_command_is_not_lost_in_silence() -> None:
    with pytest.raises(OSError, match="No space left"):
        Lasting(Full()).flush()
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*LONGTRAIN, "recipes", "show", "quickstart"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr


def test_a_full_disk_is_told_each_time_that_it_fills(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Full()
    lasting = Lasting(stream, keep_going=True)
    for full in (True, True, False, True):
        stream.full = full
        lasting.write("a line")
        lasting.flush()
    remark = "WARNING: output: No space left on device: the work goes on, what it prints meanwhile is lost\n"
    assert capsys.readouterr().err == 2 * remark


@pytest.fixture
def disk(fresh: None) -> Iterator[Path]:
    """A file system of 80 MiB."""
    with mounted(Path("disk").absolute(), "80m") as folder:
        yield folder


# `longtrain ARGUMENTS`, on a disk that is full between the reports of two steps
FILLING = """
import sys
from pathlib import Path
from longtrain.cli import main
from longtrain.train import loop

first, last, metrics, filler = int(sys.argv.pop(1)), int(sys.argv.pop(1)), loop._metrics, Path("disk/filler")

def report(run, *rest):
    if run.progress.step == first:
        run.settle()
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
    if run.progress.step == last:
        filler.unlink()
    return metrics(run, *rest)

loop._metrics = report
main()
"""


def trained_on(disk: Path, first: int, last: int, unbuffered: str) -> subprocess.CompletedProcess[str]:
    """24 steps with a checkpoint after every third, all reports and output on a disk that is full from step `first` to `last`.
    unbuffered: as Python's environment variable."""
    settings = ("output=disk/run", "training.steps=24", "checkpoint.every=3", "checkpoint.keep=9", "evaluation.every=null")
    words = ["--recipe", "recipe.yaml", *(word for setting in settings for word in ("--set", setting))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    # the rest of a page that a file has can be written on a full disk too
    (disk / "log").write_text("-" * 3000 + "\n")
    with (disk / "log").open("a") as log:
        command = [sys.executable, "-c", FILLING, str(first), str(last), "train", *words]
        done = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True, timeout=120, env=environment, check=False)
    assert "Traceback" not in done.stderr
    log, metrics = disk / "log", disk / "run" / "metrics.jsonl"
    assert done.stderr.count(f"WARNING: <stdout> to {log}: No space left on device: the work goes on") == 1, done.stderr
    assert done.stderr.count("metrics.jsonl: No space left on device: training goes on, and its reports from step") == 1
    assert "disk/run/metrics.jsonl" in done.stderr
    assert metrics.stat().st_size > 1000
    return done


def steps_in(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def test_training_outlives_a_disk_that_fills_and_is_emptied(disk: Path) -> None:
    done = trained_on(disk, 4, 20, "")
    assert done.returncode == 0, done.stderr
    assert "disk/run/metrics.jsonl can be written again: it has the reports of steps" in done.stderr
    assert steps_in(disk / "run" / "metrics.jsonl") == list(range(1, 25))
    found = complete(disk / "run" / "checkpoints")
    assert [path.name for path in found] == [f"step-{step:08d}" for step in (3, 21, 24)]
    for path in found:
        verify(path)
    assert (disk / "log").read_text().endswith("Hugging Face checkpoint: disk/run/huggingface\n")


def test_what_a_disk_that_stays_full_has_lost_is_told(disk: Path) -> None:
    done = trained_on(disk, 4, 99, "1")
    assert done.returncode == 2
    *_, lost, refused = done.stderr.splitlines()
    assert "free on its disk" in refused
    steps = steps_in(disk / "run" / "metrics.jsonl")
    assert steps == list(range(1, len(steps) + 1))
    told = f"the reports of steps {len(steps) + 1} to 24 are lost"
    assert lost == f"ERROR: disk/run/metrics.jsonl: No space left on device: {told}"
    verify(disk / "run" / "checkpoints" / "step-00000003")


def test_a_disk_that_is_too_small_is_told_before_the_first_step(disk: Path) -> None:
    (disk / "filler").write_bytes(bytes((80 << 20) - (600 << 10)))
    words = (*LONGTRAIN, "train", "--recipe", "recipe.yaml", "--set", "output=disk/run", "--set", "training.steps=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 2
    warning, *_, refused = (line for line in (done.stdout + done.stderr).splitlines() if "free on" in line)
    assert warning.startswith("warning: disk/run: checkpoints to come take up to ")
    assert "MiB are free on its disk" in refused

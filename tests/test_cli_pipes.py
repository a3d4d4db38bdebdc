"""What becomes of a command whose output nobody reads any more, through real pipes."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longtrain.cli.terminal import Lasting
from longtrain.train.checkpoint_folder import verify
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
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_else_goes_wrong_is_told() -> None:
    with pytest.raises(OSError, match="No space left"):
        Lasting(Full()).write("a line")

"""scripts/slurm.sh: what each node of a job would start, by stand-ins for Slurm's commands and torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed import run

from tests.user import REPOSITORY

SLURM = REPOSITORY / "scripts" / "slurm.sh"
STUBS = {
    # prints the names that the list stands for, one by one
    "scontrol": '[ "$*" = "show hostnames node[07-08]" ] || exit 1\necho node07\nsleep 0.1\necho node08',
    # one task a node, each with its own number and GPUs; the first failure is srun's
    "srun": 'echo "srun $1" >> calls\nshift\nfor n in 0 1; do SLURM_NODEID=$n SLURM_GPUS_ON_NODE=${GPUS-} "$@" || exit $?; done',
    "torchrun": """
if [ "$*" = --help ]; then echo "usage: torchrun ${OPTIONS-[--shutdown-timeout SECONDS]}"; exit; fi
printf "%s\\0" "$OMP_NUM_THREADS" "$@" > "torchrun-$SLURM_NODEID"
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > patience
exit "${FAILURE:-0}"
""",
}
RECIPE = ["--recipe", "llama-7b-128k", "--set", "training.steps=20000", "--set", "data.path=a folder/with 'quotes' and $HOME"]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job of two nodes with 8 GPUs each."""
    for name, body in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    values = {"SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "GPUS": "8"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    # Slurm runs a copy of the script, from the folder that the job was submitted in
    shutil.copy(SLURM, tmp_path / "slurm_script")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(*words: str) -> int:
    return subprocess.run(["bash", "slurm_script", *words], timeout=30).returncode


def started(node: int) -> list[str]:
    """Threads, and the words that torchrun was given."""
    return Path(f"torchrun-{node}").read_text().split("\0")[:-1]


def test_each_node_starts_one_torchrun(job: Path) -> None:
    assert submit(*RECIPE) == 0
    assert Path("calls").read_text() == "srun --kill-on-bad-exit=1\n"
    for node in (0, 1):
        meeting = ["--master-addr", "node07", "--master-port", str(20000 + 123456 % 20000)]
        ranks = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "8"]
        assert started(node) == ["1", *ranks, *meeting, "scripts/train.py", *RECIPE]


def test_jobs_have_ports_of_their_own(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for number in ("123457", "39999", "40000", "7"):
        monkeypatch.setenv("SLURM_JOB_ID", number)
        assert submit(*RECIPE) == 0
        words = started(1)
        ports.add(int(words[words.index("--master-port") + 1]))
    assert len(ports) == 4
    assert all(20000 <= port < 40000 for port in ports)


def test_nodes_without_gpus_and_own_threads(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUS")
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert submit(*RECIPE) == 0
    words = started(0)
    assert words[0] == "6"
    assert words[words.index("--nproc-per-node") + 1] == "1"


def test_the_exit_code_is_the_runs(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILURE", "3")
    assert submit(*RECIPE) == 3
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[99]")
    for node in (0, 1):
        Path(f"torchrun-{node}").unlink(missing_ok=True)
    assert submit(*RECIPE) != 0
    assert not Path("torchrun-0").exists(), "without a first node nothing is started"


def test_torchrun_waits_as_long_as_slurm(job: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise it kills the ranks while they save."""
    assert submit() == 0
    assert Path("patience").read_text() == "290\n"
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "890")
    assert submit() == 0
    assert Path("patience").read_text() == "890\n"
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("OPTIONS", "[--nnodes N]")
    assert submit() == 0
    assert "WARNING: the torchrun of this torch kills its ranks 30 s after" in capfd.readouterr().err


def test_this_torchrun_can_wait() -> None:
    """What slurm.sh looks for in its help, and the variable that it sets."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    wanted = run.get_args_parser().format_help()
    assert ("--shutdown-timeout" in wanted and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in wanted) == (version >= (2, 12))


def test_options_of_the_job() -> None:
    """Those that a run needs: one torchrun a node, a signal in time, and the same command again after a preemption."""
    options = {line.removeprefix("#SBATCH ").strip() for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH ")}
    assert {"--ntasks-per-node=1", "--requeue", "--signal=TERM@300", "--open-mode=append"} <= options

"""Two torchruns as on two hosts, also of two names: with one folder between them they train one ring, with a folder each they are
refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ("tests.desks",)
# as scripts/train.py, but a file that is not there is not waited for
IMPATIENT = """
from longtrain.cli import train_main
from longtrain.train.run_folder import check_shared
check_shared.__kwdefaults__["patience"] = 0.5
train_main()
"""
OVERRIDES = ("parallel.cp=2", "training.steps=2")
NAMES = ("host-a", "host-b")
# a command on a host of this name, in a namespace of its own
NAMED = (
    "unshare",
    "--uts",
    sys.executable,
    "-c",
    "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])",
)


@pytest.fixture
def names() -> tuple[str, str]:
    """Of two hosts that this machine can pretend to be."""
    if shutil.which(NAMED[0]) is None:
        pytest.skip("there is no unshare")
    tried = subprocess.run([*NAMED, NAMES[0], "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"another host name is not permitted here: {tried.stderr.strip()[-80:]}")
    return NAMES


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("", 0))
        return place.getsockname()[1]


def two_hosts(folders: tuple[Path, Path], names: tuple[str, str] | None = None) -> list[tuple[int, str]]:
    """Exit code and output of the same command on both, each in its own current folder; without names both are this host."""
    port, started = str(free_port()), []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = folders[0].absolute() / "impatient.py"
    script.write_text(IMPATIENT)
    for number, folder in enumerate(folders):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        words += ["--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", port]
        words += [str(script), "--recipe", "recipe.yaml"]
        words += [word for override in OVERRIDES for word in ("--set", override)]
        if names is not None:
            words = [*NAMED, names[number], *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(words, cwd=folder, text=True, env=environment, **pipes))  # type: ignore[call-overload]
    try:
        texts = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, texts, strict=True)]


@pytest.mark.usefixtures("fresh")
def test_one_folder_between_two_hosts() -> None:
    (code, said), (other, more) = two_hosts((Path(), Path()))
    assert (code, other) == (0, 0), said + more
    assert "warning: each ring of 2 ranks reaches over hosts of 1" in said
    assert "step 2/2" in said
    assert "step 2/2" not in more, "the main rank reports"
    assert len(list(Path("run/checkpoints/step-00000002").glob("rank-*.safetensors"))) == 2


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_a_folder_on_each_of_two_hosts() -> None:
    Path("north").mkdir()
    for name in ("recipe.yaml", "data"):
        shutil.move(name, Path("north", name))
    shutil.copytree("north", "south")
    results = two_hosts((Path("north"), Path("south")))
    for code, said in results:
        assert code == 1, "torchrun's own"
        assert "output: the run's folder" in said
        assert "set output to a folder on a file system that all hosts share" in said
    assert not Path("north/run").exists()
    assert not Path("south/run").exists()


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_two_names_in_what_explains_a_run(names: tuple[str, str]) -> None:
    results = two_hosts((Path(), Path()), names)
    assert [code for code, _ in results] == [0, 0], results
    (line,) = Path("run/environment.jsonl").read_text().splitlines()
    assert json.loads(line)["ranks"] == {name: {"cpu": 1} for name in names}
    assert len(list(Path("run/checkpoints/step-00000002").glob("rank-*.safetensors"))) == 2


@pytest.mark.usefixtures("fresh")
def test_hosts_that_do_not_share_a_folder_are_named(names: tuple[str, str]) -> None:
    for folder in ("north", "south"):
        shutil.copytree("data", Path(folder, "data"))
        shutil.copy("recipe.yaml", folder)
    for code, said in two_hosts((Path("north"), Path("south")), names):
        assert code == 1, "torchrun's own"
        assert f"the run's folder {Path('north/run').absolute()} of {names[0]} is another one on {names[1]}: every rank" in said


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_checkpoints_on_a_disk_of_each_host() -> None:
    """The run's folder is shared, and links to what is not."""
    Path("run").mkdir()
    Path("run/checkpoints").symlink_to("/proc/self/cwd/local")
    for folder in (Path("north"), Path("south")):
        Path(folder, "local").mkdir(parents=True)
        for name in ("recipe.yaml", "data", "run"):
            Path(folder, name).symlink_to(Path(name).absolute())
    for code, said in two_hosts((Path("north"), Path("south"))):
        assert code == 1, "torchrun's own"
        assert f"output: the run's folder {Path('north/run/checkpoints').absolute()} of" in said
        assert "set output to a folder on a file system that all hosts share" in said
    assert [path.name for path in Path("run").iterdir()] == ["checkpoints"], "no trace"

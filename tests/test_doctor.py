"""`longtrain doctor` on machines that are not here: answers are made up, and so are processes that hang or die."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longtrain.doctor import probes
from longtrain.doctor.ask import Answer, ask
from longtrain.doctor.judge import Finding, Level, judge, worst
from longtrain.doctor.report import to_json, to_text
from tests.user import command, process

GIB = 1 << 30
H100 = {"name": "NVIDIA H100", "capability": [9, 0], "memory": 80 * GIB, "free": 79 * GIB}
LAPTOP: dict[str, dict[str, Any]] = {
    "host": {
        "python": "3.11.7",
        "platform": "Linux",
        "cores": 8,
        "memory": 16 * GIB,
        "shared_memory": 8 * GIB,
        "compiler": None,
        "python_header": False,
        "driver": False,
    },
    "packages": {
        "torch": "2.13.0",
        "triton": None,
        "deepspeed": "0.19.8",
        "wandb": None,
        "tensorboard": None,
    },
    "disk": {"folder": "/home/me", "free": 100 * GIB, "inodes": 1_000_000, "refused": None, "filesystem": "ext4"},
    "torch": {"version": "2.13.0+cpu", "cuda": None, "distributed": True, "gloo": True, "nccl": None},
    "variables": {"wandb_key": False, "wandb_host": "api.wandb.ai", "compiler": None},
    "network": {"host": "laptop", "address": "127.0.1.1", "port": "29500", "free": True},
    "locks": {"root": "/home/me/.cache/torch_extensions", "locks": {}},
    "gpus": {"gpus": []},
    "links": {"without_access": [], "kinds": []},
    "kernels": {
        "device": "cpu",
        "attention": "memory_efficient",
        "others": {"triton": "runs on CUDA GPUs, not on cpu"},
        "by_name": ["memory_efficient"],
        "fused": [],
        "plain": ["norm", "loss"],
    },
    "deepspeed": {"imported": True},
}
SERVER = {
    **LAPTOP,
    "host": {**LAPTOP["host"], "compiler": "/usr/bin/gcc", "python_header": True, "driver": True},
    "packages": {**LAPTOP["packages"], "triton": "3.6.0", "torch": "2.11.0+cu130"},
    "torch": {"version": "2.11.0+cu130", "cuda": "13.0", "distributed": True, "gloo": True, "nccl": "2.28.3"},
    "gpus": {"gpus": [H100, H100]},
    "links": {"without_access": [], "kinds": ["NV18"]},
    "kernels": {
        "device": "cuda",
        "attention": "triton",
        "others": {"reference": "slower"},
        "by_name": ["triton"],
        "fused": ["norm", "loss"],
        "plain": [],
    },
}


def found(machine: dict[str, dict[str, Any]], question: str = "", **other: Any) -> list[Finding]:
    """What is said of a machine whose answer to one question is another one."""
    told = {**machine, question: {**machine[question], **other}} if question else machine
    return judge({name: Answer(facts) for name, facts in told.items()})


@pytest.mark.parametrize("machine", [LAPTOP, SERVER], ids=["laptop", "server"])
def test_nothing_is_wrong(machine: dict[str, dict[str, Any]]) -> None:
    findings = found(machine)
    assert worst(findings).exit_code == 0
    assert to_text(findings)[-1] == "nothing stands against training here"


def test_what_a_laptop_is_told() -> None:
    lines = to_text(found(LAPTOP))
    assert "note     GPUs           none: training runs on the CPU, good for trying things out" in lines
    assert "note     triton         not installed: attention and layers run in plain torch" in lines
    assert "ok       attention      not triton: runs on CUDA GPUs, not on cpu" in lines


def test_what_a_server_is_told() -> None:
    lines = to_text(found(SERVER))
    assert "ok       GPU 1          NVIDIA H100, 80 GiB, compute capability 9.0" in lines
    assert "ok       links          NV18" in lines
    assert "ok       fused layers   norm, loss" in lines


OLD = {**H100, "name": "NVIDIA V100", "capability": [7, 0]}
BUSY = {**H100, "free": 20 * GIB}
CASES: list[tuple[dict[str, dict[str, Any]], str, dict[str, Any], Level, str, str]] = [
    (LAPTOP, "packages", {"deepspeed": None}, Level.BROKEN, "not installed", "pip install 'deepspeed>=0.19.5'"),
    (LAPTOP, "packages", {"deepspeed": "0.19.4"}, Level.BROKEN, "0.19.4 is older than 0.19.5", "pip install"),
    (LAPTOP, "packages", {"torch": "2.9.1+cu128"}, Level.BROKEN, "2.9.1+cu128 is older than 2.10", "pip install 'torch>=2.10'"),
    (LAPTOP, "packages", {"wandb": "0.31.0"}, Level.NOTE, "no key for api.wandb.ai found", "wandb login"),
    (SERVER, "packages", {"triton": None}, Level.WARNING, "plain torch, which is slow on GPUs", "pip install 'triton>=3.6'"),
    (LAPTOP, "host", {"driver": True}, Level.BROKEN, "this torch was built for the CPU only", "built for CUDA"),
    (SERVER, "host", {"compiler": None}, Level.BROKEN, "no C compiler", "install gcc"),
    (SERVER, "variables", {"CC": "/opt/cc"}, Level.BROKEN, "CC=/opt/cc is no program", "unset CC"),
    (SERVER, "host", {"python_header": False}, Level.BROKEN, "no Python.h", "python3-dev"),
    (SERVER, "host", {"shared_memory": 64 << 20}, Level.WARNING, "/dev/shm has 64 MiB", "--shm-size"),
    (LAPTOP, "torch", {"gloo": False}, Level.BROKEN, "built without gloo", "its own wheels"),
    (SERVER, "torch", {"nccl": None}, Level.BROKEN, "GPUs cannot talk", "with NCCL"),
    (SERVER, "gpus", {"gpus": []}, Level.BROKEN, "torch (CUDA 13.0) sees none", "CUDA_VISIBLE_DEVICES"),
    (SERVER, "gpus", {"gpus": [H100, BUSY]}, Level.WARNING, "60.0 GiB of it are in use already", "nvidia-smi"),
    (SERVER, "gpus", {"gpus": [OLD]}, Level.WARNING, "need compute capability 8.0", "fp16 or fp32"),
    (SERVER, "gpus", {"gpus": [H100, OLD]}, Level.WARNING, "they are not alike", "CUDA_VISIBLE_DEVICES"),
    (SERVER, "links", {"without_access": [[0, 1]]}, Level.WARNING, "GPUs 0-1 cannot reach each other", "prefer dp to cp"),
    (SERVER, "links", {"kinds": ["NV18", "PHB"]}, Level.NOTE, "not all GPUs are joined by NVLink (NV18, PHB)", ""),
    (SERVER, "kernels", {"attention": "memory_efficient"}, Level.NOTE, "right but slow", "takes triton by name"),
    (SERVER, "kernels", {"fused": [], "plain": ["norm"]}, Level.WARNING, "plain torch for norm", ""),
    (LAPTOP, "disk", {"refused": "Read-only file system"}, Level.BROKEN, "cannot be written: Read-only file system", "output"),
    (LAPTOP, "disk", {"free": GIB // 2}, Level.BROKEN, "is full", "free some space"),
    (LAPTOP, "disk", {"free": 5 * GIB}, Level.WARNING, "5 GiB free", "12 bytes a parameter"),
    (LAPTOP, "disk", {"inodes": 5}, Level.BROKEN, "is full", "free some space"),
    (LAPTOP, "disk", {"inodes": 5000}, Level.WARNING, "only 5000 inodes", "delete small files"),
    (LAPTOP, "disk", {"filesystem": "tmpfs"}, Level.WARNING, "is in memory", "set output elsewhere"),
    (LAPTOP, "disk", {"filesystem": "overlay"}, Level.NOTE, "goes with its container", ""),
    (LAPTOP, "network", {"address": None}, Level.WARNING, "has no address", "/etc/hosts"),
    (LAPTOP, "network", {"free": False}, Level.WARNING, "29500, where torchrun lets ranks meet, is taken", "--master-port"),
    (LAPTOP, "locks", {"locks": {"/c/py311/op/lock": 7200.0}}, Level.WARNING, "is 2.0 hours old", "rm /c/py311/op/lock"),
    (LAPTOP, "locks", {"locks": {"/c/py311/op/lock": 5.0}}, Level.NOTE, "is 5 s old", ""),
    (SERVER, "variables", {"TRITON_INTERPRET": "1"}, Level.WARNING, "kernels are interpreted", "unset TRITON_INTERPRET"),
    (LAPTOP, "variables", {"TRITON_INTERPRET": "1"}, Level.NOTE, "kernels are interpreted", ""),
    (SERVER, "variables", {"NCCL_P2P_DISABLE": "1"}, Level.WARNING, "talk through host memory", "unset NCCL_P2P_DISABLE"),
]


@pytest.mark.parametrize(("machine", "question", "other", "level", "text", "advice"), CASES)
def test_what_is_wrong(
    machine: dict[str, dict[str, Any]], question: str, other: dict[str, Any], level: Level, text: str, advice: str
) -> None:
    findings = found(machine, question, **other)
    told = [finding for finding in findings if text in finding.text and finding.level == level]
    assert len(told) == 1, [finding.text for finding in findings]
    assert advice in (told[0].advice or "")
    assert worst(findings) == level
    assert worst(findings).exit_code == {Level.NOTE: 0, Level.WARNING: 1, Level.BROKEN: 2}[level]


def test_a_compiler_by_name_is_enough() -> None:
    """For what Triton asks first."""
    named = {"variables": {**SERVER["variables"], "CC": "icx", "compiler": "/opt/icx"}}
    assert worst(found({**SERVER, **named}, "host", compiler=None)).exit_code == 0


def test_deepspeed_that_cannot_be_imported() -> None:
    answers = {name: Answer(facts) for name, facts in LAPTOP.items()}
    answers["deepspeed"] = Answer(problem="ImportError: cannot import name 'log' from 'torch'")
    told = [finding for finding in judge(answers) if finding.what == "deepspeed"]
    assert [finding.level for finding in told] == [Level.BROKEN]
    assert "install deepspeed anew" in (told[0].advice or "")


def test_network_file_systems_are_for_several_nodes() -> None:
    for kind in ("nfs4", "lustre", "fuse.weka"):
        assert not any("local to this machine" in finding.text for finding in found(LAPTOP, "disk", filesystem=kind))


def test_an_unanswered_question() -> None:
    answers = {name: Answer(facts) for name, facts in SERVER.items()}
    answers |= {"gpus": Answer(problem="gave no answer within 90 s"), "links": Answer(problem="not asked, because of gpus")}
    findings = judge(answers)
    assert worst(findings) == Level.BROKEN
    assert Finding(Level.NOTE, "links", "not asked, because of gpus") in findings
    (told,) = [finding for finding in findings if finding.what == "gpus"]
    assert "nvidia-smi" in (told.advice or "")
    answers["host"] = answers["packages"] = Answer(problem="OSError: something")
    assert worst(judge(answers)) == Level.BROKEN, "one answer missing breaks no other judgement"


PRINT = "import json, sys, time\nprint(json.dumps({'asking': 'host'}))\nprint(json.dumps({'name': 'host', 'facts': {'a': 1}}))\n"
PRINT += "print(json.dumps({'asking': 'packages'}), flush=True)\n"


@pytest.mark.parametrize(
    ("ending", "problem"),
    [
        ("time.sleep(600)", "gave no answer within 3 s"),
        ("sys.stderr.write('Traceback\\nImportError: libcuda\\n'); sys.exit(1)", "ended the process: ImportError: libcuda"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended the process: no message"),
    ],
)
def test_a_question_that_hangs_or_dies(tmp_path: Path, ending: str, problem: str) -> None:
    begin = time.monotonic()
    answers = ask(tmp_path, patience=3.0, command=[sys.executable, "-c", PRINT + ending])
    assert time.monotonic() - begin < 20
    assert answers["host"] == Answer({"a": 1})
    assert answers["packages"].problem == problem
    assert {answer.problem for name, answer in answers.items() if name not in ("host", "packages")} == {
        "not asked, because of packages"
    }


def test_json_holds_everything() -> None:
    answers = {name: Answer(facts) for name, facts in LAPTOP.items()}
    told = json.loads(to_json(judge(answers), answers))
    assert told["exit_code"] == 0
    assert told["answers"]["host"]["facts"]["cores"] == 8
    assert {finding["level"] for finding in told["findings"]} == {"ok", "note"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Answer]]:
    """The answers of this machine, asked as a user asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "a secret")
        patch.setenv("MASTER_PORT", "nonsense")
        extensions = tmp_path_factory.mktemp("extensions")
        (extensions / "op").mkdir()
        (extensions / "op" / "lock").touch()
        os.utime(extensions / "op" / "lock", (0, 0))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        yield ask(tmp_path_factory.mktemp("desk") / "not" / "there")


def test_every_question_has_an_answer_here(here: dict[str, Answer]) -> None:
    assert list(here) == list(probes.PROBES)
    assert {name: answer.problem for name, answer in here.items() if answer.problem is not None} == {}
    assert here["variables"].facts["wandb_key"] is True
    assert "a secret" not in json.dumps([answer.facts for answer in here.values()])
    assert here["disk"].facts["refused"] is None
    assert not here["network"].facts["free"]
    findings = judge(here)
    assert any("hours old" in finding.text for finding in findings)


def test_a_file_is_no_place_for_runs(tmp_path: Path) -> None:
    file = tmp_path / "docs.jsonl"
    file.touch()
    for folder in (file, file / "runs"):
        facts = probes.disk(folder)
        assert (facts["folder"], facts["refused"]) == (str(file), "it is a file, not a folder")
    assert probes.disk(tmp_path / "not" / "there")["folder"] == str(tmp_path)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {name: Answer(facts) for name, facts in LAPTOP.items()}
    monkeypatch.setattr("longtrain.doctor.report.ask", lambda folder: answers)
    said = command("doctor")
    assert said.code == 0
    assert said.text.endswith("nothing stands against training here\n")
    answers["locks"] = Answer({"root": "/c", "locks": {"/c/op/lock": 7200.0}})
    assert command("doctor").code == 1
    answers["torch"] = Answer(problem="ImportError: libcudart.so.13")
    said = command("doctor", "--json")
    assert said.code == 2
    assert json.loads(said.text)["exit_code"] == 2


def test_without_torch_the_doctor_still_answers(tmp_path: Path) -> None:
    """A broken torch is what it is for."""
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "import longtrain.doctor.report, longtrain.doctor.probes as probes\n"
        "from pathlib import Path\n"
        "print([name for name in ('host', 'packages', 'disk') if probes.PROBES[name](Path('x'))])\n"
    )
    done = process(sys.executable, "-c", code)
    assert done.stdout == "['host', 'packages', 'disk']\n", done.stderr


def test_deepspeed_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(probes, "version", lambda name: "0.19.8")
    with pytest.raises(ImportError):
        probes.deepspeed(tmp_path)


def test_the_key_is_one_for_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_text("machine wandb.lab:8080 login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for url, host, key in (
        ("http://wandb.lab:8080", "wandb.lab:8080", True),
        ("https://me:secret@wandb.other", "wandb.other", False),
        ("", "api.wandb.ai", False),
    ):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        facts = probes.variables(tmp_path)
        assert (facts["wandb_host"], facts["wandb_key"]) == (host, key)
        assert "secret" not in str(facts)


def test_the_compiler_that_a_variable_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for named, found in ((sys.executable, sys.executable), (str(tmp_path / "none"), None)):
        monkeypatch.setenv("CC", named)
        assert probes.variables(tmp_path)["compiler"] == found
    monkeypatch.delenv("CC")
    assert probes.variables(tmp_path)["compiler"] is None


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert not probes.port_is_free(taken.getsockname()[1])
    assert not probes.port_is_free(99_999_999)


def test_file_systems(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"overlay / overlay rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\ntmpfs {tmp_path}/my\\040runs tmpfs rw 0 0\n")
    (tmp_path / "my runs").mkdir()
    assert probes.filesystem(Path("/"), mounts) == "overlay"
    assert probes.filesystem(tmp_path, mounts) == "nfs4"
    assert probes.filesystem(tmp_path / "my runs", mounts) == "tmpfs"
    assert probes.filesystem(tmp_path, tmp_path / "none") is None


def test_locks(tmp_path: Path) -> None:
    for name in ("op", "py311_cpu/op", "py311_cpu/deep/er"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "op" / "lock").touch()
    (tmp_path / "py311_cpu" / "op" / "lock").touch()
    (tmp_path / "py311_cpu" / "op" / "op.so").touch()
    assert probes.find_locks(tmp_path) == [tmp_path / "op" / "lock", tmp_path / "py311_cpu" / "op" / "lock"]
    assert probes.find_locks(tmp_path / "none") == []


def test_links() -> None:
    table = (
        "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPHB\tSYS\t0-15\nGPU1\tNV18\t X \tNV18\tSYS\t0-15\n"
        "GPU2\tPHB\tNV18\t X \tSYS\t0-15\nNIC0\tSYS\tSYS\tSYS\t X \n\nLegend:\n  X = Self\n"
    )
    assert probes.link_kinds(table, 3) == ["NV18", "PHB"]
    assert probes.link_kinds("", 2) == []

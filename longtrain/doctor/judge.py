"""What the answers of a machine mean for training there, and one line of advice each. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from longtrain.doctor.ask import NOT_ASKED, Answer

NETWORK = ("nfs", "lustre", "gpfs", "cifs", "smb", "ceph", "beegfs", "afs", "fuse.", "9p", "wekafs", "glusterfs")
SCARCE, TIGHT = 1 << 30, 20 << 30
"""Free bytes: below the first no checkpoint fits, below the second few of a model of a billion parameters (12 GB each)."""
INODES = 10_000
SHARED_MEMORY = 1 << 30
STALE = 600
"""Seconds after which a build is taken for dead."""
OLDEST = {"torch": (2, 10), "deepspeed": (0, 19, 5), "triton": (3, 6)}


class Level(IntEnum):
    """How bad it is; the exit code for scripts is 0 for the first two, then 1, then 2."""

    OK = 0
    NOTE = 1
    WARNING = 2
    BROKEN = 3

    @property
    def exit_code(self) -> int:
        return max(0, self - 1)


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    level: Level
    what: str
    text: str
    advice: str | None = None


def judge(answers: Mapping[str, Answer]) -> list[Finding]:
    """Findings in the order of the questions."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        answer = answers[name]
        if answer.problem is None:
            findings += check(answers)
        elif answer.problem.startswith(NOT_ASKED):
            findings.append(Finding(Level.NOTE, name, answer.problem))
        else:
            findings.append(Finding(UNANSWERED.get(name, Level.WARNING), name, answer.problem, ADVICE.get(name)))
    return findings


def worst(findings: Sequence[Finding]) -> Level:
    return max((finding.level for finding in findings), default=Level.OK)


def _host(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = answers["host"].facts
    memory = f"{facts['memory'] / 2**30:.0f} GiB of memory"
    yield Finding(Level.OK, "host", f"Python {facts['python']}, {facts['cores']} cores, {memory}, {facts['platform']}")
    gpus = answers["gpus"].facts.get("gpus", [])
    shared = facts["shared_memory"]
    if len(gpus) > 1 and shared is not None and shared < SHARED_MEMORY:
        advice = "start the container with --shm-size=8g or --ipc=host"
        yield Finding(Level.WARNING, "shared memory", f"/dev/shm has {shared / 2**20:.0f} MiB, and NCCL wants more", advice)
    variables = answers["variables"].facts
    named = variables.get("CC")
    compiler = facts["compiler"] if named is None else variables["compiler"]
    if gpus and (compiler is None or not facts["python_header"]):
        missing = "no Python.h" if compiler else "no C compiler" if named is None else f"CC={named} is no program"
        advice = "install the headers of Python (python3-dev)" if compiler else "install gcc" if named is None else "unset CC"
        yield Finding(Level.BROKEN, "compiler", f"{missing}: Triton builds its launchers with it", advice)


def _packages(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = answers["packages"].facts
    has_gpus = bool(answers["gpus"].facts.get("gpus"))
    for name in ("torch", "deepspeed", "triton"):
        found, oldest = facts[name], ".".join(map(str, OLDEST[name]))
        if found is not None and _numbers(found) >= OLDEST[name]:
            # more about these is told further down
            if name == "triton":
                yield Finding(Level.OK, name, found)
            continue
        need = Level.BROKEN if name != "triton" else Level.WARNING if has_gpus else Level.NOTE
        text = "not installed" if found is None else f"{found} is older than {oldest}"
        if name == "triton":
            text += ": attention and layers run in plain torch" + (", which is slow on GPUs" if has_gpus else "")
        yield Finding(need, name, text, None if need is Level.NOTE else f"pip install '{name}>={oldest}'")
    for name in ("wandb", "tensorboard"):
        text = facts[name] or "not installed, which matters only where a recipe's tracking asks for it"
        yield Finding(Level.OK if facts[name] else Level.NOTE, name, text)


def _disk(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = answers["disk"].facts
    kind = facts["filesystem"]
    where = f"{facts['folder']}" + (f" ({kind})" if kind else "")
    free = f"{facts['free'] / 2**30:.0f} GiB free"
    if facts["refused"]:
        yield Finding(Level.BROKEN, "disk", f"{where} cannot be written: {facts['refused']}", "set the recipe's output elsewhere")
    elif facts["free"] < SCARCE or (facts["inodes"] is not None and facts["inodes"] < 100):
        yield Finding(Level.BROKEN, "disk", f"{where} is full: {free}", "free some space, or set the recipe's output elsewhere")
    elif facts["free"] < TIGHT:
        advice = "a checkpoint takes 12 bytes a parameter: check that checkpoint.keep + 1 of them fit"
        yield Finding(Level.WARNING, "disk", f"{where}: {free}", advice)
    elif facts["inodes"] is not None and facts["inodes"] < INODES:
        yield Finding(Level.WARNING, "disk", f"{where}: {free}, but only {facts['inodes']} inodes", "delete small files there")
    else:
        yield Finding(Level.OK, "disk", f"{where}: {free}")
    if kind in ("tmpfs", "ramfs"):
        yield Finding(Level.WARNING, "disk", f"{where} is in memory", "checkpoints there are lost with it: set output elsewhere")
    elif kind == "overlay":
        yield Finding(Level.NOTE, "disk", f"{where} goes with its container: set output to a folder from outside, to keep runs")
    elif kind is not None and not kind.startswith(NETWORK):
        yield Finding(Level.NOTE, "disk", f"{kind} is local to this machine: several nodes need a folder that all of them share")


def _torch(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = answers["torch"].facts
    built = f"CUDA {facts['cuda']}" if facts["cuda"] else "the CPU only"
    if not facts["distributed"] or not facts["gloo"]:
        advice = "install torch from its own wheels"
        yield Finding(Level.BROKEN, "torch", f"{facts['version']} was built without gloo: ranks cannot talk", advice)
    yield Finding(Level.OK, "torch", f"{facts['version']}, built for {built}")
    if answers["host"].facts.get("driver") and not facts["cuda"]:
        advice = "install a torch wheel built for CUDA"
        yield Finding(Level.BROKEN, "torch", "there is an NVIDIA GPU, but this torch was built for the CPU only", advice)
    if facts["nccl"]:
        yield Finding(Level.OK, "NCCL", facts["nccl"])
    elif len(answers["gpus"].facts.get("gpus", [])) > 1:
        advice = "install a torch wheel with NCCL"
        yield Finding(Level.BROKEN, "NCCL", "torch was built without it: GPUs cannot talk", advice)


def _variables(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = dict(answers["variables"].facts)
    key, host = facts.pop("wandb_key"), facts.pop("wandb_host")
    del facts["compiler"]  # told of with the host
    if answers["packages"].facts.get("wandb") and not key:
        text = f"no key for {host} found: tracking.wandb=online would record offline"
        yield Finding(Level.NOTE, "wandb", text, "wandb login")
    if facts.get("TRITON_INTERPRET") not in (None, "", "0"):
        level = Level.WARNING if answers["gpus"].facts.get("gpus") else Level.NOTE
        text = "TRITON_INTERPRET is set: kernels are interpreted, thousands of times slower"
        yield Finding(level, "variables", text, "unset TRITON_INTERPRET" if level is Level.WARNING else None)
    if facts.get("NCCL_P2P_DISABLE") == "1":
        text = "NCCL_P2P_DISABLE=1: GPUs talk through host memory"
        yield Finding(Level.WARNING, "variables", text, "unset NCCL_P2P_DISABLE, unless runs hang without it")
    if facts:
        yield Finding(Level.OK, "variables", ", ".join(f"{name}={value}" for name, value in facts.items()))


def _network(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = answers["network"].facts
    if facts["address"] is None:
        advice = f"add {facts['host']} to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo on a machine of its own"
        text = f"the name of this machine, {facts['host']}, has no address: ranks may not find each other"
        yield Finding(Level.WARNING, "network", text, advice)
    if facts["free"]:
        yield Finding(Level.OK, "ports", f"{facts['port']} is free, for the ranks to meet at")
    else:
        advice = "torchrun --master-port N with another port, or --standalone, or end the run that holds it"
        yield Finding(Level.WARNING, "ports", f"{facts['port']}, where torchrun lets ranks meet, is taken or no port", advice)


def _locks(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = answers["locks"].facts
    for path, age in facts["locks"].items():
        if age > STALE:
            text = f"{path} is {age / 3600:.1f} hours old: a build died, and the next one waits for it for ever"
            yield Finding(Level.WARNING, "build locks", text, f"rm {path}")
        else:
            yield Finding(Level.NOTE, "build locks", f"{path} is {age:.0f} s old: something is being built, or died just now")
    if not facts["locks"]:
        yield Finding(Level.OK, "build locks", f"none under {facts['root']}")


def _gpus(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    gpus = answers["gpus"].facts["gpus"]
    if not gpus:
        if answers["host"].facts.get("driver"):
            cuda = answers["torch"].facts.get("cuda")
            advice = "see whether nvidia-smi answers, whether its CUDA version is at least torch's, and CUDA_VISIBLE_DEVICES"
            text = f"there is an NVIDIA GPU, but torch (CUDA {cuda}) sees none"
            # a torch for the CPU has been told of already
            if cuda:
                yield Finding(Level.BROKEN, "GPUs", text, advice)
        else:
            yield Finding(Level.NOTE, "GPUs", "none: training runs on the CPU, good for trying things out")
        return
    for index, gpu in enumerate(gpus):
        major, minor = gpu["capability"]
        text = f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, compute capability {major}.{minor}"
        yield Finding(Level.OK, f"GPU {index}", text)
        used = gpu["memory"] - gpu["free"]
        if used > 0.1 * gpu["memory"]:
            advice = "see nvidia-smi for the process that holds it"
            yield Finding(Level.WARNING, f"GPU {index}", f"{used / 2**30:.1f} GiB of it are in use already", advice)
        if (major, minor) < (8, 0):
            text = "Triton kernels and bf16 need compute capability 8.0"
            yield Finding(Level.WARNING, f"GPU {index}", text, "expect plain torch kernels, and train in fp16 or fp32")
    if len({gpu["name"] for gpu in gpus}) > 1:
        text = "they are not alike: all wait for the slowest, and for the one with the least memory"
        yield Finding(Level.WARNING, "GPUs", text, "choose like ones with CUDA_VISIBLE_DEVICES")


def _links(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts, count = answers["links"].facts, len(answers["gpus"].facts.get("gpus", []))
    if count < 2:
        return
    if facts["without_access"]:
        pairs = ", ".join(f"{i}-{j}" for i, j in facts["without_access"][:4])
        advice = "prefer dp to cp there; in a virtual machine or with an IOMMU, ask for peer-to-peer access"
        yield Finding(Level.WARNING, "links", f"GPUs {pairs} cannot reach each other's memory: rings go through the host", advice)
    elif facts["kinds"] and not all(kind.startswith("NV") for kind in facts["kinds"]):
        text = f"not all GPUs are joined by NVLink ({', '.join(facts['kinds'])}): rings are slower, longer sequences hide it"
        yield Finding(Level.NOTE, "links", text)
    else:
        yield Finding(Level.OK, "links", ", ".join(facts["kinds"]) or "every GPU reaches every other one")


def _kernels(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    facts = answers["kernels"].facts
    on_gpu = facts["device"] == "cuda"
    slow = on_gpu and facts["attention"] in ("memory_efficient", "reference")
    text = f"{facts['attention']} on {facts['device']}" + (", in plain torch, which is right but slow" if slow else "")
    able = [name for name in facts["by_name"] if name != facts["attention"]]
    advice = f"attention.kernel takes {' or '.join(able)} by name" if slow and able else None
    yield Finding(Level.NOTE if slow else Level.OK, "attention", text, advice)
    for name, why in facts["others"].items():
        yield Finding(Level.OK, "attention", f"not {name}: {why}")
    if facts["fused"]:
        yield Finding(Level.OK, "fused layers", ", ".join(facts["fused"]))
    if facts["plain"]:
        why = "Triton and a GPU of compute capability 8.0 are needed" if on_gpu else "Triton kernels are for GPUs"
        level = Level.WARNING if on_gpu else Level.OK
        yield Finding(level, "fused layers", f"plain torch for {', '.join(facts['plain'])}: {why}")


def _deepspeed(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    found = answers["packages"].facts.get("deepspeed")
    if answers["deepspeed"].facts["imported"] and found and _numbers(found) >= OLDEST["deepspeed"]:
        yield Finding(Level.OK, "deepspeed", found)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


CHECKS = {
    "host": _host,
    "packages": _packages,
    "torch": _torch,
    "gpus": _gpus,
    "links": _links,
    "kernels": _kernels,
    "deepspeed": _deepspeed,
    "disk": _disk,
    "network": _network,
    "locks": _locks,
    "variables": _variables,
}
# without these nobody can train; what else is not known may be harmless
UNANSWERED: dict[str, Level] = dict.fromkeys(["torch", "gpus", "disk", "kernels", "deepspeed"], Level.BROKEN)
ADVICE = {
    "torch": "install torch anew (pip install --force-reinstall torch), or activate the right environment",
    "gpus": "see whether nvidia-smi answers; if not, the driver or a GPU is stuck: reboot the machine, or ask who runs it",
    "deepspeed": "install deepspeed anew (pip install --upgrade --force-reinstall --no-deps deepspeed)",
    "disk": "the file system of the run's folder does not answer: choose another with --folder, and as the recipe's output",
}

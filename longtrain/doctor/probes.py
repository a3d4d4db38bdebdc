"""The questions, one after the other: `python -m longtrain.doctor.probes FOLDER` prints a JSON line before and after each.

They run in a process of their own because any of them may hang or crash: a driver, a dead network mount, a broken library. Torch
and what is built on it are imported inside the questions, so that those before them are answered without it.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from longtrain.cores import usable_cores

Facts = dict[str, Any]

PACKAGES = ("torch", "triton", "deepspeed", "wandb", "tensorboard")
VARIABLES = (
    "CC",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_INTERPRET",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
)
KEY = "WANDB_API_KEY"
WANDB = "https://api.wandb.ai"
DEFAULT_PORT = 29500
"""What torchrun takes where nothing else is said."""


def host(folder: Path) -> Facts:
    """Processor, memory, compiler: what Triton builds its launchers with."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shared = Path("/dev/shm")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "memory": pages,
        "shared_memory": shutil.disk_usage(shared).total if shared.is_dir() else None,
        "compiler": shutil.which("gcc") or shutil.which("clang"),
        "python_header": Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        "driver": bool(glob.glob("/dev/nvidia[0-9]*")),
    }


def packages(folder: Path) -> Facts:
    """Versions of what is installed, without importing it."""
    found: Facts = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def disk(folder: Path) -> Facts:
    """Where runs are written: the folder, or the nearest one above it that exists, and may be a file."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    usage = os.statvfs(place)
    try:
        with tempfile.TemporaryFile(dir=place):
            refused = None
    except NotADirectoryError:
        refused = "it is a file, not a folder"
    except OSError as error:
        refused = error.strerror
    return {
        "folder": str(place),
        "free": usage.f_bavail * usage.f_frsize,
        # some file systems make inodes as they need them, and report none
        "inodes": usage.f_favail if usage.f_files else None,
        "refused": refused,
        "filesystem": filesystem(place, Path("/proc/mounts")),
    }


def filesystem(place: Path, mounts: Path) -> str | None:
    """The type of the file system that a folder lies on, from the table of mounts; None where there is no table."""
    if not mounts.is_file():
        return None
    best = (-1, None)
    for line in mounts.read_text().splitlines():
        fields = line.split()
        # octal escapes stand for blanks
        point = Path(fields[1].encode().decode("unicode_escape"))
        if place.resolve().is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), fields[2])
    return best[1]


def torch(folder: Path) -> Facts:
    """Whether torch can be imported, and what it was built with."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    distributed = dist.is_available()
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "distributed": distributed,
        "gloo": distributed and dist.is_gloo_available(),
        "nccl": ".".join(map(str, nccl.version())) if distributed and dist.is_nccl_available() else None,
    }


def variables(folder: Path) -> Facts:
    """Environment variables that change what happens; of a key only whether it is there. compiler: the program that CC names."""
    from longtrain.parallel.launch import variables

    found: Facts = dict(variables(VARIABLES))
    others = variables([KEY, "NETRC", "WANDB_BASE_URL"])
    host = urlsplit(others.get("WANDB_BASE_URL") or WANDB).netloc.rpartition("@")[2]
    return found | {
        "compiler": shutil.which(found["CC"]) if "CC" in found else None,
        "wandb_host": host,
        "wandb_key": KEY in others or _in_netrc(host, others.get("NETRC")),
    }


def _in_netrc(host: str, file: str | None) -> bool:
    """file: None for the usual one."""
    import netrc

    try:
        return netrc.netrc(file and os.path.expanduser(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def network(folder: Path) -> Facts:
    """Whether processes of this machine can find each other."""
    from longtrain.parallel.launch import variables

    name, given = socket.gethostname(), variables(["MASTER_PORT"])
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = None
    port = given.get("MASTER_PORT", str(DEFAULT_PORT))
    return {"host": name, "address": address, "port": port, "free": port.isdecimal() and port_is_free(int(port))}


def port_is_free(port: int) -> bool:
    """Whether a process may listen there now."""
    with socket.socket() as listener:
        # as torch's store does: what a run that has just ended left behind does not count
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def locks(folder: Path) -> Facts:
    """Locks of builds of torch extensions (DeepSpeed's ops), with their age in seconds: a dead build leaves its lock behind."""
    from torch.utils.cpp_extension import get_default_build_root

    from longtrain.parallel.launch import variables

    root = Path(variables(["TORCH_EXTENSIONS_DIR"]).get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    now = time.time()
    return {"root": str(root), "locks": {str(path): now - path.stat().st_mtime for path in find_locks(root)}}


def find_locks(root: Path) -> list[Path]:
    """In the folder of each extension, itself below a folder of the Python version, or not."""
    return sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})


def gpus(folder: Path) -> Facts:
    """Every GPU that torch sees. Initialises CUDA."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = [properties.major, properties.minor]
        found.append({"name": properties.name, "capability": capability, "memory": total, "free": free})
    return {"gpus": found}


def links(folder: Path) -> Facts:
    """How GPUs reach each other: pairs without direct access, and the kinds of links."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    kinds: list[str] = []
    if pairs and shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20)
        kinds = link_kinds(done.stdout, count)
    return {"without_access": [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)], "kinds": kinds}


def link_kinds(table: str, count: int) -> list[str]:
    """Between any two of `count` GPUs, from the table of `nvidia-smi topo -m`: NV18, PIX, PHB, SYS ..."""
    rows = [line.split() for line in table.splitlines() if line.startswith("GPU")]
    return sorted({kind for row in rows for kind in row[1 : count + 1]} - {"X"})


def kernels(folder: Path) -> Facts:
    """Which attention kernel and fused layers training would take here, and why not the others."""
    import torch

    from longtrain.attention.protocol import Needs
    from longtrain.kernels.layers import FUSABLE, fusable
    from longtrain.kernels.registry import kernels, select

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # of a LLaMA with packed documents, on one rank
    needs = Needs(frozenset(("causal",)), True, frozenset(), 128, 128, dtype, device)
    choice = select(needs)
    by_name = [kernel.name for kernel in kernels() if not kernel.refuses(needs)]
    fused = fusable(device)
    return {
        "device": device,
        "attention": choice.kernel.name,
        "others": choice.others,
        "by_name": by_name,
        "fused": list(fused),
        "plain": [name for name in FUSABLE if name not in fused],
    }


def deepspeed(folder: Path) -> Facts:
    """Whether DeepSpeed, where it is installed, can be imported: it takes names from inside torch that come and go."""
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return {"imported": False}
    from longtrain.parallel.deepspeed import load

    load()
    return {"imported": True}


PROBES: dict[str, Callable[[Path], Facts]] = {
    "host": host,
    "packages": packages,
    "disk": disk,
    "torch": torch,
    "variables": variables,
    "network": network,
    "locks": locks,
    "gpus": gpus,
    "links": links,
    "kernels": kernels,
    "deepspeed": deepspeed,
}
"""What can hang comes last."""


def main(folder: Path) -> None:
    # libraries print to the standard output, where the answers go
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name, probe in PROBES.items():
        print(json.dumps({"asking": name}), file=answers, flush=True)
        try:
            answer = {"facts": probe(folder)}
        except Exception as error:
            answer = {"problem": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, **answer}), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

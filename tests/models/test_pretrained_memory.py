"""Reading weights takes no more memory than the parameters and little more than one shard, also straight into ZeRO's partition."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.local import LocalAttend
from longtrain.models import Decoder
from longtrain.models.config_json import read_config
from longtrain.models.pretrained import load_pretrained, open_pretrained
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import build_model
from tests.distributed import run_ranks

STATUS = Path("/proc/self/status")
MIB = 2**20
SHARD = 8 * MIB
M_MMAP_THRESHOLD = -3
"""Of mallopt(3), which only glibc has."""
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "RssAnon" not in STATUS.read_text(),
    reason="reads /proc/self/status, and sets glibc's malloc",
)


def resident() -> int:
    """Bytes of this process in memory: its own, and those of files that it has mapped."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")) * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 weights of 74 MiB, the largest tensor of 2."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=10,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    path = tmp_path_factory.mktemp("large")
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size=SHARD)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) >= 9
    assert max(sizes) < SHARD + MIB
    return path


def decoder(folder: Path) -> Decoder:
    return Decoder(read_config(folder), LocalAttend(ReferenceKernel()))


def growth(
    folder: Path, model: Any, gathered: Callable[[nn.Parameter], AbstractContextManager[object]], *, reads: bool = True
) -> tuple[int, int]:
    """Bytes by which this process grows while it reads the weights: at most while a parameter is filled, and afterwards."""
    weights = open_pretrained(folder, model.config)
    for parameter in model.parameters():  # the model's own memory is there before
        with torch.no_grad(), gathered(parameter):
            parameter.zero_()
    before, most = resident(), 0

    @contextmanager
    def watched(parameter: nn.Parameter) -> Iterator[None]:
        nonlocal most
        with gathered(parameter):
            yield
            most = max(most, resident() - before)

    load_pretrained(model, weights, watched, reads=reads)
    return most, resident() - before


def test_one_shard_at_a_time(folder: Path) -> None:
    model = decoder(folder)
    most, after = growth(folder, model, lambda parameter: nullcontext())
    assert most < 2 * SHARD
    assert after < SHARD
    assert all(parameter.any() for parameter in model.parameters())


def test_the_measure_sees_files_that_are_held(folder: Path) -> None:
    before = resident()
    held = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    total = sum(float(tensor.sum()) for tensors in held for tensor in tensors.values())
    assert total == total
    assert resident() - before > 6 * SHARD


def _partitioned(ctx: ParallelContext, folder: str) -> tuple[int, int]:
    # glibc would keep freed buffers for later, more and more of them; so they go back at once
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    found: list[tuple[int, int]] = []

    def fill(model: nn.Module, gathered: Callable[[nn.Parameter], AbstractContextManager[object]]) -> None:
        found.append(growth(Path(folder), model, gathered, reads=ctx.is_main))

    model = build_model(lambda: decoder(Path(folder)), ctx, 3, torch.float32, fill)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "partitioned"
    return found[0]


def test_into_the_partition_of_zero_3(folder: Path) -> None:
    """A rank holds the one parameter that is being filled, and perhaps the one before; the first rank also a shard."""
    for (most, after), shards in zip(run_ranks(_partitioned, 2, str(folder)), (2, 1), strict=True):
        assert most < shards * SHARD
        assert after < SHARD

"""The fused layers of this project beside torch and Liger, in one run on one GPU: `python -m benchmarks.layers`, repository root.

First a correctness gate: on a red one nothing is measured. Then GB/s forward / backward of the bytes that a layer must move (what
`Problem.forward` and `Problem.backward` count: every input and output once), beside the rate of a copy of 512 MiB in the same run;
the host's time of a call; and what each layer buys in one LLaMA-7B block at 32K tokens, whose loss and gradients are compared with
those of plain layers in fp32. All are measured in turns. A whole run writes a JSON file in benchmarks/results.
Tensors are larger than any L2 cache. Liger is measured where it is installed. `--tune` measures launch constants instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import targets
from benchmarks.plots import layers_plot
from benchmarks.refusals import need_gpu
from benchmarks.timing import ROUNDS, compile_anew, in_turns, milliseconds
from longtrain.attention import AttentionMask, Band
from longtrain.kernels import gated, norms, plain, rotary
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.language import triton
from longtrain.kernels.layers import FUSABLE, choose_layers
from longtrain.kernels.local import LocalAttend
from longtrain.models.config import ModelConfig
from longtrain.models.decoder import Decoder
from tests.layer_cases import EPS, NORMS, check_gated, check_norm, check_rotary, tables
from tests.parity import assert_close_to_truth

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda"
TOKENS, HIDDEN, INNER, DIM = 2**14, 4096, 11008, 128
Layer = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """module, layer: of longtrain.kernels. shapes: of the inputs with gradients, then of weights. fixed: arguments after them.
    forward, backward: bytes that it must move, weights and statistics (under 0.1%) not counted. liger: module and class."""

    name: str
    module: Any
    layer: str
    shapes: tuple[tuple[int, ...], ...]
    fixed: tuple[Any, ...]
    forward: int
    backward: int
    liger: tuple[str, str]

    def inputs(self) -> list[Tensor]:
        return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for shape in self.shapes]

    @property
    def fused(self) -> Layer:
        return getattr(self.module, self.layer)

    @property
    def plain(self) -> Layer:
        return getattr(plain, self.layer)

    def peers(self) -> dict[str, Layer | None]:
        return {
            "fused": self.fused,
            "eager": self.plain,
            "compile": torch.compile(self.plain, dynamic=False, fullgraph=True),
            "liger": liger(self),
        }


def problems() -> list[Problem]:
    rows, weight, table = (TOKENS, HIDDEN), (HIDDEN,), 4 * TOKENS * DIM
    size, wide = 2 * TOKENS * HIDDEN, 2 * TOKENS * INNER
    found = [
        Problem("rms_norm", norms, "rms_norm", (rows, weight), (EPS,), 2 * size, 3 * size, ("rms_norm", "RMSNorm")),
        Problem(
            "add_rms_norm", norms, "add_rms_norm", (rows, rows, weight), (EPS,), 4 * size, 4 * size,
            ("fused_add_rms_norm", "FusedAddRMSNorm"),
        ),
        Problem("layer_norm", norms, "layer_norm", (rows, weight, weight), (EPS,), 2 * size, 3 * size, ("layer_norm", "LayerNorm")),
        Problem("add_layer_norm", norms, "add_layer_norm", (rows, rows, weight, weight), (EPS,), 4 * size, 4 * size, ("", "")),
    ]  # fmt: skip
    for kv_heads in (8, 32):
        shapes = tuple((1, TOKENS, heads, DIM) for heads in (HIDDEN // DIM, kv_heads))
        moved = 2 * (size + 2 * TOKENS * kv_heads * DIM) + table
        fixed = tables(1, TOKENS, DIM, DEVICE)
        found.append(Problem(f"rotary 32/{kv_heads}", rotary, "rotary", shapes, fixed, moved, moved, ("rope", "Rope")))
    for name, activation, peer in (("swiglu", "silu", ("swiglu", "SiLUMul")), ("geglu", "gelu_tanh", ("geglu", "GELUMul"))):
        shapes = ((TOKENS, INNER), (TOKENS, INNER))
        found.append(Problem(name, gated, "gated", shapes, (activation,), 3 * wide, 5 * wide, peer))
    return found


def liger(p: Problem) -> Layer | None:
    """Liger's function of the same layer with our arguments, or None where it has none or is not installed."""
    module, name = p.liger
    try:
        function = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), f"Liger{name}Function").apply
    except (ImportError, AttributeError):
        return None
    if p.layer != "rotary":
        return (lambda gate, up, _: function(gate, up)) if p.layer == "gated" else function
    # it wants [B, H, T, D] and whole tables in the dtype of the inputs, and may write over its inputs
    cos, sin = (torch.cat((x, x), -1)[:, :, 0].bfloat16() for x in p.fixed)
    return lambda q, k, *_: function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def tuple_of(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def run_of(layer: Layer, inputs: Sequence[Tensor], fixed: Sequence[Any], direction: str) -> Callable[[], Any]:
    """One direction of a layer, to be measured."""
    if direction == "forward":
        return torch.no_grad()(lambda: layer(*inputs, *fixed))
    outs = tuple_of(layer(*inputs, *fixed))
    cotangents = [torch.randn_like(y) for y in outs]
    return lambda: torch.autograd.grad(outs, inputs, cotangents, retain_graph=True)


def measure(p: Problem) -> dict[str, dict[str, Any]]:
    """Milliseconds and GB/s of every library, or why there is no figure."""
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, layer in p.peers().items():
        found[name], inputs = {}, p.inputs()
        if layer is None:
            found[name]["error"] = "absent"
            continue
        try:
            ways = {way: run_of(layer, inputs, p.fixed, way) for way in targets.DIRECTIONS}
            for run in ways.values():
                run()
        except Exception as error:  # a peer that cannot do this is a line of the table
            if layer is p.fused:
                raise
            found[name]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            runs[name] = ways
    for way, moved in (("forward", p.forward), ("backward", p.backward)):
        for name, time_ms in in_turns({name: ways[way] for name, ways in runs.items()}, 60).items():
            found[name] |= {f"{way}_ms": time_ms, way: moved / time_ms / 1e6}
    return found


def host_microseconds(p: Problem, calls: int = 200) -> tuple[float, float]:
    """Of a forward, and of forward and backward, at 8 tokens, where the host is slower than the GPU."""
    few = [x.narrow(int(p.layer == "rotary"), 0, 8) if x.dim() > 1 else x for x in p.inputs()]
    inputs = [x.detach().clone().requires_grad_() for x in few]
    fixed = [x[:, :8] if isinstance(x, Tensor) else x for x in p.fixed]
    outs = tuple_of(p.fused(*inputs, *fixed))
    cotangents = [torch.ones_like(y) for y in outs]
    times = []
    for backward in (False, True):
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                outs = tuple_of(p.fused(*inputs, *fixed))
                if backward:
                    torch.autograd.grad(outs, inputs, cotangents)
            torch.cuda.synchronize()
            last = (time.perf_counter() - start) / calls * 1e6
        times.append(last)
    return times[0], times[1]


def copy_rate() -> float:
    """GB/s read and written by a copy of 512 MiB."""
    source = torch.empty(2**29, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def gate() -> None:
    for name, dtype in product(NORMS, (torch.bfloat16, torch.float32)):
        check_norm(name, (1111, HIDDEN), dtype, DEVICE)
    for kv_heads in (8, 32):
        check_rotary(2, 555, 32, kv_heads, DIM, DIM, torch.bfloat16, DEVICE)
    for activation in plain.ACTIVATIONS:
        check_gated((1111, INNER), activation, torch.bfloat16, DEVICE)
    print("correctness gate: green")


def cell(result: dict[str, Any]) -> str:
    return f"{result['forward']:.0f} / {result['backward']:.0f}" if "forward" in result else result["error"][:12]


def layer_table(copy: float) -> list[dict[str, Any]]:
    """Rows for the JSON file."""
    rows = []
    names = ("fused", "eager", "compile", "liger")
    print(f"copy of 512 MiB: {copy:.0f} GB/s. Below, GB/s forward / backward of the bytes that must be moved.")
    heads = "".join(f"{name:>14}" for name in names)
    print(f"{'':16}{heads}{'% of copy':>12}{'host us: forward, both':>25}", flush=True)
    for p in problems():
        found = measure(p)
        host = host_microseconds(p)
        fused = found["fused"]
        cells = "".join(f"{cell(r):>14}" for r in found.values())
        share = f"{100 * fused['forward'] / copy:.0f} / {100 * fused['backward'] / copy:.0f}"
        print(f"{p.name:16}{cells}{share:>12}{f'{host[0]:.0f}, {host[1]:.0f}':>25}", flush=True)
        bytes_moved = {"forward": p.forward, "backward": p.backward}
        rows.append({"layer": p.name, "shapes": p.shapes, "bytes": bytes_moved, "results": found, "host_us": host})
        torch.cuda.empty_cache()
    return rows


LLAMA_7B_BLOCK = ModelConfig("llama", 32000, HIDDEN, 1, HIDDEN // DIM, HIDDEN // DIM, DIM, INNER, 2**15)


class Block:
    """One block with head and loss, weights and gradients in dtype: the same ones, rounded to bf16, for every dtype and `fused`."""

    def __init__(self, config: ModelConfig, fused: Sequence[str], attend: LocalAttend, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = Decoder(config, attend, layers=choose_layers(fused)).bfloat16()
            for parameter in self.model.parameters():
                torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.02)
            self.tokens = torch.randint(0, config.vocab_size, (1, config.max_positions))
            self.positions = torch.arange(config.max_positions)[None]
        self.model.to(dtype)

    def loss(self) -> Tensor:
        out = self.model(self.tokens, self.positions, AttentionMask(Band.causal()), self.tokens.roll(-1, 1))
        return getattr(out, "loss", out)

    def step(self) -> None:
        self.loss().backward()
        self.model.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        """The loss and all gradients, on the CPU: the GPU's memory is measured."""
        loss = self.loss()
        loss.backward()
        found = {name: x.grad.cpu() for name, x in self.model.named_parameters() if x.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss.detach().cpu()} | found


def check_block(found: dict[str, Tensor], truth: dict[str, Tensor], low: dict[str, Tensor]) -> None:
    """The self-calibrating rule on loss and gradients, each in units of its largest. truth: plain layers in fp32, low: in bf16."""
    assert found.keys() == truth.keys() == low.keys()
    noise = torch.finfo(torch.bfloat16).eps / 4
    for name, exact in truth.items():
        largest = exact.abs().max().to(DEVICE)
        fast, right, plainly = (x[name].to(DEVICE, torch.float32) / largest for x in (found, truth, low))
        assert_close_to_truth(fast, right, plainly, name, noise=noise)


def block_table(config: ModelConfig, attend: LocalAttend) -> list[dict[str, Any]]:
    """Every variant is checked before any is measured."""
    tokens = config.max_positions
    variants = [(), FUSABLE, *((name,) for name in FUSABLE), *(tuple(x for x in FUSABLE if x != name) for name in FUSABLE)]
    truth = Block(config, (), attend, torch.float32).results()
    low: dict[str, Tensor] = {}
    blocks: dict[str, Block] = {}
    rows: list[dict[str, Any]] = []
    for fused in variants:
        before = torch.cuda.memory_allocated()
        name = ", ".join(fused) or "none"
        blocks[name] = block = Block(config, fused, attend, torch.bfloat16)
        found = block.results()
        low = low or found
        check_block(found, truth, low)
        torch.cuda.reset_peak_memory_stats()
        block.step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        rows.append({"fused": list(fused), "peak_gib": peak, "loss": float(found["loss"]) / tokens})
        torch.cuda.empty_cache()
    times = in_turns({name: block.step for name, block in blocks.items()}, 1000)
    print(f"\none LLaMA-7B block with head and loss, {tokens} tokens, forward + backward; losses and gradients checked")
    print(f"{'fused':28}{'ms':>10}{'against none':>14}{'peak GiB':>10}{'loss':>10}")
    for (name, time_ms), row in zip(times.items(), rows, strict=True):
        row["ms"] = time_ms
        print(f"{name:28}{time_ms:10.1f}{time_ms / times['none']:13.3f}x{row['peak_gib']:10.2f}{row['loss']:10.4f}")
    return rows


def compare(blocks: bool) -> None:
    gate()
    copy = copy_rate()
    rows = layer_table(copy)
    short = targets.layers(rows, copy)
    print("short of targets: " + "; ".join(short) if short else "every target is met: 90% of the copy forward, 80% backward")
    if not blocks:
        print("part of a run: no file")
        return
    device = torch.cuda.get_device_name()
    found = {
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "command": " ".join(["python -m benchmarks.layers", *sys.argv[1:]]),
        "rounds": ROUNDS,
        "copy": copy,
        "tokens": TOKENS,
        "dtype": "bfloat16",
        "rows": rows,
        "block": block_table(LLAMA_7B_BLOCK, LocalAttend(FlashKernel())),
    }
    path = RESULTS / f"layers-{device.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path} and {layers_plot(path)}")


@contextmanager
def tuned(module: Any, direction: str, tuning: Any) -> Iterator[None]:
    """A module's launch constants replaced; those of one direction where it has two."""
    before = module.TUNING
    module.TUNING = before | {direction: tuning} if isinstance(before, dict) else tuning
    try:
        yield
    finally:
        module.TUNING = before


def candidates(p: Problem, direction: str) -> list[Any]:
    if p.module is gated:
        return [gated.Tuning(*x) for x in product((1024, 2048, 4096, 8192), (4, 8)) if 4 <= x[0] // (32 * x[1]) <= 32]
    if p.module is rotary:
        return [rotary.Tuning(*x) for x in product((1024, 2048, 4096, 8192), (4, 8, 16, 32))]
    if direction == "forward":
        return [norms.Tuning(*x) for x in product((8, 16, 32), (2048, 8192))]
    return [norms.Tuning(x[0], 2048, *x[1:]) for x in product((8, 16, 32), (16, 32, 48), (1, 2, 3))]


def tune(only: str) -> None:
    """GB/s of every candidate, best first; `=` marks the one in use."""
    copy = copy_rate()
    print(f"copy of 512 MiB: {copy:.0f} GB/s")
    for p, direction in product((p for p in problems() if only in p.name), ("forward", "backward")):
        inputs, lines = p.inputs(), []
        used = p.module.TUNING[direction] if isinstance(p.module.TUNING, dict) else p.module.TUNING
        for candidate in dict.fromkeys((used, *candidates(p, direction))):
            try:
                with tuned(p.module, direction, candidate):
                    lines.append(
                        (getattr(p, direction) / milliseconds(run_of(p.fused, inputs, p.fixed, direction), 60) / 1e6, candidate)
                    )
            except Exception as error:
                print(f"{p.name} {direction} {candidate}: {type(error).__name__} {str(error)[:80]}")
        for i, (rate, candidate) in enumerate(sorted(lines, key=lambda line: -line[0])):
            if i < 4 or candidate == used:
                numbers = ", ".join(f"{name} {value}" for name, value in asdict(candidate).items())
                print(f"{p.name:16}{direction:10}{rate:6.0f} GB/s {rate / copy:6.2f} {'=' if candidate == used else ' '} {numbers}")
        sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="measure candidates for the launch constants")
    parser.add_argument("--only", default="", help="with --tune: layers whose name holds this")
    parser.add_argument("--no-block", action="store_true", help="leave out the LLaMA-7B block; writes no file")
    given = parser.parse_args(arguments)
    need_gpu()
    compile_anew()
    tune(given.only) if given.tune else compare(not given.no_block)


if __name__ == "__main__":
    main()

"""The benchmarks of attention, layers and loss on the CPU, in small: what they measure, check first, and call short."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import attention, layers, loss, page, targets
from benchmarks.attention import Problem
from longtrain.attention import AttentionSpec, Band
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels import plain
from longtrain.kernels.layers import choose_layers
from longtrain.kernels.local import LocalAttend
from longtrain.models.config import ModelConfig
from tests.fake_gpu import FakeGpu
from tests.parity import naive_attention

ROWS = json.loads((page.RESULTS / f"attention-{page.DEVICE}.json").read_text())["rows"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(1)
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))

    def timed(runs: Mapping[str, Callable[[], Any]], *_: Any, **__: Any) -> dict[str, float]:
        for run in runs.values():
            run()
        return {name: float(i) for i, name in enumerate(runs, 1)}

    for module in (attention, layers, loss):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "in_turns", timed)
    monkeypatch.setattr(attention, "ATTEND", LocalAttend(ReferenceKernel()))


def tiny(**more: Any) -> Problem:
    return replace(Problem("tiny", 40, 4, 2, 8, Band.causal(), peers=()), **more)


def test_all_targets_have_their_rows() -> None:
    """Lengths from 4K to 128K beside every peer, at both widths; the short ones only beside those that can do them."""
    table = {p.name: p for p in attention.problems(quick=False)}
    for dim in (64, 128):
        for what in ("4K causal", "16K causal", "16K full", "32K causal GQA", "128K causal"):
            assert set(table[f"{what} d{dim}"].peers) >= {"flash", "cudnn", "flex"}
    assert {table[name].documents != () for name in table if "packed" in name} == {True}
    assert [p.length for p in table.values() if "naive" in p.peers] == [1024, 4096]


def test_the_gate_checks_what_is_measured() -> None:
    """Every width, mask, and number of heads, at a length that is compiled as the measured ones are."""
    table = attention.problems(quick=False)
    for p in table:
        case = p.small()
        assert (case.dim, case.heads, case.kv_heads) == (p.dim, p.heads, p.kv_heads)
        assert (case.q_documents is None) == (p.documents == ())
        assert (case.band.lo, case.band.hi is None) == (p.band.lo, p.band.hi is None)
        assert case.q_length % 16 == p.length % 16 == 0
    assert {p.small().dim for p in table} == {64, 80, 128, 256}


class Wrong(ReferenceKernel):
    """One gradient is a tenth too large."""

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        grads = super().backward(*args, **kwargs)
        return grads._replace(dk=1.1 * grads.dk)


def test_a_red_gate_lets_nothing_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SMALL", 48)
    monkeypatch.setattr(Problem, "small", lambda p: attention.Case(p.band, 48, None, 1, p.heads, p.kv_heads, p.dim))
    attention.gate([tiny()], ReferenceKernel())
    with pytest.raises(AssertionError, match="dk"):
        attention.gate([tiny(dim=16)], Wrong())


@pytest.mark.parametrize("band", [Band.causal(), Band.full(), Band.causal(7)])
def test_plain_torch_is_attention(band: Band) -> None:
    p = tiny(heads=2, band=band, batch=2)
    q, k, v = (torch.randn(2, 40, 2, 8) for _ in range(3))
    torch.testing.assert_close(attention.naive(p, q, k, v), naive_attention(q, k, v, p.mask, AttentionSpec())[0])


def test_a_whole_run_of_attention(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Peers that cannot do something are a line of the table, and the page is made from the file."""

    def cannot(*_: Any) -> Tensor:
        raise RuntimeError("no such mask\nat all")

    monkeypatch.setattr(attention, "RESULTS", tmp_path)
    monkeypatch.setattr(attention, "gate", lambda *_: None)
    monkeypatch.setattr(attention, "attention_plot", lambda path: path)
    monkeypatch.setitem(attention.PEERS, "flash", cannot)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus")
    table = [tiny(name="naive", heads=2, peers=("naive", "flash")), tiny(name="16K causal d8"), tiny(documents=(30, 10))]
    attention.compare(table, whole=True)
    found = json.loads((tmp_path / "attention-abacus.json").read_text())
    assert found["rounds"] == attention.ROUNDS
    assert [set(row["results"]) for row in found["rows"]] == [{"ours", "naive", "flash"}, {"ours"}, {"ours"}]
    assert found["rows"][0]["results"]["flash"] == {"error": "RuntimeError: no such mask"}
    assert set(found["rows"][0]["results"]["naive"]) == {"memory_mib", "forward", "backward", "forward_ms", "backward_ms"}
    monkeypatch.setattr(page, "read", lambda _: found)
    assert "in turns, 4 rounds, after 2 and 0.5 s of the same work" in page.attention()


def test_what_falls_short() -> None:
    """Every kind of target is looked at, whatever the figures are that there are now."""
    rows = json.loads(json.dumps(ROWS))
    ours = {row["problem"]["name"]: row["results"]["ours"] for row in rows}
    for result in ours.values():
        result |= dict.fromkeys(targets.DIRECTIONS, 1000.0) | {f"{way}_ms": 0.01 for way in targets.DIRECTIONS}
    assert targets.attention(rows) == {}
    ours["128K causal d128"]["forward"] = ours["32K packed 512 d128"]["backward"] = 700.0
    ours["4K causal d64"]["backward"] = 10.0
    found = targets.attention(rows)
    assert found.pop("forward, 1.0 times as fast as 16K causal") == ["128K causal d128 0.700"]
    (short,) = found.pop("backward, 0.85 times as fast as 16K causal a touched tile")
    assert short.startswith("32K packed 512 d128 0.8"), "700 of 1000, and what its tiles waste counts for it"
    assert found.keys() == {"backward, 1.0 times FlexAttention", "backward, 1.2 times FlashAttention-2"}
    assert all(name.startswith("4K causal d64 0.0") for names in found.values() for name in names)
    for row in rows:
        row["results"]["ours"] |= {"memory_mib": 8 * row["results"]["ours"]["memory_mib"], "forward_ms": 1e3}
    found = targets.attention(rows)
    assert len(found["memory besides results under 2.0 times q"]) == len(ROWS)
    assert [line[:8] for line in found["2.0 times as fast as plain torch"]] == ["naive 1K", "naive 4K"]
    assert found["at most 0.5 of plain torch's memory"] == ["naive 1K 1.10"]


def test_layers_and_loss_fall_short_too() -> None:
    found = [json.loads((page.RESULTS / f"{name}-{page.DEVICE}.json").read_text()) for name in ("layers", "loss")]
    assert targets.layers(found[0]["rows"], found[0]["copy"]) == []
    assert len(targets.layers(found[0]["rows"], 2 * found[0]["copy"])) == 2 * len(found[0]["rows"])
    assert targets.loss(found[1]["rows"]) == []
    row = found[1]["rows"][0]
    row["results"]["ours"] |= {"ms": 2 * sum(row["bare_ms"].values()), "extra_mib": 1024.0}
    assert targets.loss(found[1]["rows"]) == [
        "8192 tokens: 0.500 of the bare products' rate (target 0.85)",
        "8192 tokens: 1024 MiB besides dx and dW (target: under 1024)",
    ]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_backward_in_the_block_is_found(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is right, a gradient is not: a tenth too small."""

    def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        y = plain.gated(gate, up, activation)
        return y.detach() * 0.1 + y * 0.9 if wrong else y

    chosen = choose_layers()
    monkeypatch.setattr(layers, "choose_layers", lambda fused: replace(chosen, gated=gated) if "mlp" in fused else chosen)
    config = ModelConfig("llama", 64, 32, 1, 2, 2, 16, 64, 48)
    attend = LocalAttend(ReferenceKernel())
    if wrong:
        with pytest.raises(AssertionError, match="error"):
            layers.block_table(config, attend)
    else:
        rows = layers.block_table(config, attend)
        assert [row["fused"] for row in rows[:2]] == [[], list(layers.FUSABLE)]
        assert rows[3].keys() == {"fused", "peak_gib", "loss", "ms"}


def test_layers_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    p = layers.Problem("norm", SimpleNamespace(layer=plain.rms_norm), "layer", ((4, 8), (8,)), (1e-5,), 10**6, 10**7, ("", ""))

    def cannot(*_: Any) -> Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(
        layers.Problem, "peers", lambda p: {"fused": p.fused, "eager": plain.rms_norm, "compile": cannot, "liger": None}
    )
    found = layers.measure(p)
    assert found["fused"] == {"forward_ms": 1.0, "forward": 1.0, "backward_ms": 1.0, "backward": 10.0}
    assert [found[name] for name in ("compile", "liger")] == [{"error": "RuntimeError: no"}, {"error": "absent"}]


def test_loss_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of bare products; every way's memory and time."""
    monkeypatch.setattr(loss, "WAYS", {"ours": loss.chunked, "Liger": loss.liger, "torch": loss.materialised})
    p = loss.Problem(64, 96, 32)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch, "mm", lambda a, b, out_dtype=None, out=None: out)
        assert loss.bare(p)[torch.bfloat16] == {"logits": 2.0, "dx": 2.0, "dw": 2.0}
    found = loss.measure(p)
    assert found["Liger"] == {"error": "absent"}
    assert found["ours"]["mean_loss"] == pytest.approx(found["torch"]["mean_loss"], rel=0.02)
    assert found["torch"].keys() == {"ms", "tflops", "extra_mib", "mean_loss"}

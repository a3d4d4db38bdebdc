"""Gated layers in Triton's interpreter, what every fused layer compiles to, and the switch between plain and fused ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.errors import KernelError
from longtrain.kernels import gated, layers, norms, plain, rotary
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.linear_cross_entropy import linear_cross_entropy
from tests.layer_cases import check_gated, outputs_and_gradients

interpreted = pytest.mark.skipif(not interprets(), reason="Triton is missing, or compiles here: test_layers_gpu.py runs instead")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
SHAPES = ((1,), (63, 111), (2, 3, 64), (4097, 3), (1, 3001))


@interpreted
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_every_shape(activation: str, shape: tuple[int, ...], joint: bool) -> None:
    if joint and shape[0] > 1000:
        pytest.skip("a program a row: too slow in the interpreter")
    check_gated(shape, activation, torch.float32, joint=joint)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_half_precision(activation: str, dtype: torch.dtype) -> None:
    check_gated((63, 111), activation, dtype)


@interpreted
@settings(max_examples=10)
@given(st.sampled_from(sorted(plain.ACTIVATIONS)), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.booleans())
def test_any_shape(activation: str, shape: list[int], joint: bool) -> None:
    check_gated(tuple(shape), activation, torch.float32, joint=joint)


@interpreted
@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_far_from_zero(activation: str) -> None:
    """No infinity times zero."""
    gate = torch.tensor([-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4])
    arguments = ([gate, torch.ones(7)], (activation,), [torch.ones(7)])
    fast, slow = (outputs_and_gradients(layer, *arguments) for layer in (gated.gated, plain.gated))
    torch.testing.assert_close(fast, slow)


@interpreted
def test_nothing_to_do() -> None:
    x = torch.empty(0, 8, requires_grad=True)
    out = gated.gated(x, x, "silu")
    out.sum().backward()
    assert out.shape == (0, 8)


@interpreted
def test_keeps_gate_and_up_and_writes_over_nothing() -> None:
    gate, up, dout, kept = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(8), []
    before = [x.detach().clone() for x in (gate, up, dout)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = gated.gated(gate, up, "silu")
    assert kept == [gate.data_ptr(), up.data_ptr()]
    first = torch.autograd.grad(out, (gate, up), dout, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, (gate, up), dout), first, atol=0, rtol=0)
    for x, then in zip((gate, up, dout), before, strict=True):
        assert torch.equal(x, then)


@interpreted
def test_compiles_without_a_graph_break() -> None:
    gate, up = torch.randn(5, 7), torch.randn(5, 7)

    def model(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated.gated(2 * gate, up, "gelu").square()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(outputs_and_gradients(f, [gate, up], (), [gate]) for f in (compiled, model)))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.longtrain.gated.default, (gate, up, "silu"), test_utils=checks)


def test_refusals() -> None:
    x = torch.randn(2, 3)
    for layer in (gated.gated, plain.gated):
        with pytest.raises(KernelError, match=r"^gated layer: no activation 'relu'; there are silu, gelu, gelu_tanh$"):
            layer(x, x, "relu")
        with pytest.raises(KernelError, match=r"^gated layer: gate and up are \(2, 3\) and \(1, 3\): they must be of one shape$"):
            layer(x, x[:1], "silu")
    with pytest.raises(KernelError, match="float64"):
        gated.gated(x.double(), x.double(), "silu")
    for dtype in (torch.int32, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(KernelError, match=rf"{dtype}, not fp16, bf16 or fp32; leave mlp out"):
            gated.gated(x, x.to(dtype), "silu")


def test_layers_are_chosen_by_name() -> None:
    none, norm, mlp = layers.choose_layers(), layers.choose_layers(["norm"]), layers.choose_layers(("mlp", "rotary"))
    assert none.rms_norm is plain.rms_norm
    assert none.gated is plain.gated
    assert norm.add_layer_norm is norms.add_layer_norm
    assert norm.rotary is plain.rotary
    assert mlp.gated is gated.gated
    assert mlp.rotary is rotary.rotary
    assert mlp.rms_norm is plain.rms_norm
    assert mlp.linear_cross_entropy is linear_cross_entropy
    fused = layers.choose_layers(layers.FUSABLE).linear_cross_entropy
    assert isinstance(fused, partial)
    assert (fused.func, fused.keywords) == (linear_cross_entropy, {"fused": True})
    with pytest.raises(KernelError, match=r"called norms; there are norm, rotary, mlp, loss"):
        layers.choose_layers(["norms"])
    with pytest.raises(KernelError, match=r"a list of names, such as \['norm'\], not the string 'norm'"):
        layers.choose_layers("norm")


def test_what_a_device_can_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layers.fusable("cpu") == (layers.FUSABLE if interprets() else ())
    if has_triton():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for capability, names in (((7, 5), ()), ((9, 0), layers.FUSABLE)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
            assert layers.fusable("cuda") == names
    monkeypatch.setattr(layers, "has_triton", lambda: False)
    assert layers.fusable("cuda") == ()


@pytest.mark.skipif(shutil.which("ptxas") is None and not has_triton(), reason="no ptxas to compile with")
def test_compiles_for_hopper_without_spilling() -> None:
    """With 16-byte loads and stores, and few enough registers for 32 warps a multiprocessor, the backward of norms aside."""
    command = [sys.executable, "-m", "tests.kernels.offline_layers", "4096", "11008", "32", "8", "128", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=250)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 15
    for kernel in kernels:
        assert (kernel["spilled"], kernel["stack"]) == (0, 0), kernel
        assert min(kernel["global"]["ld 128"], kernel["global"]["st 128"]) >= 1, kernel
        assert kernel["registers"] <= (96 if "norm" in kernel["layer"] and kernel["kernel"] == "backward_kernel" else 64), kernel

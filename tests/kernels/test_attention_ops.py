"""Attention as operators of torch: one call in a compiled graph, equal to eager code bit for bit where nothing else is fused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.attention import AttentionKernel, AttentionMask, Band, Block, Partial
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError
from longtrain.kernels import ops
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.models import Decoder, ModelConfig, initialise
from tests.attention_cases import Case
from tests.parity import results

REFERENCE = ReferenceKernel()
KERNELS = [
    REFERENCE,
    MemoryEfficientKernel(8, 16),
    pytest.param(
        FlashKernel(interpret=True),
        marks=[
            pytest.mark.skipif(not has_triton() or not interprets(), reason="Triton does not interpret here"),
            pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"),
        ],
    ),
]
PACKED = ((10, 1, 0, 9), (17,))
CASES = {
    "causal": Case(Band.causal(), 20),
    "grouped heads, window, documents": Case(Band.causal(7), 20, heads=4, q_documents=PACKED),
    "everything": Case(Band.causal(15), 20, None, 2, 4, 2, 8, 5, PACKED, None, 0.4, 2.0, True, "heads", 0.2, sinks=True),
    "cross, sinks": Case(Band.full(), 20, 9, sinks=True),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", CASES)
def test_compiled_attention_is_eager_attention(name: str, kernel: AttentionKernel) -> None:
    t = CASES[name].tensors(torch.float32)
    attend = LocalAttend(kernel).with_lse
    eager = results(attend, t[:3], t.mask, t.spec, t.dout, t.dlse)
    compiled = results(torch.compile(attend, fullgraph=True, backend="aot_eager"), t[:3], t.mask, t.spec, t.dout, t.dlse)
    for result, value in eager.items():
        assert torch.equal(value, compiled[result]), result


def decoder(kernel: AttentionKernel, activations: str = "none") -> Decoder:
    config = ModelConfig(
        family="llama",
        vocab_size=7,
        hidden_size=32,
        layers=1,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_positions=64,
        init_std=0.2,
    )
    model = Decoder(config, LocalAttend(kernel), activations)
    initialise(model, seed=1)
    return model


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_compiled_decoder_block_is_one_graph(kernel: AttentionKernel) -> None:
    check_decoder_block(kernel, "aot_eager", 0.0)


def test_a_compiled_decoder_block_in_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # graphs on disk of another version of this code are no test of it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if not has_compiler():
        pytest.skip("no C++ compiler for inductor")
    check_decoder_block(MemoryEfficientKernel(8, 16), "inductor", 1e-5)


def check_decoder_block(kernel: AttentionKernel, backend: str, tolerance: float) -> None:
    model = decoder(kernel)
    block = model.blocks[0]
    mask = CASES["grouped heads, window, documents"].tensors(torch.float32).mask
    x = torch.randn(2, 20, 32, requires_grad=True)
    _, tables = model.positions(x, torch.arange(20).expand(2, 20))
    wanted = (x, *block.parameters())

    def run(forward: Any) -> tuple[Tensor, ...]:
        y = forward(x, tables, mask)
        return (y, *torch.autograd.grad(y.square().sum(), wanted))

    compiled = run(torch.compile(block, fullgraph=True, backend=backend))
    for eager, fused in zip(run(block), compiled, strict=True):
        torch.testing.assert_close(fused, eager, rtol=tolerance, atol=tolerance * float(eager.detach().abs().max()))


@pytest.mark.parametrize("activations", ["full", "minimal"])
def test_recomputed_blocks_compile_too(activations: str) -> None:
    """A Keep breaks the graph; results stay."""
    model = decoder(REFERENCE, activations)
    compiled = torch.compile(model, fullgraph=activations == "minimal", backend="aot_eager")
    tokens, positions = torch.randint(7, (2, 20)), torch.arange(20).expand(2, 20)
    wanted = tuple(model.parameters())
    eager, traced = (
        torch.autograd.grad(forward(tokens, positions, AttentionMask(Band.causal())).square().sum(), wanted)
        for forward in (model, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def test_lengths_may_be_symbols() -> None:
    """One graph for all lengths."""
    compiled = torch.compile(LocalAttend(REFERENCE), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (12, 20, 31):
        t = Case(Band.causal(7), length, heads=4).tensors(torch.float32)
        with torch.compiler.set_stance("default" if length == 12 else "fail_on_recompile"):
            assert torch.equal(compiled(*t[:3], t.mask), LocalAttend(REFERENCE)(*t[:3], t.mask))


@pytest.mark.parametrize("name", CASES)
def test_operators_keep_the_rules_of_torch(name: str) -> None:
    """Schema, fake tensors, autograd registration, tracing of both: `torch.library.opcheck`."""
    t = CASES[name].tensors(torch.float32)
    q, k, v = (x.requires_grad_() for x in t[:3])
    flat = ops.Flat.of(Block.of(t.mask), t.spec, ops.handle(REFERENCE))
    torch.library.opcheck(ops.attention_forward, (q, k, v, *flat))
    with torch.no_grad():
        out, lse = ops.attention_forward(q, k, v, *flat)
    flat = flat._replace(**{f: x.detach() for f in ("bias", "sinks") if (x := getattr(flat, f)) is not None})
    given = (t.dout, t.dlse, *(x.detach() for x in (q, k, v)), out, lse)
    for more in ((), (True,), (False,)):
        torch.library.opcheck(ops.attention_backward, (*given, *flat, *more))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", ["whole", "rows", "columns", "heads"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_of_a_constant_bias_no_gradient_is_computed(kernel: AttentionKernel, shape: str, compiled: bool) -> None:
    t = Case(Band.causal(), 20, bias=shape).tensors(torch.float32)
    asked: list[Any] = []
    backward = kernel.backward

    def recorded(*args: Any, **more: Any) -> Any:
        asked.append(backward(*args, **more).dbias)
        return backward(*args, **more)

    attend: Any = LocalAttend(kernel)
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert t.spec.bias is not None
    inputs = [x.requires_grad_() for x in t[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "backward", recorded, raising=False)
        learned = torch.autograd.grad((attend(*inputs, t.mask, t.spec) * t.dout).sum(), [*inputs, t.spec.bias])
        constant = replace(t.spec, bias=t.spec.bias.detach())
        fixed = torch.autograd.grad((attend(*inputs, t.mask, constant) * t.dout).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(learned, fixed, strict=False))
    given, none = asked
    assert given is not None
    assert torch.equal(given, learned[3])
    assert none is None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_queries_that_continue_have_their_positions(kernel: AttentionKernel, compiled: bool) -> None:
    """The last rows of a whole sequence, with what goes by positions."""
    t = Case(Band.causal(), 20, alibi=True, dropout=0.3).tensors(torch.float32)
    attend: Any = LocalAttend(kernel)
    whole = attend(*t[:3], t.mask, t.spec)
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    last = attend(t.q[:, 13:], t.k, t.v, AttentionMask(Band.causal_bottom_right(7, 20), q_start=13), t.spec)
    torch.testing.assert_close(last, whole[:, 13:], rtol=1e-5, atol=1e-6)
    unsaid = attend(t.q[:, 13:], t.k, t.v, AttentionMask(Band.causal_bottom_right(7, 20)), t.spec)
    assert not torch.allclose(unsaid, last, atol=1e-3), "the test shows nothing"


def test_a_block_with_an_origin_keeps_it() -> None:
    t = replace(CASES["everything"], bias=None).tensors(torch.float32)
    block = Block(t.mask.band, t.mask.q_segments, t.mask.k_segments, 40, 7, 3)
    flat = ops.Flat.of(block, t.spec, ops.handle(REFERENCE))
    assert vars(flat.block) == vars(block)
    assert vars(flat.spec) == vars(t.spec)
    expected = ops.run_forward(REFERENCE, t.q, t.k, t.v, block, t.spec)
    assert all(torch.equal(a, b) for a, b in zip(ops.attention_forward(t.q, t.k, t.v, *flat), expected, strict=True))


class Dividing(ReferenceKernel):
    name = "dividing"

    def __init__(self, by: float) -> None:
        self.by = by

    def forward(self, *args: Any, **kwargs: Any) -> Partial:
        out, lse = super().forward(*args, **kwargs)
        return Partial(out / self.by, lse)


def test_handles_stand_for_instances() -> None:
    """A customised kernel reaches the operator as itself."""
    two, four = Dividing(2), Dividing(4)
    attends = [LocalAttend(two), LocalAttend(four), LocalAttend(two)]
    assert [a.handle for a in attends] == ["dividing", "dividing#2", "dividing"]
    assert attends[0] == attends[2]
    assert attends[0] != attends[1]
    t = CASES["causal"].tensors(torch.float32)
    plain = LocalAttend(REFERENCE)(*t[:3], t.mask)
    for attend, by in zip(attends, (2, 4, 2), strict=True):
        torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(*t[:3], t.mask) * by, plain)
    with pytest.raises(KernelError, match="no kernel 'nobody' in this process"):
        ops.kernel_of("nobody")


@pytest.mark.parametrize("compiled", [False, True])
def test_dtypes_that_no_kernel_computes_with(compiled: bool) -> None:
    """Refused before any kernel, by the name of the tensor: plain torch would compute."""
    attend = LocalAttend(MemoryEfficientKernel(8, 16))
    call: Any = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    t = CASES["causal"].tensors(torch.float32)
    q, k, v, mask = t.q, t.k, t.v, t.mask
    with pytest.raises(KernelError, match=r"attention: q is torch.int32, must be torch.float16, torch.bfloat16, torch.float32 or"):
        call(q.int(), k.int(), v.int(), mask)
    with pytest.raises(KernelError, match=r"attention: q is torch.float32, k torch.float64, v torch.float32: give them one dtype"):
        call(q, k.double(), v, mask)


def test_without_gradients() -> None:
    t = CASES["everything"].tensors(torch.float32)
    compiled = torch.compile(LocalAttend(REFERENCE), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(*t[:3], t.mask, t.spec)
    assert not out.requires_grad
    assert torch.equal(out, LocalAttend(REFERENCE)(*t[:3], t.mask, t.spec).detach())


def test_gradients_of_gradients_are_refused() -> None:
    t = CASES["causal"].tensors(torch.float32)
    q = t.q.requires_grad_()
    flat = ops.Flat.of(Block(Band.causal()), t.spec, ops.handle(REFERENCE))
    out, _ = ops.attention_forward(q, t.k, t.v, *flat)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_eager_code_calls_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "attention_forward", None)
    monkeypatch.setattr(ops, "attention_backward", None)
    t = CASES["causal"].tensors(torch.float32)
    results(LocalAttend(REFERENCE).with_lse, t[:3], AttentionMask(Band.causal()), t.spec, t.dout, t.dlse)

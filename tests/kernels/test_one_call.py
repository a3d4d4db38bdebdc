"""One call is torch's scaled_dot_product_attention where both can do it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from longtrain.attention import AttentionKernel, AttentionMask, AttentionSpec, Band, Partial
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError
from longtrain.kernels import one_call, registry
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.kernels.one_call import attention

CAUSAL = AttentionMask(Band.causal())


def tensors(length: int = 33) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, length, heads, 16, generator=draw, requires_grad=True) for heads in (4, 2, 2))


@pytest.mark.parametrize("documents", [False, True])
def test_it_is_torchs(documents: bool) -> None:
    q, k, v = tensors()
    ids = torch.tensor([0] * 10 + [1] * 20 + [2] * 3, dtype=torch.int32).expand(2, -1)
    allowed = torch.ones(33, 33, dtype=torch.bool).tril()
    if documents:
        allowed = allowed & (ids[0][:, None] == ids[0][None, :])
    mask = AttentionMask(Band.causal(), ids, ids) if documents else AttentionMask(Band.causal())
    found = attention(q, k, v, mask)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    expected = scaled_dot_product_attention(q_, k_, v_, attn_mask=allowed, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_reasons_where_no_kernel_can() -> None:
    """In the words of a call, not in those of a recipe."""
    q, k, v = tensors()
    with pytest.raises(KernelError) as error:
        attention(q, k, v, CAUSAL, kernel="triton")
    reasons = "runs on CUDA GPUs, not on cpu" if has_triton() else "runs on CUDA GPUs, not on cpu; Triton is not installed"
    assert str(error.value) == f"kernel: triton cannot do this: {reasons}; set kernel to auto or memory_efficient or reference"
    with pytest.raises(KernelError) as error:
        attention(q, k, v, CAUSAL, AttentionSpec(softcap=3.0), kernel="nope")
    assert str(error.value).startswith("kernel: there is no kernel 'nope'; there are: auto, triton, ")
    with pytest.raises(KernelError, match=r"there is no kernel"):
        attention(q, k, v, CAUSAL, kernel=["triton"])  # type: ignore[arg-type]


@pytest.fixture
def afresh() -> Iterator[None]:
    """No graph of another test, and no choice of kernel before or after."""
    torch.compiler.reset()
    one_call._select.cache_clear()
    yield
    one_call._select.cache_clear()


FLOATS = "must be torch.float16, torch.bfloat16, torch.float32 or torch.float64"
TYPES: dict[str, tuple[dict[str, Callable[[Tensor], Any]], str]] = {
    "numpy": ({"q": lambda q: q.numpy()}, "q is of type ndarray, must be of type Tensor, [batch, tokens, heads, width]"),
    "a list": ({"v": lambda v: v.tolist()}, "v is of type list, must be of type Tensor, "),
    "no mask": (
        {"mask": lambda _: None},
        "mask is of type NoneType, must be of type AttentionMask, such as AttentionMask(",
    ),
    "a name": ({"mask": lambda _: "causal"}, "mask is of type str, must be of type AttentionMask, "),
    "a band": ({"mask": lambda _: Band.causal()}, "mask is of type Band, must be of type AttentionMask, "),
    "no spec": ({"spec": lambda _: None}, "spec is of type NoneType, must be of type AttentionSpec, or left out"),
    "one dimension": ({"q": lambda q: q[0, :, 0, 0]}, "q is [33], must be [batch, tokens, heads, width]"),
}
DTYPES: dict[str, tuple[dict[str, Callable[[Tensor], Any]], str]] = {
    "integers": (dict.fromkeys("qkv", Tensor.int), f"q is torch.int32, {FLOATS}"),
    "one of integers": ({"v": Tensor.long}, f"v is torch.int64, {FLOATS}"),
    "bools": ({"k": Tensor.bool}, f"k is torch.bool, {FLOATS}"),
    "complex": ({"k": lambda k: k.to(torch.complex64)}, f"k is torch.complex64, {FLOATS}"),
    "eight bits": (dict.fromkeys("qkv", lambda x: x.to(torch.float8_e4m3fn)), f"q is torch.float8_e4m3fn, {FLOATS}"),
    "mixed": ({"k": Tensor.bfloat16}, "q is torch.float32, k torch.bfloat16, v torch.float32: give them one dtype"),
    "a mask as a bias": ({"spec": lambda _: AttentionSpec(bias=torch.ones(33, 33).bool())}, f"bias is torch.bool, {FLOATS}"),
    "slopes": ({"spec": lambda _: AttentionSpec(alibi_slopes=torch.ones(4).int())}, f"alibi_slopes is torch.int32, {FLOATS}"),
}


def refusal(call: Callable[..., Tensor], changes: dict[str, Callable[[Tensor], Any]]) -> str:
    q, k, v = (x.detach() for x in tensors())
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": CAUSAL, "spec": AttentionSpec()}
    call(**given)
    with pytest.raises(KernelError) as error:
        call(**given | {name: change(given[name]) for name, change in changes.items()})
    return str(error.value)


@pytest.mark.parametrize("name", [*TYPES, *DTYPES])
def test_what_is_no_tensor_of_floats(name: str) -> None:
    changes, message = (TYPES | DTYPES)[name]
    assert refusal(attention, changes).startswith(f"attention: {message}")


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("name", DTYPES)
def test_also_in_a_compiled_model(name: str) -> None:
    changes, message = DTYPES[name]
    assert refusal(torch.compile(attention, fullgraph=True, backend="eager"), changes) == f"attention: {message}"


def results(call: Callable[..., Tensor], length: int, mask: AttentionMask, spec: AttentionSpec, kernel: str) -> list[Tensor]:
    inputs = tensors(length)
    wanted = [*inputs, *(x for x in (spec.bias, spec.sinks) if x is not None)]
    out = call(*inputs, mask, spec, kernel=kernel)
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


def packed(length: int) -> AttentionMask:
    ids = torch.arange(length, dtype=torch.int32).div(9, rounding_mode="floor").expand(2, -1)
    cuts = (*range(0, length, 9), length)
    return AttentionMask(Band.causal(7), ids, ids, (cuts, cuts))


@pytest.mark.usefixtures("afresh")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("kernel", "lengths"),
    [*((name, (20, 33, 41, 130)) for name in ("auto", "memory_efficient", "reference")), ("triton", (9, 12, 17))],
)
def test_compiled_it_is_one_graph_for_all_lengths(kernel: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning; the same bits as in eager code; one graph more where the first length turns out to be one of many."""
    if kernel == "triton":
        if not has_triton() or not interprets():
            pytest.skip("Triton does not interpret here")
        monkeypatch.setattr(registry, "kernels", lambda: (FlashKernel(interpret=True),))
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=graphs)
    for length in lengths:
        spec = AttentionSpec(softcap=3.0, bias=torch.randn(4, 1, length).requires_grad_(), sinks=torch.randn(4).requires_grad_())
        mask = packed(length)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = results(compiled, length, mask, spec, kernel)
        assert all(torch.equal(a, b) for a, b in zip(found, results(attention, length, mask, spec, kernel), strict=True))
    assert graphs.frame_count == 2
    assert graphs.op_count == 2 * 2  # the operator, and the first of its two results


class Noting(ReferenceKernel):
    """Writes down who runs."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def forward(self, *args: Any, **kwargs: Any) -> Partial:
        self.notes.append(f"{self.name} forward")
        return super().forward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        self.notes.append(f"{self.name} backward")
        return super().backward(*args, **kwargs)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_kernel_of_each_length_also_in_one_graph(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 tokens and more are of different kernels on a CPU, the backward is of the forward's."""
    notes: list[str] = []
    both: tuple[AttentionKernel, ...] = tuple(Noting(kind.name, notes) for kind in (MemoryEfficientKernel, ReferenceKernel))
    monkeypatch.setattr(registry, "kernels", lambda: both)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for call in (attention, compiled):
        for length, name in ((100, "reference"), (512, "reference"), (513, "memory_efficient"), (101, "reference")):
            notes.clear()
            results(call, length, CAUSAL, AttentionSpec(), "auto")
            assert notes == [f"{name} forward", f"{name} backward"]


CHANGING = {
    "rows": [(batch, 20, 20, CAUSAL) for batch in (1, 2, 3, 4)],
    "lengths of both": [(2, q, k, AttentionMask(Band.causal_bottom_right(q, k))) for q, k in ((3, 9), (4, 20), (9, 3), (7, 41))],
    "windows": [(2, 33, 33, AttentionMask(Band.causal(window))) for window in (3, 4, 9, 32)],
    "documents": [(2, length, length, packed(length)) for length in (20, 33, 41, 70)],
}


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_is_compiled_twice_at_most(name: str) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=graphs)
    for batch, queries, keys, mask in CHANGING[name]:
        q, k, v = (torch.randn(batch, n, heads, 16) for n, heads in ((queries, 4), (keys, 2), (keys, 2)))
        assert torch.equal(compiled(q, k, v, mask), attention(q, k, v, mask))
    assert graphs.frame_count <= 2


@pytest.mark.usefixtures("afresh")
def test_what_a_compiler_sees_does_not_depend_on_the_device() -> None:
    """So that what holds on a CPU holds with Triton on a GPU: a mask made inside, no kernel asked, one operator."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, AttentionMask(Band.causal(5)), AttentionSpec(softcap=2.0), kernel="triton")

    q, k, v = (x.detach().to("meta") for x in tensors())
    assert torch.compile(block, fullgraph=True, backend=backend)(q, k, v).shape == q.shape
    assert seen == ["longtrain.attention_forward.default", "<built-in function getitem>"]

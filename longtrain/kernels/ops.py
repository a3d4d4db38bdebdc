"""Attention as operators of torch: `longtrain::attention_forward` and `longtrain::attention_backward`.

Compilers and FLOP counters see operators only. A compiled model calls these instead of the autograd function of
`kernels.local`, so attention breaks no graph; eager code does not, for dispatching costs more than calling. An operator takes
tensors, numbers and strings: a mask and a spec are passed field by field, a kernel as its handle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from longtrain.attention.mask import Band
from longtrain.attention.merge import accumulator_dtype, add_sinks_, sinks_gradient
from longtrain.attention.protocol import AttentionKernel, Block, Partial, check_inputs
from longtrain.attention.spec import AttentionSpec
from longtrain.errors import KernelError
from longtrain.kernels.flops import backward_flops, forward_flops

Choose = Callable[[Tensor, Tensor, Tensor, Block, AttentionSpec], AttentionKernel]
"""Of q, k and v that belong together (`check_inputs`)."""


@dataclass(frozen=True, eq=False)
class Chooser:
    """Takes the place of a kernel where the tensors decide which: called when attention runs, forward and backward, so that a
    compiler never sees the choice, and lengths that are symbols to it are numbers here."""

    name: str
    choose: Choose


Source = AttentionKernel | Chooser
_HANDLES: dict[str, Source] = {}


def handle(kernel: Source) -> str:
    """A string that stands for this very instance in this process: its name, numbered from the second instance on.

    Handles are for good: a graph, or a backward still to run, may hold the string alone.
    """
    for known, other in _HANDLES.items():
        if other is kernel:
            return known
    same = sum(other.name == kernel.name for other in _HANDLES.values())
    new = f"{kernel.name}#{same + 1}" if same else kernel.name
    _HANDLES[new] = kernel
    return new


def kernel_of(handle: str) -> Source:
    """Raises KernelError for a handle of another process."""
    if handle not in _HANDLES:
        raise KernelError(f"attention operator: no kernel {handle!r} in this process; make a LocalAttend with it before running")
    return _HANDLES[handle]


class Flat(NamedTuple):
    """A block, a spec and a kernel's handle as arguments of an operator, in the order of `_FLAT`."""

    q_segments: Tensor | None
    k_segments: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    lo: int | None
    hi: int | None
    q_start: int
    k_start: int
    stride: int
    runs: bool
    scale: float | None
    softcap: float | None
    dropout: float
    kernel: str

    @staticmethod
    def of(block: Block, spec: AttentionSpec, kernel: str) -> Flat:
        return Flat(
            block.q_segments,
            block.k_segments,
            spec.bias,
            spec.sinks,
            spec.alibi_slopes,
            spec.dropout_seed,
            block.band.lo,
            block.band.hi,
            block.q_start,
            block.k_start,
            block.stride,
            block.runs,
            spec.scale,
            spec.softcap,
            spec.dropout,
            kernel,
        )

    @property
    def block(self) -> Block:
        return Block(Band(self.lo, self.hi), self.q_segments, self.k_segments, self.q_start, self.k_start, self.stride, self.runs)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.scale, self.softcap, self.alibi_slopes, self.bias, self.dropout, self.dropout_seed, self.sinks)


_TENSORS = 6
"""How many of the fields of Flat are tensors; they come first."""
_FLAT = (
    "Tensor? q_segments, Tensor? k_segments, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, "
    "SymInt? lo, SymInt? hi, SymInt q_start, SymInt k_start, SymInt stride, bool runs, float? scale, float? softcap, "
    "float dropout, str kernel"
)


class Gradients(NamedTuple):
    """Of q, k, v, of a bias that is no constant, and of sinks."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None

    @staticmethod
    def of(present: list[Tensor], spec: AttentionSpec | Flat, bias_grad: bool) -> Gradients:
        """From what `attention_backward` returns."""
        dq, dk, dv, *more = present
        dsinks = more.pop() if spec.sinks is not None else None
        return Gradients(dq, dk, dv, more.pop() if spec.bias is not None and bias_grad else None, dsinks)


def _chosen(kernel: Source, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> AttentionKernel:
    return kernel.choose(q, k, v, block, spec) if isinstance(kernel, Chooser) else kernel


def run_forward(kernel: Source, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> Partial:
    """A kernel's (out, lse) with the sinks of the spec. Raises KernelError where shapes or dtypes do not belong together."""
    check_inputs(q, k, v, spec, block)
    part = _chosen(kernel, q, k, v, block, spec).forward(q, k, v, block, spec.without_sinks)
    return part if spec.sinks is None else add_sinks_(part, spec.sinks)


def run_backward(
    kernel: Source,
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    spec: AttentionSpec,
    bias_grad: bool = True,
) -> Gradients:
    """out, lse: of `run_forward`. bias_grad: as in `AttentionKernel.backward`."""
    kernel = _chosen(kernel, q, k, v, block, spec)
    delta = kernel.delta(dout, out, dlse)
    dsinks = None if spec.sinks is None else sinks_gradient(spec.sinks, lse, delta)
    return Gradients(*kernel.backward(dout, q, k, v, lse, delta, block, spec.without_sinks, bias_grad=bias_grad), dsinks)


def counts_flops() -> bool:
    """Whether a FlopCounterMode is on. What it must see has to go through the operators."""
    return any(isinstance(getattr(mode, "counter", None), FlopCounterMode) for mode in _get_current_dispatch_mode_stack())


@torch.library.custom_op(
    "longtrain::attention_forward", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_FLAT}) -> (Tensor, Tensor)"
)
def attention_forward(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """`LocalAttend.with_lse`, differentiable; `flat` are the fields of `Flat`. Results are contiguous."""
    given = Flat(*flat)
    out, lse = run_forward(kernel_of(given.kernel), q, k, v, given.block, given.spec)
    return out.contiguous(), lse.contiguous()


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _dim = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1])
    return out, q.new_empty(batch, heads, queries, dtype=accumulator_dtype(q.dtype))


@torch.library.custom_op(
    "longtrain::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_FLAT}, bool bias_grad=True) -> Tensor[]",
)
def attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *flat: Any
) -> list[Tensor]:
    """[dq, dk, dv], then dbias where there is a bias, and bias_grad, and dsinks where there are sinks; contiguous."""
    given, bias_grad = _fields(flat)
    grads = run_backward(kernel_of(given.kernel), dout, dlse, q, k, v, out, lse, given.block, given.spec, bias_grad)
    return [grad.contiguous() for grad in grads if grad is not None]


@attention_backward.register_fake
def _(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *flat: Any) -> list[Tensor]:
    given, bias_grad = _fields(flat)
    return [x.new_empty(x.shape) for x in (q, k, v, given.bias if bias_grad else None, given.sinks) if x is not None]


def _fields(flat: tuple[Any, ...]) -> tuple[Flat, bool]:
    """And bias_grad, which is the last argument and has a default: graphs that compilers keep on disk from before there was one
    still call without it. torch leaves out what is the default."""
    number = len(Flat._fields)
    return Flat(*flat[:number]), flat[number] if len(flat) > number else True


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *flat = inputs
    ctx.save_for_backward(q, k, v, *output, *flat[:_TENSORS])
    ctx.plain = flat[_TENSORS:]


def _gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    given = Flat(*tensors, *ctx.plain)
    bias_grad = ctx.needs_input_grad[3 + Flat._fields.index("bias")]
    grads = Gradients.of(attention_backward(dout, dlse, q, k, v, out, lse, *given, bias_grad), given, bias_grad)
    of_flat: dict[str, Tensor | None] = dict.fromkeys(Flat._fields) | {"bias": grads.dbias, "sinks": grads.dsinks}
    return *grads[:3], *of_flat.values()


attention_forward.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.longtrain.attention_forward)
def _(q: Any, k: Any, v: Any, *flat: Any, **_results: Any) -> int:
    given = Flat(*flat)
    return forward_flops(q, k, v, Band(given.lo, given.hi))


@register_flop_formula(torch.ops.longtrain.attention_backward)
def _(dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *flat: Any, **_results: Any) -> int:
    given, _ = _fields(flat)
    return backward_flops(q, k, v, Band(given.lo, given.hi))

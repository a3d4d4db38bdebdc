"""Linear layer and cross entropy in one, without ever holding the logits."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.batch import IGNORE
from longtrain.errors import DataError, KernelError
from longtrain.kernels.cross_entropy import (
    DTYPES,
    SIZES,
    Parts,
    Terms,
    cut,
    fused_parts,
    scale_,
    scale_into,
    scaled_weight_gradient_,
)
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.products import product, product_

CHUNK = 2048
"""Most tokens a step: still a full matrix product on a large GPU."""
LOGITS = 2**26
"""Most logits a step: 256 MiB in fp32."""


class LossSum(NamedTuple):
    """loss: scalar with a graph, summed over tokens, fp32 (fp64 for fp64 inputs). count: int64 scalar, tokens that bear loss."""

    loss: Tensor
    count: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    fused: bool = False,
    chunk: int | None = None,
) -> LossSum:
    """Sum over tokens of cross_entropy(s, label) + z_loss * logsumexp(s)^2 with logits s = hidden W^T.

    hidden [N, C]; weight [V, C] of the same dtype, fp16, bf16 or fp32 (not fused also fp64); labels int64 [N], IGNORE (-100) bears
    no loss; where no label bears any, the loss is 0 and so are the gradients. z_loss: coefficient of Chowdhery et al. 2022
    (PaLM). softcap: s becomes softcap * tanh(s / softcap) (Gemma 2), None is none. label_smoothing: that share of the target is
    spread evenly over the vocabulary, as torch.nn.functional.cross_entropy does.

    Autocast casts nothing here: bf16 hidden beside an fp32 master weight are refused under it too. Pass weight.to(hidden.dtype),
    whose gradient reaches the master weight in fp32, rounded to bf16 on the way.

    Logits, loss and the sums behind dx and dW are fp32. Gradients are computed together with the loss, some tokens at a time (Hsu
    et al. 2024, Liger Kernel), and wait for the backward, dx rounded to its dtype, dW in fp32; the backward only scales them, in
    place, and can run once. Under torch.compile both are one operator each, and the backward then returns new tensors.
    fused: Triton kernels between the products, on a CUDA GPU; `kernels.cross_entropy` says how. chunk: tokens whose logits exist
    at once at most, 1 or more, None: as many as a budget of memory allows.

    Raises KernelError for shapes, dtypes, options or a device that it cannot serve, and on a CPU DataError for a label that is
    neither IGNORE nor in [0, V). On a GPU nobody waits to look: such a label makes the loss NaN.
    """
    _check(hidden, weight, labels, z_loss, softcap, label_smoothing, chunk)
    count = (labels != IGNORE).sum()
    if torch.compiler.is_compiling():
        wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
        loss = _operator(hidden, weight, labels, z_loss, softcap or 0.0, label_smoothing, fused, chunk or 0, *wanted)[0]
    else:
        terms = Terms(z_loss, softcap or 0.0, label_smoothing)
        loss = _LinearCrossEntropy.apply(hidden, weight, labels, terms, fused, chunk or 0, torch.is_grad_enabled())
    return LossSum(loss, count)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, softcap: float | None, smoothing: float, chunk: int | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(list(x.shape)) for x in (hidden, weight, labels))
        raise KernelError(f"linear_cross_entropy takes hidden [N, C], weight [V, C] and labels [N], not {shapes}")
    if hidden.dtype != weight.dtype or labels.dtype != torch.int64:
        given = f"{hidden.dtype}, {weight.dtype} and {labels.dtype}"
        raise KernelError(f"linear_cross_entropy takes hidden and weight of one dtype and int64 labels, not {given}")
    if hidden.dtype not in (*DTYPES, torch.float64):
        raise KernelError(f"linear_cross_entropy computes in fp16, bf16, fp32 and fp64, not in {hidden.dtype}")
    if not (0 <= z_loss < inf and 0 <= smoothing < 1) or not (softcap is None or 0 < softcap < inf):
        given = f"not {z_loss}, {softcap} and {smoothing}"
        raise KernelError(f"z_loss must be in [0, inf), softcap in (0, inf) or None, label_smoothing in [0, 1), {given}")
    if not (chunk is None or (isinstance(chunk, int) and chunk >= 1)):
        raise KernelError(f"chunk must be an int of 1 or more, or None for as many tokens as memory allows, not {chunk!r}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms, fused: bool, chunk: int, grad: bool
    ) -> Tensor:
        need_dx, need_dw = (grad and needed for needed in ctx.needs_input_grad[:2])
        parts = _parts(hidden, weight, labels, terms, fused, chunk, need_dx, need_dw)
        ctx.parts, ctx.needed, ctx.dtype, ctx.fused = parts, (need_dx, need_dw), weight.dtype, fused
        return parts.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.parts is None:
            raise RuntimeError("linear_cross_entropy scales its gradients in place: its backward runs once")
        parts, ctx.parts = ctx.parts, None
        need_dx, need_dw = ctx.needed
        scale = _scale_fused_ if ctx.fused else _scale_plain_
        dx, dw = scale(parts.dx, parts.upper, parts.lower, dloss, ctx.dtype)
        return (dx if need_dx else None, dw if need_dw else None, *[None] * 5)


def _parts(
    hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms, fused: bool, chunk: int, need_dx: bool, need_dw: bool
) -> Parts:
    if not labels.is_cuda:
        _check_labels(labels, weight.shape[0])
    if fused:
        if not (hidden.dtype in DTYPES and has_triton() and (hidden.is_cuda or interprets())):
            raise KernelError(
                f"the fused linear_cross_entropy needs Triton, a CUDA GPU and fp16, bf16 or fp32, not {hidden.dtype} on "
                f"{hidden.device.type}: leave `loss` out of training.fused"
            )
        return fused_parts(hidden, weight, labels, terms, need_dx, need_dw, replace(SIZES, tokens=chunk))
    return _plain_parts(hidden, weight, labels, terms, chunk, need_dx, need_dw)


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocabulary))]
    if wrong.numel():
        raise DataError(
            f"label {wrong[0].item()} is outside the vocabulary of {vocabulary}: the data was prepared with another tokenizer, or "
            f"model.vocab_size is too small (labels without loss are {IGNORE})"
        )


def _scale_fused_(dx: Tensor, upper: Tensor, lower: Tensor, dloss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return scale_(dx, dloss), scaled_weight_gradient_(upper, lower, dloss, dtype)


def _scale_plain_(dx: Tensor, upper: Tensor, lower: Tensor, dloss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # a scalar times a bf16 tensor would round the scalar to bf16 first
    for part in dx.split(CHUNK):
        part.copy_(part.to(dloss.dtype) * dloss)
    return dx, upper.mul_(dloss).to(dtype)


def _plain_parts(hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms, chunk: int, need_dx: bool, need_dw: bool) -> Parts:
    """In torch, on any device. All of dW is the upper half."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    matrix = weight if hidden.is_cuda else weight.to(wide)
    dx = hidden.new_empty(hidden.shape if need_dx else (0,))
    dw = weight.new_zeros(weight.shape if need_dw else (0, weight.shape[1]), dtype=wide)
    loss = hidden.new_zeros((), dtype=wide)
    chunk = chunk or max(1, min(CHUNK, LOGITS // weight.shape[0]))
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        x = hidden[rows].to(matrix.dtype)
        part, dlogits = _loss_and_dlogits(product(x, matrix.t(), wide), labels[rows], terms, need_dx or need_dw)
        loss += part
        dlogits = dlogits.to(matrix.dtype)
        if need_dx:
            dx[rows] = product(dlogits, matrix, matrix.dtype)
        if need_dw:
            product_(dw, dlogits.t(), x, add=True)
    return Parts(loss, dx, dw, dw.new_empty(0, dw.shape[1]))


def _loss_and_dlogits(logits: Tensor, labels: Tensor, terms: Terms, gradient: bool) -> tuple[Tensor, Tensor]:
    """The summed loss of one chunk, and its gradient written over the logits [n, V]."""
    z_loss, softcap, smoothing = terms
    bears_loss = labels != IGNORE
    inside = (labels >= 0) & (labels < logits.shape[1])
    target = labels.where(inside, 0)[:, None]
    slope = None
    if softcap:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if gradient else None
        logits.mul_(softcap)
    lse = logits.logsumexp(-1, keepdim=True)
    losses = lse - logits.gather(1, target).where(inside[:, None], torch.nan) * (1 - smoothing)
    if smoothing:
        losses -= smoothing * logits.mean(-1, keepdim=True)
    if z_loss:
        losses += z_loss * lse.square()
    loss = losses.where(bears_loss[:, None], 0).sum()
    if gradient:
        logits.sub_(lse).exp_()
        if z_loss:
            logits.mul_(1 + 2 * z_loss * lse)
        if smoothing:
            logits.sub_(smoothing / logits.shape[1])
        logits.scatter_add_(1, target, logits.new_full((1, 1), smoothing - 1.0).expand_as(target))
        if slope is not None:
            logits.mul_(slope)
        logits.masked_fill_(~bears_loss[:, None], 0)
    return loss, logits


@torch.library.custom_op(
    "longtrain::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, float z_loss, float softcap, float label_smoothing, bool fused, "
    "int chunk, bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _operator(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, softcap: float, label_smoothing: float, fused: bool, chunk: int,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`Parts`, for torch.compile."""
    loss, dx, upper, lower = _parts(hidden, weight, labels, Terms(z_loss, softcap, label_smoothing), fused, chunk, need_dx, need_dw)
    return loss, dx, upper, lower


@_operator.register_fake
def _(hidden, weight, labels, z_loss, softcap, label_smoothing, fused, chunk, need_dx, need_dw):
    vocabulary, width = weight.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    upper = cut(vocabulary, weight.dtype) if fused else vocabulary
    halves = (upper, vocabulary - upper) if need_dw else (0, 0)
    dx = hidden.new_empty(hidden.shape if need_dx else (0,))
    return hidden.new_empty((), dtype=wide), dx, *(weight.new_empty((rows, width), dtype=wide) for rows in halves)


@torch.library.custom_op(
    "longtrain::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor dx, Tensor upper, Tensor lower, Tensor dloss, ScalarType dtype, bool fused) -> (Tensor, Tensor)",
)
def _backward_operator(
    dx: Tensor, upper: Tensor, lower: Tensor, dloss: Tensor, dtype: torch.dtype, fused: bool
) -> tuple[Tensor, Tensor]:
    """What a compiled graph owns may not be scaled in place."""
    rows = upper.shape[0]
    scaled_dx, dw = torch.empty_like(dx), upper.new_empty(rows + lower.shape[0], upper.shape[1], dtype=dtype)
    for source, target in ((dx, scaled_dx), (upper, dw[:rows]), (lower, dw[rows:])):
        if fused:
            scale_into(source, target, dloss)
        else:
            target.copy_(source.to(dloss.dtype) * dloss)
    return scaled_dx, dw


@_backward_operator.register_fake
def _(dx, upper, lower, dloss, dtype, fused):
    return torch.empty_like(dx), upper.new_empty((upper.shape[0] + lower.shape[0], upper.shape[1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.fused, ctx.needed = inputs[1].dtype, inputs[6], inputs[8:]


def _backward(ctx: Any, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dw = None, None
    if dloss is not None:
        dx, dw = _backward_operator(*ctx.saved_tensors, dloss, ctx.dtype, ctx.fused)
    return (dx if ctx.needed[0] else None, dw if ctx.needed[1] else None, *[None] * 8)


_operator.register_autograd(_backward, setup_context=_save)

"""Linear layer and cross entropy in one, without ever holding the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.batch import IGNORE

CHUNK = 2048
"""Tokens a step: 256 MiB of fp32 logits at a vocabulary of 32K, still a full matrix product on a large GPU."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Sum over tokens of cross_entropy(hidden W^T, label), a scalar: fp32, fp64 for fp64 inputs.

    hidden [N, C]; weight [V, C] of the same dtype; labels int64 [N], IGNORE (-100) bears no loss; where no label bears any, the
    loss is 0 and so are the gradients. Logits and the accumulated weight gradient are fp32. Gradients are computed together with
    the loss, `chunk` tokens at a time, so that memory is O(chunk * V) (Hsu et al. 2024, Liger Kernel); the backward only scales
    them, in place, and can run once.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, grad: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_dx, need_dw = (grad and needed for needed in ctx.needs_input_grad[:2])
        matrix = weight if hidden.is_cuda else weight.to(wide)
        dx = torch.empty_like(hidden) if need_dx else None
        dw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_dw else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            x = hidden[rows].to(matrix.dtype)
            part, dlogits = _loss_and_dlogits(_product(x, matrix.t(), wide), labels[rows], need_dx or need_dw)
            loss += part
            dlogits = dlogits.to(matrix.dtype)
            if dx is not None:
                dx[rows] = dlogits @ matrix
            if dw is not None:
                _add_product_(dw, dlogits.t(), x)
        ctx.grads, ctx.weight_dtype, ctx.chunk = (dx, dw), weight.dtype, chunk
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy scales its gradients in place: its backward runs once")
        (dx, dw), ctx.grads = ctx.grads, None
        if dx is not None:
            # a scalar times a bf16 tensor would round the scalar to bf16 first
            for part in dx.split(ctx.chunk):
                part.copy_(part.to(dloss.dtype) * dloss)
        return dx, None if dw is None else dw.mul_(dloss).to(ctx.weight_dtype), None, None, None


def _loss_and_dlogits(logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The summed loss of one chunk, and its gradient written over the logits [n, V]."""
    bears_loss = labels != IGNORE
    target = labels.where(bears_loss, 0)[:, None]
    lse = logits.logsumexp(-1, keepdim=True)
    loss = (lse - logits.gather(1, target)).where(bears_loss[:, None], 0).sum()
    if gradient:
        logits.sub_(lse).exp_()
        logits.scatter_add_(1, target, logits.new_full((1, 1), -1.0).expand_as(target))
        logits.masked_fill_(~bears_loss[:, None], 0)
    return loss, logits


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with a result of `dtype`, not rounded to the inputs' in between."""
    return a @ b if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)

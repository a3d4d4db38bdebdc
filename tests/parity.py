"""Tolerances that calibrate themselves, and the plain attention that everything else is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longtrain.attention.dropout import keep_mask
from longtrain.attention.mask import AttentionMask
from longtrain.attention.spec import AttentionSpec
from longtrain.batch import PADDING

Attention = Callable[[Tensor, Tensor, Tensor, AttentionMask, AttentionSpec], tuple[Tensor, Tensor]]
"""(q, k, v, mask, spec) -> (out, lse), differentiable: `naive_attention`, `LocalAttend(kernel).with_lse`, a simulated ring."""


def assert_close_to_truth(
    fast: Tensor,
    truth: Tensor,
    low_precision_truth: Tensor,
    name: str = "",
    *,
    factor: float = 2.0,
    noise: float | None = None,
    absolute: float = 0.0,
) -> None:
    """err(fast) <= factor * err(low_precision_truth) + noise, both against `truth`: largest and root mean square error.

    truth: computed in fp32 or better from the very inputs that `fast` got. low_precision_truth: the same formula, plainly written,
    in the precision of `fast`: how much error the precision itself costs. noise: relative to the largest |truth|, at least 1; by
    default a quarter of the spacing of the precision, and 2e-6 at least. absolute: noise relative to nothing. Infinities must
    be the same; NaN never passes.
    """
    if noise is None:
        noise = max(2e-6, torch.finfo(low_precision_truth.dtype).eps / 4)
    assert fast.shape == truth.shape == low_precision_truth.shape, f"{name}: {fast.shape}, truth {truth.shape}"
    fast, truth, low = fast.detach().double(), truth.detach().double(), low_precision_truth.detach().double()
    assert not fast.isnan().any(), f"{name}: NaN"
    infinite = truth.isinf()
    assert torch.equal(fast.isinf(), infinite), f"{name}: infinities differ"
    assert torch.equal(fast[infinite], truth[infinite]), f"{name}: infinities of another sign"
    if infinite.all():
        return
    fast, truth, low = fast[~infinite], truth[~infinite], low[~infinite]
    floor = noise * max(1.0, truth.abs().max().item()) + absolute
    for kind, norm in (("largest", _largest), ("rms", _rms)):
        error, allowed = norm(fast - truth), factor * norm(low - truth) + floor
        assert error <= allowed, f"{name}: {kind} error {error:.3e} > {factor} x {norm(low - truth):.3e} + {floor:.1e}"


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attention as a textbook writes it, in the dtype of its inputs, for autograd. Shares only dropout's `keep_mask`."""
    (_, queries, heads, dim), keys = q.shape, k.shape[1]
    group = heads // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (dim**-0.5 if spec.scale is None else spec.scale)
    i, j = torch.arange(queries, device=q.device), torch.arange(keys, device=q.device)
    distance = i[:, None] - j
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.alibi_slopes is not None:
        scores = scores - spec.alibi_slopes.to(scores.dtype).view(-1, 1, 1) * distance.abs()
    if spec.bias is not None:
        scores = scores + spec.bias.to(scores.dtype)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if mask.band.lo is not None:
        seen = seen & (distance >= mask.band.lo)
    if mask.band.hi is not None:
        seen = seen & (distance <= mask.band.hi)
    seen = seen[None, None]
    if mask.q_segments is not None and mask.k_segments is not None:
        documents, other = mask.q_segments[:, None, :, None], mask.k_segments[:, None, None, :]
        seen = seen & (documents == other) & (documents != PADDING)
    scores = scores.masked_fill(~seen, -torch.inf)
    if spec.sinks is not None:
        sinks = spec.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)  # softmax and its gradient are NaN there
    scores = scores.masked_fill(blind, 0.0)
    p = torch.softmax(scores, -1).masked_fill(blind, 0.0)[..., :keys]
    if spec.dropout and spec.dropout_seed is not None:
        p = p * keep_mask(spec.dropout_seed, heads, i, j, spec.dropout).to(p.dtype) / (1 - spec.dropout)
    lse = torch.logsumexp(scores, -1).masked_fill(blind[..., 0], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def results(
    attention: Attention,
    inputs: Sequence[Tensor],
    mask: AttentionMask,
    spec: AttentionSpec,
    dout: Tensor,
    dlse: Tensor | None = None,
) -> dict[str, Tensor]:
    """out, lse and the gradients dq, dk, dv (and dbias, dsinks) of sum(out * dout) + sum(lse * dlse). inputs: q, k, v."""
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    wanted = {"dq": q, "dk": k, "dv": v} | {name: x for name, x in (("dbias", spec.bias), ("dsinks", spec.sinks)) if x is not None}
    out, lse = attention(q, k, v, mask, spec)
    outputs, cotangents = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse.to(lse.dtype)))
    gradients = torch.autograd.grad(outputs, tuple(wanted.values()), cotangents)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(wanted, gradients, strict=True))


def assert_results_close(
    fast: dict[str, Tensor],
    truth: dict[str, Tensor],
    low: dict[str, Tensor],
    noise: float | None = None,
    absolute: dict[str, float] | None = None,
) -> None:
    """`assert_close_to_truth` on every output and gradient. noise of dsinks: a whole spacing of the precision, by default.
    absolute: by name."""
    assert fast.keys() == truth.keys() == low.keys()
    for name in fast:
        # one number a head, so the plain formula may be lucky in all of them
        lucky = max(2e-6, torch.finfo(low[name].dtype).eps) if name == "dsinks" and noise is None else noise
        assert_close_to_truth(fast[name], truth[name], low[name], name, noise=lucky, absolute=(absolute or {}).get(name, 0.0))


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()

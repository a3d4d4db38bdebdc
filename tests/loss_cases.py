"""Problems for linear_cross_entropy, and its definition as a textbook writes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from longtrain.kernels.cross_entropy import Sizes, Terms, fused_parts, scale_, scaled_weight_gradient_
from longtrain.kernels.linear_cross_entropy import linear_cross_entropy
from tests.parity import assert_close_to_truth


@dataclass(frozen=True)
class LossCase:
    """ignored: every so-manyeth label bears no loss, 0: none, 1: all. scale: standard deviation of the logits. far: above 0, the
    logit of every label is -far, and that of another entry is far; needs twice as many entries as tokens."""

    tokens: int
    hidden: int
    vocabulary: int
    z_loss: float = 0.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    ignored: int = 3
    scale: float = 1.0
    far: float = 0.0

    @property
    def options(self) -> dict[str, float | None]:
        return {"z_loss": self.z_loss, "softcap": self.softcap, "label_smoothing": self.label_smoothing}

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """hidden and weight, which require gradients, and labels."""
        hidden = torch.randn(self.tokens, self.hidden, device=device)
        weight = torch.randn(self.vocabulary, self.hidden, device=device) * (self.scale / self.hidden**0.5)
        labels = torch.randint(self.vocabulary, (self.tokens,), device=device)
        if self.far:
            hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
            labels = torch.arange(self.tokens, device=device)
            weight[: self.tokens] = hidden * (-self.far / self.hidden)
            weight[-self.tokens :] = hidden * (self.far / self.hidden)
        if self.ignored:
            labels[:: self.ignored] = -100
        return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def definition(case: LossCase, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss by its definition, in the dtype of its inputs, with all logits."""
    logits = hidden @ weight.t()
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    loss = cross_entropy(logits, labels, reduction="sum", label_smoothing=case.label_smoothing)
    return loss + case.z_loss * logits.logsumexp(-1)[labels != -100].square().sum()


def by_definition(
    case: LossCase, hidden: Tensor, weight: Tensor, labels: Tensor, factor: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and gradients of loss * factor, computed in dtype."""
    h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    loss = definition(case, h, w, labels)
    return loss.detach(), *torch.autograd.grad(loss * factor, (h, w))


def with_sizes(
    case: LossCase, hidden: Tensor, weight: Tensor, labels: Tensor, factor: float, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of the fused version for given sizes."""
    terms = Terms(case.z_loss, case.softcap or 0.0, case.label_smoothing)
    parts = fused_parts(hidden.detach(), weight.detach(), labels, terms, True, True, sizes)
    scale = torch.tensor(factor, device=hidden.device)
    return parts.loss, scale_(parts.dx, scale), scaled_weight_gradient_(parts.upper, parts.lower, scale, weight.dtype)


def check_loss(
    case: LossCase, dtype: torch.dtype, fused: bool, device: str = "cpu", factor: float = 0.37, sizes: Sizes | None = None
) -> None:
    """Loss and gradients against fp64, with the error of the definition computed in dtype as the measure."""
    tensors = case.inputs(dtype, device)
    if sizes is None:
        loss, count = linear_cross_entropy(*tensors, fused=fused, **case.options)  # type: ignore[arg-type]
        assert (count.dtype, count.item()) == (torch.int64, (tensors[2] != -100).sum().item())
        results = loss.detach(), *torch.autograd.grad(loss * factor, tensors[:2])
    else:
        results = with_sizes(case, *tensors, factor, sizes)
    assert results[0].dtype == torch.promote_types(dtype, torch.float32)
    assert results[1].dtype == results[2].dtype == dtype
    truth = by_definition(case, *tensors, factor)
    low = by_definition(case, *tensors, factor, dtype)
    # the loss is fp32 whatever the inputs are
    torch.testing.assert_close(results[0].double(), truth[0], rtol=3e-6, atol=1e-5)
    for name, fast, exact, plain in zip(("dx", "dw"), results[1:], truth[1:], low[1:], strict=True):
        # dx is rounded before it is scaled, too: half a unit in the last place more
        eps = torch.finfo(dtype).eps
        assert_close_to_truth(fast, exact, plain, name, noise=max(2e-6, eps * (0.75 if name == "dx" else 0.25)))

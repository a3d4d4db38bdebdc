"""A small sample of every Triton kernel: what `make sanitize` has CUDA's compute-sanitizer look at, access by access."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longtrain.attention import Band
from longtrain.kernels import plain
from longtrain.kernels.flash import FlashKernel
from tests.attention_cases import BIAS_SHAPES, Case, check_kernel
from tests.layer_cases import NORMS, check_gated, check_norm, check_rotary
from tests.loss_cases import LossCase, check_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE, DTYPE, KERNEL = "cuda", torch.bfloat16, FlashKernel()


@pytest.mark.parametrize("length", [63, 111])
def test_attention(length: int) -> None:
    packed = ((length // 2, 0, 1, length // 3),)
    for case in (
        Case(Band.causal(), length, None, 1, 2, 1, 64),
        Case(Band.full(), length, None, 1, 2, 1, 64),
        Case(Band.causal(100), length, None, 1, 2, 1, 64, q_documents=packed),
        Case(Band.causal(), length, None, 1, 2, 1, 64, q_documents=packed, k_documents=packed),
        Case(Band(-3, None), length, 63, 1, 2, 2, 64),
    ):
        check_kernel(KERNEL, case, DTYPE, DEVICE)


@pytest.mark.parametrize("bias", BIAS_SHAPES)
def test_attention_with_a_bias_and_dropout(bias: str) -> None:
    """dbias is a kernel of its own, or sums of the other two."""
    check_kernel(KERNEL, Case(Band.causal(), 63, None, 1, 3, 1, 64, bias=bias, dropout=0.1), DTYPE, DEVICE)


@pytest.mark.parametrize("width", [59, 64])
def test_attention_with_everything(width: int) -> None:
    """Through pointers and through descriptors."""
    packed = ((55, 0, 1, 37),)
    case = Case(Band.causal(), 111, None, 1, 3, 1, width, None, packed, None, -0.1, 3.0, True, "whole", 0.1, sinks=True)
    for documents in (None, packed):
        check_kernel(KERNEL, replace(case, k_documents=documents), DTYPE, DEVICE)


def test_layers() -> None:
    for name in NORMS:
        check_norm(name, (63, 111), DTYPE, DEVICE)
    check_rotary(2, 63, 4, 2, 64, 64, DTYPE, DEVICE)
    for activation in plain.ACTIVATIONS:
        check_gated((63, 111), activation, DTYPE, DEVICE, joint=activation == "silu")


def test_loss() -> None:
    """Over several programs of a row, and with every term."""
    for case in (LossCase(63, 64, 257), LossCase(111, 64, 2500, z_loss=1e-4, softcap=30.0, label_smoothing=0.1)):
        check_loss(case, DTYPE, True, DEVICE)

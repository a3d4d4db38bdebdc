"""Softmax attention in Triton, for every mask and every score modifier of longtrain.attention; see docs/attention.md."""

from longtrain.kernels.flash.kernel import FlashKernel

__all__ = ["FlashKernel"]

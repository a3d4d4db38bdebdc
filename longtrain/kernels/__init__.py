"""Attention kernels and fused layers: tensors in, tensors out."""

"""The vocabulary of attention: who may look at whom, where positions lie, and what a kernel must do. Imports torch only."""

from longtrain.attention.keep import Keep
from longtrain.attention.layout import Chunk, SequenceLayout
from longtrain.attention.mask import AttentionMask, Band, Cover
from longtrain.attention.protocol import (
    PLAIN,
    Attend,
    AttentionKernel,
    Block,
    Grads,
    Needs,
    Partial,
    band_kind,
)
from longtrain.attention.schedule import BlockPlan, plan_step, ring_plan
from longtrain.attention.spec import AttentionSpec

__all__ = [
    "PLAIN",
    "Attend",
    "AttentionKernel",
    "AttentionMask",
    "AttentionSpec",
    "Band",
    "Block",
    "BlockPlan",
    "Chunk",
    "Cover",
    "Grads",
    "Keep",
    "Needs",
    "Partial",
    "SequenceLayout",
    "band_kind",
    "plan_step",
    "ring_plan",
]

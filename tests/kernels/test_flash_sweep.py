"""The sweep that test_flash_gpu.py makes: what is in it, and a little of it in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from longtrain.attention import Band
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from tests.attention_cases import BIAS_SHAPES, Case, check_kernel
from tests.attention_sweep import DTYPES, SHARDS, WIDTHS, problems

SWEEP = [problem for shard in range(SHARDS) for problem in problems(shard)]


def through_segments(case: Case) -> bool:
    """Self attention over documents of which nobody says that they lie one after another."""
    return case.q_documents is not None and case.k_documents is not None and case.k_length == case.q_length


FEATURES: dict[str, Callable[[Case], bool]] = {
    "scale": lambda case: case.scale is not None and case.scale > 0,
    "negative scale": lambda case: case.scale is not None and case.scale < 0,
    "negative scale alone": lambda case: (case.scale or 0) < 0 and not (case.softcap or case.alibi or case.bias),
    "sinks": lambda case: case.sinks,
    "three query heads a key head": lambda case: case.heads == 3 * case.kv_heads,
    "five query heads a key head": lambda case: case.heads == 5 * case.kv_heads,
    "runs": lambda case: case.q_documents is not None and case.k_documents is None,
    "segments in self attention": through_segments,
    "dropout": lambda case: case.dropout > 0,
    "softcap": lambda case: case.softcap is not None,
    "slopes": lambda case: case.alibi,
} | {f"bias, {shape}": lambda case, shape=shape: case.bias == shape for shape in BIAS_SHAPES}


def cost(case: Case) -> int:
    return case.batch * case.heads * case.q_length * (case.k_length or case.q_length) * case.dim


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_in_the_sweep(name: str) -> None:
    for dtype in DTYPES:
        assert sum(FEATURES[name](case) for case, of in SWEEP if of == dtype) >= 5, dtype


def test_every_width_is_there_in_every_precision() -> None:
    assert len(SWEEP) >= 1000
    assert {(case.dim, dtype) for case, dtype in SWEEP} == set(product(WIDTHS, DTYPES))


def test_the_rule_for_a_gradient_of_one_number_among_zeros() -> None:
    """Every row of this one of the sweep sees one key: what is not zero in dbias is a sum of rounding errors, drawn four times."""
    documents = ((63,),), ((1, 110),)
    case = Case(Band.causal(), 63, 111, 1, 3, 1, 59, None, *documents, None, 3.0, False, "vector", 0.2, seed=551591044)
    check_kernel(MemoryEfficientKernel(), case, torch.float16)


@pytest.mark.skipif(not has_triton() or not interprets(), reason="Triton does not interpret here: test_flash_gpu.py runs the sweep")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "name", ["negative scale alone", "sinks", "three query heads a key head", "segments in self attention", "bias, whole"]
)
def test_the_cheapest_of_each(name: str, dtype: torch.dtype) -> None:
    case = min((case for case, of in SWEEP if of == dtype and FEATURES[name](case)), key=cost)
    check_kernel(FlashKernel(interpret=True), case, dtype)

"""NVMe offload is refused with the reason, however a recipe asks for it."""

from __future__ import annotations

import pytest

from longtrain.errors import RecipeError
from longtrain.recipe.load import load_recipe


@pytest.mark.parametrize(
    "asked",
    [
        "zero.offload=nvme",
        "zero.deepspeed={zero_optimization: {offload_optimizer: {device: nvme}}}",
        "zero.deepspeed={zero_optimization: {offload_optimizer: {nvme_path: /disk}}}",
        "zero.deepspeed={zero_optimization: {offload_param: {device: nvme}}}",
        "zero.deepspeed={aio: {block_size: 1048576}}",
    ],
)
def test_nvme_is_refused_with_the_reason(asked: str) -> None:
    with pytest.raises(RecipeError, match=r"NVMe offload: DeepSpeed rewrites its swap files in place .*; use zero\.offload cpu"):
        load_recipe("llama-1b-32k", [asked])

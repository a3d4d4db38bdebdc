"""recipe + number of ranks + device -> Plan: cross checks, derived numbers, kernel choice. Pure: nothing is built or started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from longtrain.attention import Band, Needs, SequenceLayout, ring_plan
from longtrain.errors import PlanError
from longtrain.kernels.registry import Choice, kinds_of, select
from longtrain.models.config import ModelConfig
from longtrain.models.families import parameter_count
from longtrain.parallel.zero_config import DTYPES, deepspeed_config
from longtrain.recipe.schema import Activations, Device, Precision, Recipe


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for `world` ranks. Nothing downstream writes into it.

    device: "cpu" or "cuda". padded_length: of one sequence, as the ring splits it. deepspeed: the generated configuration.
    """

    recipe: Recipe
    world: int
    dp: int
    cp: int
    accumulation: int
    device: str
    dtype: torch.dtype
    model: ModelConfig
    parameters: int
    layout: SequenceLayout
    band: Band
    padded_length: int
    kernel: Choice
    deepspeed: dict[str, Any] = field(repr=False)

    @property
    def local_length(self) -> int:
        """Positions of a sequence that one rank holds."""
        return self.padded_length // self.cp

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.recipe.training.batch_size * self.recipe.training.sequence_length


def make_plan(recipe: Recipe, world: int, device: str) -> Plan:
    """Resolves `recipe` for `world` ranks on "cpu" or "cuda".

    Raises PlanError where the ranks, the device or the batch do not fit, KernelError where no kernel does; each names the field.
    """
    training, parallel = recipe.training, recipe.parallel
    dp = _data_parallel(recipe, world)
    if training.batch_size % (dp * training.micro_batch_size):
        raise PlanError(
            f"training.batch_size {training.batch_size} is not a multiple of dp {dp} x training.micro_batch_size "
            f"{training.micro_batch_size}; change one of them or the number of ranks"
        )
    if recipe.device is not Device.AUTO and recipe.device != device:
        raise PlanError(f"device: the recipe wants {recipe.device}, this plan is for {device}")
    if training.precision is Precision.FP16 and device == "cpu":
        raise PlanError("training.precision: fp16 needs a GPU; use fp32 or bf16, or device cuda")
    if training.activations is Activations.MINIMAL and parallel.cp > 1:
        raise PlanError(
            "training.activations: minimal runs attention again in the backward, and with parallel.cp > 1 its exchange too; "
            "use full, which keeps the attention output"
        )
    layout, band = SequenceLayout(parallel.layout.value), Band.causal(recipe.model.window)
    padded_length, dtype = layout.padded_length(training.sequence_length, parallel.cp), DTYPES[training.precision]
    model = model_config(recipe)
    schedule = ring_plan(layout, padded_length, padded_length, parallel.cp, band)
    kinds = kinds_of(block.band for row in schedule for blocks in row for block in blocks)
    needs = Needs(kinds, True, frozenset(), model.head_dim, model.head_dim, dtype, device, fp32_partials=parallel.cp > 1)
    accumulation = training.batch_size // (dp * training.micro_batch_size)
    return Plan(
        recipe=recipe,
        world=world,
        dp=dp,
        cp=parallel.cp,
        accumulation=accumulation,
        device=device,
        dtype=dtype,
        model=model,
        parameters=parameter_count(model),
        layout=layout,
        band=band,
        padded_length=padded_length,
        kernel=select(needs, recipe.attention.kernel),
        deepspeed=deepspeed_config(
            stage=recipe.zero.stage,
            offload=recipe.zero.offload.value,
            precision=training.precision.value,
            world=world,
            micro_batch=training.micro_batch_size,
            accumulation=accumulation,
            grad_clip=recipe.optimizer.grad_clip,
        ),
    )


def _data_parallel(recipe: Recipe, world: int) -> int:
    dp, cp = recipe.parallel.dp, recipe.parallel.cp
    if dp == "auto":
        if world % cp:
            raise PlanError(
                f"parallel.cp: the number of ranks, {world}, is not a multiple of cp {cp}; start a multiple of {cp} "
                f"(torchrun --nproc-per-node {-(-world // cp) * cp}) or change parallel.cp"
            )
        return world // cp
    if dp * cp != world:
        raise PlanError(
            f"parallel: dp {dp} x cp {cp} needs {dp * cp} ranks, there are {world}; start torchrun --nproc-per-node {dp * cp}, "
            "or set parallel.dp to auto"
        )
    return dp


def model_config(recipe: Recipe) -> ModelConfig:
    """The decoder that a recipe describes."""
    model = recipe.model
    return ModelConfig(
        family=model.family.value,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.key_value_heads,
        head_dim=model.dim_per_head,
        intermediate_size=model.intermediate_size,
        max_positions=recipe.training.sequence_length,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        tied_embeddings=model.tied_embeddings,
        window=model.window,
        init_std=model.init_std,
    )

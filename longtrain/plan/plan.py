"""recipe + number of ranks + device -> Plan: cross checks, derived numbers, kernel choice. Pure: nothing is built or started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from longtrain.attention import Band, Needs, SequenceLayout, ring_plan
from longtrain.errors import PlanError
from longtrain.kernels.layers import FUSABLE, fusable
from longtrain.kernels.registry import Choice, kinds_of, select
from longtrain.models.config import ModelConfig
from longtrain.models.families import family_of, parameter_count
from longtrain.parallel.ulysses import UlyssesLayout
from longtrain.parallel.zero_config import DTYPES, deepspeed_config
from longtrain.plan.model import model_config, resolve
from longtrain.plan.ranks import share
from longtrain.recipe.schema import Device, Recipe
from longtrain.recipe.tree import overlaid


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for `world` ranks. Nothing downstream writes into it.

    recipe: with the whole shape of the decoder. host: how many of the ranks are on each machine. device: "cpu" or "cuda". layout:
    how a sequence is dealt to cp ranks. padded_length: of one sequence, as the layout splits it. fused: layers that run as one
    kernel (`kernels.layers.FUSABLE`). deepspeed: the generated configuration.
    """

    recipe: Recipe
    world: int
    host: int
    dp: int
    cp: int
    accumulation: int
    device: str
    dtype: torch.dtype
    model: ModelConfig
    parameters: int
    layout: SequenceLayout | UlyssesLayout
    band: Band
    padded_length: int
    kernel: Choice
    fused: tuple[str, ...]
    deepspeed: dict[str, Any] = field(repr=False)

    @property
    def ring(self) -> SequenceLayout:
        """How a sequence is dealt to the ring: of all cp ranks, or of the groups that share heads."""
        return _ring(self.recipe)

    @property
    def local_length(self) -> int:
        """Positions of a sequence that one rank holds."""
        return self.padded_length // self.cp

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.recipe.training.batch_size * self.recipe.training.sequence_length


def make_plan(recipe: Recipe, world: int, device: str, host: int | None = None) -> Plan:
    """Resolves `recipe` for `world` ranks on "cpu" or "cuda". host: how many of the ranks are on each machine; None: all of them.

    Of model.init no more than its config.json is read. Raises PlanError where the ranks, the device or the batch do not fit,
    KernelError where no kernel does, CheckpointError where model.init is no model that can be trained; each names the field.
    """
    recipe = resolve(recipe)
    training, parallel = recipe.training, recipe.parallel
    dp, cp = share(recipe, world, host or world)
    if recipe.device is not Device.AUTO and recipe.device != device:
        raise PlanError(f"device: the recipe wants {recipe.device}, this plan is for {device}")
    _judge_again(recipe, dp, cp, device)
    layout = _ring(recipe) if parallel.ulysses == 1 else UlyssesLayout(_ring(recipe), parallel.ulysses)
    padded_length, band = layout.padded_length(training.sequence_length, cp), Band.causal(recipe.model.window)
    model = model_config(recipe)
    accumulation = training.batch_size // (dp * training.micro_batch_size)
    return Plan(
        recipe=recipe,
        world=world,
        host=host or world,
        dp=dp,
        cp=cp,
        accumulation=accumulation,
        device=device,
        dtype=DTYPES[training.precision],
        model=model,
        parameters=parameter_count(model),
        layout=layout,
        band=band,
        padded_length=padded_length,
        kernel=_kernel(recipe, model, padded_length, cp, band, device),
        fused=_fused(recipe, model, device),
        deepspeed=_deepspeed(recipe, world, accumulation),
    )


def _judge_again(recipe: Recipe, dp: int, cp: int, device: str) -> None:
    """Raises PlanError for what the recipe would be refused for if it said what is known only now: the whole shape of its decoder,
    the ranks, the device."""
    parallel = recipe.parallel.model_copy(update={"dp": dp, "cp": cp})
    known = recipe.model_copy(update={"parallel": parallel, "device": Device(device)})
    for conflict in known.conflicts():
        raise PlanError(f"{conflict.field}: {conflict.message}")


def _deepspeed(recipe: Recipe, world: int, accumulation: int) -> dict[str, Any]:
    generated = deepspeed_config(
        stage=recipe.zero.stage,
        offload=recipe.zero.offload.value,
        precision=recipe.training.precision.value,
        world=world,
        micro_batch=recipe.training.micro_batch_size,
        accumulation=accumulation,
        grad_clip=recipe.optimizer.grad_clip,
    )
    return overlaid(generated, recipe.zero.deepspeed or {})


def _ring(recipe: Recipe) -> SequenceLayout:
    return SequenceLayout(recipe.parallel.layout.value)


def _kernel(recipe: Recipe, model: ModelConfig, length: int, cp: int, band: Band, device: str) -> Choice:
    """The attention kernel for all blocks of the ring's schedule; length: of a padded sequence."""
    ranks = cp // recipe.parallel.ulysses
    dropout: frozenset[str] = frozenset({"dropout"} if model.attention_dropout else ())
    schedule = ring_plan(_ring(recipe), length, length, ranks, band, positional=bool(dropout))
    kinds = kinds_of(block.band for row in schedule for blocks in row for block in blocks)
    width, dtype = model.head_dim, DTYPES[recipe.training.precision]
    needs = Needs(kinds, True, dropout, width, width, dtype, device, fp32_partials=ranks > 1)
    return select(needs, recipe.attention.kernel)


def _fused(recipe: Recipe, model: ModelConfig, device: str) -> tuple[str, ...]:
    """The layers to fuse, in the order of FUSABLE. On a CPU kernels run in Triton's interpreter only, and never unasked."""
    wanted, able = recipe.training.fused, fusable(device)
    if wanted == "auto":
        family = family_of(model)
        absent = {"rotary"} if family.positions != "rotary" else set()
        absent |= {"mlp"} if family.mlp != "gated" else set()
        return tuple(name for name in able if name not in absent) if device == "cuda" else ()
    if wanted == "none":
        return ()
    unable = [name for name in wanted if name not in able]
    if unable:
        raise PlanError(
            f"training.fused: {', '.join(unable)} cannot be fused on this {device}: that takes Triton and a GPU of compute "
            "capability 8.0 or above; set training.fused to auto or none"
        )
    return tuple(name for name in FUSABLE if name in wanted)

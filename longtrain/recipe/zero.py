"""The part of a recipe that says what ranks do not each keep a copy of, and which of DeepSpeed's own keys it may hold.

DeepSpeed ignores keys that it does not know and reads some of the others at certain stages only. Here each is one that is known to
be read, or it is refused.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from longtrain.recipe.section import Conflict, Section
from longtrain.recipe.tree import UNREADABLE


class Offload(StrEnum):
    NONE = "none"
    CPU = "cpu"


class RawKey(NamedTuple):
    """kind: of its value; every number is at least 1. stages: where DeepSpeed reads it."""

    kind: type[int] | type[bool]
    stages: tuple[int, ...] = (0, 1, 2, 3)


_ZERO = "zero_optimization"
RAW_KEYS: Mapping[str, RawKey] = {
    f"{_ZERO}.reduce_bucket_size": RawKey(int, (1, 2, 3)),
    f"{_ZERO}.allgather_bucket_size": RawKey(int, (1, 2)),
    f"{_ZERO}.overlap_comm": RawKey(bool, (1, 2, 3)),
    f"{_ZERO}.contiguous_gradients": RawKey(bool, (1, 2)),
    f"{_ZERO}.reduce_scatter": RawKey(bool, (1, 2)),
    f"{_ZERO}.sub_group_size": RawKey(int, (3,)),
    f"{_ZERO}.stage3_prefetch_bucket_size": RawKey(int, (3,)),
    f"{_ZERO}.stage3_param_persistence_threshold": RawKey(int, (3,)),
    f"{_ZERO}.stage3_max_live_parameters": RawKey(int, (3,)),
    f"{_ZERO}.stage3_max_reuse_distance": RawKey(int, (3,)),
    f"{_ZERO}.offload_optimizer.pin_memory": RawKey(bool, (1, 2, 3)),
    "wall_clock_breakdown": RawKey(bool),
    "memory_breakdown": RawKey(bool),
    "steps_per_print": RawKey(int),
}
"""DeepSpeed's keys that change how the work is done and nothing that the plan decides."""

DECIDED: Mapping[str, str] = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "data_types": "training.precision",
    "activation_checkpointing": "training.activations",
    "checkpoint": "checkpoint",
    "tensorboard": "tracking.tensorboard",
    "wandb": "tracking.wandb",
    "sequence_parallel_size": "parallel",
    "tensor_parallel": "parallel",
    f"{_ZERO}.stage": "zero.stage",
    f"{_ZERO}.offload_optimizer.device": "zero.offload",
    f"{_ZERO}.cpu_offload": "zero.offload",
}
"""DeepSpeed's keys that other fields of a recipe decide, and these fields."""

_NO_NVME = (
    "NVMe offload: DeepSpeed rewrites its swap files in place at every step, where a kill tears them, through a library that it "
    "must compile, and checkpoints read state in memory only; use zero.offload cpu, more ranks or a higher zero.stage"
)
FORBIDDEN: Mapping[str, str] = {
    "aio": _NO_NVME,
    f"{_ZERO}.offload_optimizer.nvme_path": _NO_NVME,
    "communication_data_type": "gradients are summed in fp32, because sums of bf16 lose what small shards contribute",
    "prescale_gradients": "the loss is scaled once, to the mean over all tokens of a step",
    "gradient_predivide_factor": "the loss is scaled once, to the mean over all tokens of a step",
    # measured at stages 1 and 2: every range then holds another parameter's values
    f"{_ZERO}.round_robin_gradients": "checkpoints find the ranges of a parameter by the order of the model",
    f"{_ZERO}.zero_hpz_partition_size": "checkpoints know of one way only to share parameters out",
    f"{_ZERO}.zero_quantized_weights": "weights travel as they are",
    f"{_ZERO}.zero_quantized_gradients": "gradients are summed in fp32",
    f"{_ZERO}.offload_param": "parameters stay on the device; zero.stage 3 shares them out",
}
"""DeepSpeed's keys that would break what this program promises, and what."""


def _not_nvme(offload: object) -> object:
    if offload == "nvme":
        raise ValueError(_NO_NVME)
    return offload


class ZeroSection(Section):
    """What the ranks do not each keep a copy of (DeepSpeed ZeRO)."""

    stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="Shared out over all ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters.",
    )
    offload: Annotated[Offload, BeforeValidator(_not_nvme)] = Field(
        default=Offload.NONE, strict=False, description="Where optimizer state lives: none (on the device), cpu."
    )
    deepspeed: dict[str, Any] | None = Field(
        default=None,
        description="Keys of DeepSpeed's own configuration, nested as there, for what no field of a recipe says: "
        f"{', '.join(f'`{name}`' for name in RAW_KEYS)}. Each is refused where its stage does not read it; so is every other.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.offload is Offload.CPU and self.stage == 0:
            yield Conflict("offload", "offload cpu needs zero.stage 1, 2 or 3; stage 0 keeps optimizer state on the device")
        for name, value in _leaves(self.deepspeed or {}):
            reason = self._refuses(name, value)
            if reason is not None:
                yield Conflict(f"deepspeed.{name}", reason)

    def _refuses(self, name: str, value: object) -> str | None:
        """Why a key of DeepSpeed's, by its dotted name, cannot be passed on; None where it can, or was already reported."""
        if name.endswith(".device") and value == "nvme":
            return f"cannot be passed on: {_NO_NVME}"
        for above in _prefixes(name):
            if above in DECIDED:
                return f"{DECIDED[above]} decides it; delete it, and set that"
            if above in FORBIDDEN:
                return f"cannot be passed on: {FORBIDDEN[above]}; delete it"
        key = RAW_KEYS.get(name)
        if key is None:
            close = get_close_matches(name, RAW_KEYS, n=1, cutoff=0.75)
            return f"unknown key; did you mean {close[0]!r}?" if close else f"unknown key; there are: {', '.join(RAW_KEYS)}"
        if value is UNREADABLE:
            return None
        if type(value) is not key.kind or (key.kind is int and not 1 <= value < 2**63):  # type: ignore[operator]
            return f"expected {'true or false' if key.kind is bool else 'a whole number of at least 1'}, found {value!r}"
        if self.stage not in key.stages:
            return f"zero.stage {self.stage} does not read it, only {' and '.join(map(str, key.stages))}; delete it"
        if "offload_optimizer" in name and self.offload is Offload.NONE:
            return "zero.offload none does not read it; delete it, or set zero.offload to cpu"
        return None


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value); an empty section is a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _prefixes(name: str) -> Iterator[str]:
    words = name.split(".")
    return (".".join(words[:end]) for end in range(1, len(words) + 1))


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the leaves of `above` in it."""
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        merged[name] = overlaid(lower, value) if isinstance(lower, Mapping) and isinstance(value, Mapping) else value
    return merged

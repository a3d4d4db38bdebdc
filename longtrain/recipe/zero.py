"""The part of a recipe that says what ranks do not each keep a copy of, and which of DeepSpeed's own keys it may hold.

DeepSpeed ignores keys that it does not know and reads some of the others at certain stages only. Here each is one that is known to
be read, or it is refused.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from longtrain.recipe.section import Conflict, Section, output_text
from longtrain.recipe.tree import UNREADABLE


class Offload(StrEnum):
    NONE = "none"
    CPU = "cpu"


class RawKey(NamedTuple):
    """kind: of its value; a whole number is at least 1, another one a share, a list holds text. stages: where DeepSpeed reads it.
    choices: of a text; none: it is the path of a file that is written."""

    kind: type[int] | type[bool] | type[float] | type[str] | type[list]
    stages: tuple[int, ...] = (0, 1, 2, 3)
    choices: tuple[str, ...] = ()

    def refuses(self, value: object) -> str | None:
        """What the value must be instead, in words."""
        if self.kind is bool:
            return None if isinstance(value, bool) else f"expected true or false, found {value!r}"
        if self.kind is int:
            fits = type(value) is int and 1 <= value < 2**63
            return None if fits else f"expected a whole number of at least 1, found {value!r}"
        if self.kind is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
            return None if fits else f"expected a number from 0 to 1, found {value!r}"
        if self.kind is list:
            fits = isinstance(value, list) and all(isinstance(word, str) for word in value)
            return None if fits else f"expected a list of text, found {value!r}"
        if self.choices:
            return None if value in self.choices else f"expected one of {', '.join(self.choices)}, found {value!r}"
        try:
            return None if isinstance(value, str) and output_text(value) else f"expected a path, found {value!r}"
        except ValueError as error:
            return f"{error}; found {value!r}"


_ZERO, _COMMS, _FLOPS, _THROUGHPUT = "zero_optimization", "comms_logger", "flops_profiler", "timers.throughput"
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
    f"{_ZERO}.stage3_model_persistence_threshold": RawKey(int, (3,)),
    f"{_ZERO}.stage3_module_granularity_threshold": RawKey(int, (3,)),
    f"{_ZERO}.use_multi_rank_bucket_allreduce": RawKey(bool, (1, 2)),
    f"{_ZERO}.ignore_unused_parameters": RawKey(bool, (2,)),
    f"{_ZERO}.enable_sanity_checks": RawKey(bool, (3,)),
    f"{_ZERO}.log_trace_cache_warnings": RawKey(bool, (3,)),
    f"{_ZERO}.offload_optimizer.pin_memory": RawKey(bool, (1, 2, 3)),
    "wall_clock_breakdown": RawKey(bool),
    "memory_breakdown": RawKey(bool),
    "steps_per_print": RawKey(int),
    "log_level": RawKey(str, choices=("debug", "info", "warning", "error", "critical")),
    "dump_state": RawKey(bool),
    "disable_python_gc": RawKey(bool),
    f"{_THROUGHPUT}.enabled": RawKey(bool),
    f"{_THROUGHPUT}.synchronized": RawKey(bool),
    f"{_COMMS}.enabled": RawKey(bool),
    f"{_COMMS}.verbose": RawKey(bool),
    f"{_COMMS}.prof_all": RawKey(bool),
    f"{_COMMS}.prof_ops": RawKey(list),
    f"{_COMMS}.debug": RawKey(bool),
    f"{_FLOPS}.enabled": RawKey(bool),
    f"{_FLOPS}.profile_step": RawKey(int),
    f"{_FLOPS}.module_depth": RawKey(int),
    f"{_FLOPS}.top_modules": RawKey(int),
    f"{_FLOPS}.detailed": RawKey(bool),
    f"{_FLOPS}.recompute_fwd_factor": RawKey(float),
    f"{_FLOPS}.output_file": RawKey(str),
}
"""DeepSpeed's keys that change how the work is done, or what is told of it, and nothing that the plan decides."""

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
    "bfloat16": "training.precision",
    "torch_autocast": "training.precision",
    "amp": "training.precision",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "managed_gradient_accumulation": "training.batch_size and training.micro_batch_size",
    "autotuning": "training.batch_size and training.micro_batch_size",
    "vocabulary_size": "model.vocab_size",
    "compile": "training.fused",
    "dataloader_drop_last": "data",
    "activation_checkpointing": "training.activations",
    "checkpoint": "checkpoint",
    "tensorboard": "tracking.tensorboard",
    "wandb": "tracking.wandb",
    "comet": "tracking",
    "csv_monitor": "tracking",
    "sequence_parallel_size": "parallel",
    "tensor_parallel": "parallel",
    "pipeline": "parallel",
    "elasticity": "parallel",
    f"{_ZERO}.stage": "zero.stage",
    f"{_ZERO}.offload_optimizer.device": "zero.offload",
    f"{_ZERO}.cpu_offload": "zero.offload",
    f"{_ZERO}.load_from_fp32_weights": "checkpoint",
    f"{_ZERO}.elastic_checkpoint": "checkpoint",
    f"{_ZERO}.stage3_gather_16bit_weights_on_model_save": "checkpoint",
}
"""DeepSpeed's keys that other fields of a recipe decide, and these fields."""

_NO_NVME = (
    "NVMe offload: DeepSpeed rewrites its swap files in place at every step, where a kill tears them, through a library that it "
    "must compile, and checkpoints read state in memory only; use zero.offload cpu, more ranks or a higher zero.stage"
)
_CUT_BEFORE = "parameters are shared out as they are made, before DeepSpeed reads it"
_NO_EXPERTS = "no model here has experts"
_OWN_ORDER = "the sequences of a step follow from the seed alone"
_WHOLE_STATE = "zero.offload moves all of the optimizer state, or none"

FORBIDDEN: Mapping[str, str] = {
    "aio": _NO_NVME,
    f"{_ZERO}.offload_optimizer.buffer_count": _NO_NVME,
    f"{_ZERO}.offload_optimizer.fast_init": _NO_NVME,
    f"{_ZERO}.offload_optimizer.pipeline_read": _NO_NVME,
    f"{_ZERO}.offload_optimizer.pipeline_write": _NO_NVME,
    f"{_ZERO}.offload_optimizer.ratio": _WHOLE_STATE,
    f"{_ZERO}.offload_optimizer.super_offload": _WHOLE_STATE,
    f"{_ZERO}.offload_optimizer.cpuadam_cores_perc": _WHOLE_STATE,
    f"{_ZERO}.zenflow": "it updates some weights later than others",
    f"{_ZERO}.compute_grad_norm": "the norm of each step is reported, and decides whether it is skipped",
    f"{_ZERO}.memory_efficient_linear": _CUT_BEFORE,
    f"{_ZERO}.override_module_apply": _CUT_BEFORE,
    f"{_ZERO}.stage3_use_all_reduce_for_fetch_params": _CUT_BEFORE,
    f"{_ZERO}.stage3_allgather_sequential": _CUT_BEFORE,
    f"{_ZERO}.leaf_module": _NO_EXPERTS,
    "expert_parallel": _NO_EXPERTS,
    "use_data_before_expert_parallelism": _NO_EXPERTS,
    "data_efficiency": _OWN_ORDER,
    "curriculum_learning": _OWN_ORDER,
    "gradient_allreduce_op": "the loss is scaled once, to the mean over all tokens of a step",
    "seq_parallel_communication_data_type": "gradients are summed in fp32",
    "compression_training": "weights are trained as they are",
    "weight_quantization": "weights are trained as they are",
    f"{_ZERO}.offload_optimizer.nvme_path": _NO_NVME,
    "communication_data_type": "gradients are summed in fp32, because sums of bf16 lose what small shards contribute",
    "prescale_gradients": "the loss is scaled once, to the mean over all tokens of a step",
    "gradient_predivide_factor": "the loss is scaled once, to the mean over all tokens of a step",
    # measured at stages 1 and 2: every range then holds another parameter's values
    f"{_ZERO}.parameter_alignment": "checkpoints find the ranges of a parameter by the order of the model",
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
        f"{', '.join(f'`{name}`' for name in RAW_KEYS)}. Each is refused where its stage does not read it; so is every other. What "
        "comms_logger, dump_state and steps_per_print say is shown with `log_level: info`.",
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
            section, _, word = name.rpartition(".")
            inside = [known for known in RAW_KEYS if known.startswith(f"{section}.")] or list(RAW_KEYS)
            close = get_close_matches(word, [known.rpartition(".")[2] for known in inside], n=1, cutoff=0.75)
            meant = next((known for known in inside if close and known.rpartition(".")[2] == close[0]), None)
            return f"unknown key; did you mean {meant!r}?" if meant else f"unknown key; there are: {', '.join(inside)}"
        if value is UNREADABLE:
            return None
        wrong = key.refuses(value)
        if wrong is not None:
            return wrong
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

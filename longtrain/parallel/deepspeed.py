"""ZeRO through DeepSpeed: the engine, the optimizer state that this rank owns, and the proof that gradients are not rescaled.

The only module that imports deepspeed, and only inside functions: importing longtrain works without it. DeepSpeed sees a world
of data-parallel ranks at every stage (no mpu, no mesh, no sequence parallel size): it averages gradients over all ranks.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longtrain.errors import LaunchError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.loss import loss_scale
from longtrain.parallel.zero_config import DTYPES, deepspeed_config

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

# Steps without overflow after which the fp16 loss scale doubles.
SCALE_WINDOW = 1000

Gathered = Callable[[nn.Parameter], AbstractContextManager[Any]]


def load() -> None:
    """Import DeepSpeed; best while there is no process group. Functions of it, and of a module of torch that it imports later, take
    the group of that moment as the default of a parameter, which would then stay, with its threads, to the end of the process."""
    import deepspeed
    import torch.distributed.nn  # noqa: F401

    # Without this DeepSpeed compiles an op with g++ at the first CPU start, and hangs on the lock of a compile that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Its collectives go by names that torch 2.13 deprecates, once per call site and rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`", FutureWarning)


def attach() -> None:
    """Make DeepSpeed use the process group that launch.start created. Safe to call again."""
    load()
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()


def detach() -> None:
    """Make DeepSpeed forget the process group that is about to be destroyed, if it was ever imported."""
    if "deepspeed" not in sys.modules:
        return
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.utils import groups

    groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    # ZeRO-3 never lets go of a model, whose parameters know the group: it stays in this list, and in what methods remember
    FWD_MODULE_STACK.clear()
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper and str(thing.__module__).startswith("deepspeed.runtime.zero"):
            thing.cache_clear()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(
    make: Callable[[], nn.Module],
    ctx: ParallelContext,
    stage: int,
    dtype: torch.dtype,
    initialise: Callable[[nn.Module, Gathered], None],
) -> nn.Module:
    """The module of `make()` on this rank's device in `dtype`, filled by `initialise`, without a second copy of it anywhere.

    At stage 3 every parameter is cut into shards as soon as it exists. `initialise(model, gathered)` runs on every rank and
    writes each parameter inside `with gathered(parameter):`; at stage 3 rank 0's values count, and the other stages are
    broadcast from rank 0 when the Engine is made. Tensors that `make` creates with an explicit dtype keep it.
    """
    if stage < 3:
        with torch.device(ctx.device), _default_dtype(dtype):
            model = make()
        initialise(model, lambda parameter: nullcontext())
        return model
    import deepspeed

    attach()
    precision = next(name for name, value in DTYPES.items() if value == dtype)
    config = deepspeed_config(stage=3, precision=precision, world=ctx.world)
    # No tensor_overrides: they would turn every fp32 buffer that make() creates, rotary tables included, into `dtype`.
    init = deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[])
    with torch.device(ctx.device), _default_dtype(dtype), init:
        model = make()
    initialise(model, lambda parameter: deepspeed.zero.GatheredParameters([parameter], modifier_rank=0))
    return model


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global L2 norm of the token-mean gradient before clipping, inf where it overflowed; then `skipped`."""

    grad_norm: float
    skipped: bool


@dataclass(frozen=True, eq=False)
class Range:
    """Flat elements [start, start + numel) of parameter `name`: live fp32 views [numel] of the master weight and moments."""

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class ParameterInfo:
    """What a parameter is when it is whole, at every stage and world size."""

    shape: tuple[int, ...]
    numel: int
    dtype: str


class Engine:
    """A model under ZeRO with AdamW.

    groups: `{"params": [...], "weight_decay": ...}` as train.optim.decay_groups makes them. config: from deepspeed_config.
    A step is `accumulation` times forward and backward, then `step`; any other count raises RuntimeError.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        ctx: ParallelContext,
        *,
        config: dict[str, Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        import deepspeed

        attach()
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ValueError(f"parameter {frozen[0]} does not require a gradient; checkpoints hold trained parameters only")
        self.ctx = ctx
        self.model = model
        self.stage = int(config["zero_optimization"]["stage"])
        self.accumulation = int(config["gradient_accumulation_steps"])
        self._micro = 0
        self._adam = torch.optim.AdamW(list(groups), lr=lr, betas=betas, eps=eps, fused=ctx.device.type == "cuda")
        # Any: what is read below are attributes of the one optimizer class that the stage makes, not of their common base.
        made: tuple[Any, ...] = deepspeed.initialize(model=model, optimizer=self._adam, config=config, dist_init_required=False)
        self._engine, self._zero = made[:2]
        # DeepSpeed's copy of the world group has torch's default timeout of 10 minutes under NCCL.
        group: Any = deepspeed.utils.groups._get_data_parallel_group()
        torch.distributed.distributed_c10d._set_pg_timeout(ctx.timeout, group)

    def train(self, mode: bool = True) -> None:
        """Set the mode of the model; evaluation runs `forward` in eval mode under torch.no_grad()."""
        self._engine.train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self._engine(*args, **kwargs)

    def backward(self, loss_sum: Tensor, scale: float) -> None:
        """Add the gradients of this rank's summed token losses; `scale` is parallel.loss.loss_scale of the whole step."""
        if self._micro == self.accumulation:
            raise RuntimeError(f"backward ran {self._micro} times already, which is the accumulation: call step")
        self._engine.backward(loss_sum * scale)
        self._micro += 1
        if self._micro < self.accumulation:
            # DeepSpeed counts micro steps in step(), which does nothing else before the last.
            self._engine.step()

    def step(self) -> StepResult:
        """Clip, update and zero the gradients; where a gradient is not finite nothing is updated, on any rank."""
        if self._micro != self.accumulation:
            raise RuntimeError(f"step needs {self.accumulation} backward calls, and had {self._micro}")
        self._micro = 0
        if self.stage == 0:
            return self._plain_step()
        self._engine.step()
        skipped = bool(self._zero.overflow)
        norm = float("inf") if skipped else float(self._zero._global_grad_norm)
        scaler = self._scaler()
        if scaler is not None and not skipped:
            stable = scaler.cur_iter - scaler.last_overflow_iter - 1
            if stable > 0 and stable % SCALE_WINDOW == 0:
                scaler.cur_scale *= scaler.scale_factor
        return StepResult(norm, skipped)

    def _plain_step(self) -> StepResult:
        # At stage 0 DeepSpeed reports no norm and steps over any gradient; after backward every rank holds the mean gradient.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        skipped = not torch.isfinite(torch.tensor(norm))
        config = self._engine._config
        clip = config.gradient_clipping
        if skipped:
            self._engine.zero_grad()
            config.gradient_clipping = 0.0  # it fails on gradients that are gone
        self._engine.step()
        config.gradient_clipping = clip
        return StepResult(float("inf") if skipped else norm, skipped)

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step, for every group."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, and the torch.nn.functional.linear that ZeRO-3 replaced for the process."""
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patch

        self._engine.destroy()
        torch.nn.functional.linear = getattr(Patch, "linear_bk", torch.nn.functional.linear)

    def parameters(self) -> dict[str, ParameterInfo]:
        """Every parameter once (tied ones under their first name), described whole."""
        infos = {}
        for name, parameter in self.model.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            dtype = str(parameter.dtype).removeprefix("torch.")
            infos[name] = ParameterInfo(shape, torch.Size(shape).numel(), dtype)
        return infos

    def owned_ranges(self) -> Iterator[Range]:
        """What this rank writes to a checkpoint; over all ranks every element of every parameter exactly once."""
        return self._ranges(owned=True)

    def held_ranges(self) -> Iterator[Range]:
        """What this rank must read from a checkpoint: the same, but at stage 0 every rank holds everything."""
        return self._ranges(owned=False)

    def create_moments(self) -> None:
        """Zero moments where there are none yet, without taking a step: they do not exist before the first."""
        for flat in self._flats().values():
            state = self._adam.state[flat]
            if not state:
                device = flat.device if self._adam.defaults["fused"] else "cpu"
                # first, as there may be no memory for them: half a state would count as one
                moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
                state |= {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}

    def adam_steps(self) -> dict[str, int]:
        """Steps that Adam has taken on every parameter; 0 before the first."""
        states = {name: self._adam.state.get(flat) for name, flat in self._flats().items()}
        return {name: int(state["step"]) if state else 0 for name, state in states.items()}

    def set_adam_steps(self, steps: dict[str, int]) -> None:
        """Inverse of adam_steps, after create_moments. Parameters updated as one flat tensor must agree."""
        seen: dict[int, int] = {}
        for name, flat in self._flats().items():
            if seen.setdefault(id(flat), steps[name]) != steps[name]:
                raise ValueError(f"parameter {name} is at Adam step {steps[name]}, others of its group at {seen[id(flat)]}")
            self._adam.state[flat]["step"].fill_(steps[name])

    def refresh_weights(self) -> None:
        """Rewrite the weights that the model computes with from the master weights. A collective of all ranks."""
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        if self.stage == 3:
            # As the stage-3 step does after its update; parameters kept whole between steps have to be gathered again.
            self._zero._partition_all_parameters()
            for index in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            whole = self._zero.persistent_parameters
            if whole:
                whole[0].all_gather(whole)

    def scaler_state(self) -> dict[str, float] | None:
        """The fp16 loss scaler, None in other precisions."""
        scaler = self._scaler()
        return None if scaler is None else {field: getattr(scaler, field) for field in SCALER_FIELDS}

    def set_scaler_state(self, state: dict[str, float] | None) -> None:
        """Inverse of scaler_state; does nothing where either side trains without a loss scale."""
        scaler = self._scaler()
        if scaler is not None and state is not None:
            for field in SCALER_FIELDS:
                setattr(scaler, field, state[field])

    def _scaler(self) -> Any:
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _flats(self) -> dict[str, Tensor]:
        """The fp32 tensor that Adam updates for every parameter: its own at stage 0, else a flat one with others in it."""
        named = list(self.model.named_parameters())
        if self.stage == 0:
            return dict(named)
        if self.stage == 3:
            position = self._zero.grad_position
            flats = self._zero.fp32_partitioned_groups_flat
            return {name: flats[position[self._zero.get_param_id(p)][0]] for name, p in named}
        groups = zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True)
        by_id = {id(p): flat for group, flat in groups for p in group}
        return {name: by_id[id(p)] for name, p in named}

    def _ranges(self, owned: bool) -> Iterator[Range]:
        infos, flats = self.parameters(), self._flats()
        for name, parameter in self.model.named_parameters():
            start, offset, numel = self._locate(parameter, infos[name].numel, owned)
            if numel == 0:
                continue
            flat = flats[name]
            # Not p._hp_mapping.get_hp_fragment(key): DeepSpeed links moments to parameters after the step of its first group only.
            tensors = {"master": flat.detach()} | {key: self._adam.state.get(flat, {}).get(key) for key in MOMENTS}
            views = {key: value.view(-1)[offset : offset + numel] for key, value in tensors.items() if value is not None}
            yield Range(name, start, numel, views)

    def _locate(self, parameter: Any, whole: int, owned: bool) -> tuple[int, int, int]:
        """(start in the parameter, offset in its flat tensor, elements) of what this rank has of a parameter."""
        if self.stage in (1, 2):
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, 0, 0
            address = mapping.lp_fragment_address
            return address.start, mapping.get_hp_fragment_address().start, address.numel
        if self.stage == 0 and not owned:
            return 0, 0, whole
        part = -(-whole // self.ctx.world)
        start = min(part * self.ctx.rank, whole)
        # The last shards of ZeRO-3 are padded; what lies beyond the parameter belongs to nobody.
        numel = min(part, whole - start)
        offset = start if self.stage == 0 else self._zero.grad_position[self._zero.get_param_id(parameter)][1]
        return start, offset, numel


def probe(ctx: ParallelContext, config: dict[str, Any]) -> None:
    """Train one tiny parameter for one step under `config` and check what the optimizer got. A collective, under a second.

    Every rank contributes another share of a gradient that is known in closed form. Raises LaunchError on all ranks where the
    gradient that reached Adam is not the token mean, the reported norm is not its norm, or ranks end with different weights.
    """
    precision = next((name for name in ("bf16", "fp16") if name in config), "fp32")
    size, beta, expected = 4 * ctx.world + 3, 0.5, 0.25

    def ones(model: nn.Module, gathered: Gathered) -> None:
        for parameter in model.parameters():
            with gathered(parameter), torch.no_grad():
                parameter.fill_(1.0)

    dtype = DTYPES[precision]
    stage = int(config["zero_optimization"]["stage"])
    model = build_model(lambda: nn.Linear(size, 1, bias=False), ctx, stage, dtype, ones)
    engine = Engine(model, [{"params": list(model.parameters())}], ctx, config=config, lr=0.125, betas=(beta, beta))
    shares = engine.accumulation * ctx.world * (ctx.world + 1) // 2
    scale = loss_scale(world=ctx.world, accumulation=engine.accumulation, tokens=int(shares / expected))
    for _ in range(engine.accumulation):
        out = engine.forward(torch.ones(1, size, dtype=dtype, device=ctx.device))
        engine.backward(out.float().sum() * (ctx.rank + 1), scale)
    norm = engine.step().grad_norm
    with torch.no_grad():
        weights = engine.forward(torch.eye(size, dtype=dtype, device=ctx.device)).float().flatten().tolist()
    gradients = [r.tensors["exp_avg"] / (1 - beta) for r in engine.owned_ranges()]
    clip = config["gradient_clipping"] or float("inf")
    true_norm = expected * size**0.5
    clipped = expected * min(1.0, clip / true_norm)
    engine.close()
    problem = _mismatch("gradient", [x for g in gradients for x in g.tolist()], clipped, precision) or _mismatch(
        "reported gradient norm", [norm], true_norm, precision
    )
    problems = [text for text in ctx.all_gather_text(problem) if text]
    if not problems and len(set(ctx.all_gather_text(repr(weights)))) > 1:
        problems = ["ranks hold different weights after one step"]
    if problems:
        raise LaunchError(
            f"the start-up probe of ZeRO stage {stage} with {ctx.world} ranks failed: {problems[0]}. Training would be wrong; "
            "another zero.stage may work, and the installed deepspeed may not be the one in constraints.txt"
        )


def _mismatch(what: str, found: Iterable[float], expected: float, precision: str) -> str:
    tolerance = 1e-5 if precision == "fp32" else 0.02
    wrong = [x for x in found if not abs(x - expected) <= tolerance * expected]
    return f"the {what} is {wrong[0] / expected:.4g} times what it should be" if wrong else ""

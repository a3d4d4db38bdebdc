"""Every field of a recipe does something.

A field is proven by training twice in this process, from recipes that differ in that field alone, and looking at what came of it.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.errors import CheckpointError, DataError, LaunchError, LongtrainError, TrainingError
from longtrain.kernels.local import LocalAttend
from longtrain.parallel import launch
from longtrain.plan import make_plan
from longtrain.plan.describe import describe
from longtrain.recipe.explain import FIELDS, dotted, is_section
from longtrain.recipe.schema import Recipe
from longtrain.train.assemble import Run, open_data
from longtrain.train.experiment import experiment_trackers
from longtrain.train.guards import check_skips
from longtrain.train.rollback import answer_skips
from longtrain.train.state import Progress
from longtrain.train.tracking import Trackers
from longtrain.train.watchdog import Watchdog
from tests.fake_wandb import FakeWandb
from tests.recipe_runs import Outcome, outcome, scaled, tiny

pytest_plugins = ("tests.recipe_desk",)
pytestmark = pytest.mark.usefixtures("recipe_desk")

Look = Callable[[Outcome], Any]


def weights(seen: Outcome) -> object:
    return seen.weights


def losses(seen: Outcome) -> object:
    return seen.losses


@dataclass(frozen=True)
class Trained:
    """Two values of a field (on top of `given`), and what differs in the outcome; `same`: what must not."""

    values: tuple[str, str]
    differs: Look = weights
    same: Look = lambda seen: None
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """Two values of a field, and what differs in what is decided before anything is built."""

    values: tuple[str, str]
    differs: Callable[[Recipe], Any]
    given: tuple[str, ...] = ()


def planned(look: Callable[[Any], Any], world: int = 1, device: str = "cpu") -> Callable[[Recipe], Any]:
    return lambda recipe: look(make_plan(recipe, world, device))


def device_of(recipe: Recipe) -> str:
    try:
        return launch.resolve_device(recipe.device.value, launch.Launch()).type
    except LaunchError as error:
        return str(error)


def ranks_or_refusal(recipe: Recipe) -> object:
    try:
        return make_plan(recipe, 4, "cpu").dp
    except LongtrainError as error:
        return str(error)


def missing_data(recipe: Recipe) -> str:
    with pytest.raises(DataError) as refusal:
        open_data(make_plan(recipe, 1, "cpu"))
    return str(refusal.value)


# the loss of the third step is above those of the first two
RISING = ("optimizer.lr=1.0", "schedule.warmup_steps=1", "schedule.kind=constant")

PROBES: dict[str, Trained | Planned] = {
    "name": Trained(("one", "two"), lambda seen: seen.folder, weights),
    "seed": Trained(("0", "1")),
    "device": Planned(("cpu", "cuda"), device_of),
    "output": Trained(("here", "there"), lambda seen: seen.folder, weights),
    "model.preset": Planned(("null", "llama-7b"), planned(lambda plan: plan.model.max_positions)),
    "model.init": Planned(("null", "weights"), planned(lambda plan: dict(describe(plan))["weights"]), ("model.preset=llama-7b",)),
    "model.family": Trained(("llama", "qwen2")),
    "model.vocab_size": Trained(("320", "330"), losses),
    "model.hidden_size": Trained(("16", "24"), losses),
    "model.layers": Trained(("2", "1"), losses),
    "model.heads": Trained(("4", "2"), losses, given=("model.kv_heads=2",)),
    "model.kv_heads": Trained(("null", "2"), losses),
    "model.head_dim": Trained(("null", "8"), losses),
    "model.intermediate_size": Trained(("24", "32"), losses),
    "model.hidden_act": Trained(("gelu", "gelu_pytorch_tanh"), losses),
    "model.max_positions": Planned(("null", "4096"), planned(lambda plan: plan.model.max_positions)),
    "model.rope_theta": Trained(("1e4", "1e2"), losses),
    "model.norm_eps": Trained(("1e-5", "1e-2"), losses),
    "model.tied_embeddings": Trained(("false", "true"), losses),
    "model.window": Trained(("null", "3"), losses),
    "model.init_std": Trained(("0.3", "0.1"), losses),
    "model.dropout": Trained(("0", "0.5"), losses),
    "model.attention_dropout": Trained(("0", "0.5"), losses),
    "model.positions.extend": Planned(
        ("interpolate", "random"),
        planned(lambda plan: dict(describe(plan))["positions"]),
        ("model.preset=opt-125m", "model.init=weights", "model.max_positions=8"),
    ),
    "model.rope_scaling.kind": Trained(("dynamic", "yarn"), losses, given=scaled("", factor=2, original_length=8)),
    "model.rope_scaling.factor": Trained(("2", "4"), losses, given=scaled("linear")),
    "model.rope_scaling.original_length": Trained(("8", "16"), losses, given=scaled("dynamic", factor=2)),
    "model.rope_scaling.low_freq_factor": Trained(("1", "2"), losses, given=scaled("llama3", factor=4, original_length=16)),
    "model.rope_scaling.high_freq_factor": Trained(("4", "8"), losses, given=scaled("llama3", factor=4, original_length=16)),
    "model.rope_scaling.beta_fast": Trained(("32", "2"), losses, given=scaled("yarn", factor=4, original_length=4096)),
    "model.rope_scaling.beta_slow": Trained(("1", "30"), losses, given=scaled("yarn", factor=4, original_length=4096)),
    "model.rope_scaling.attention_factor": Trained(("1", "2"), losses, given=scaled("yarn", factor=4, original_length=8)),
    "model.rope_scaling.mscale": Trained(("1", "2"), losses, given=scaled("yarn", factor=4, original_length=8, mscale_all_dim=1)),
    "model.rope_scaling.mscale_all_dim": Trained(("1", "2"), losses, given=scaled("yarn", factor=4, original_length=8, mscale=1)),
    "model.rope_scaling.short_factor": Trained(
        ("[1.0, 1.0]", "[3.0, 1.0]"), losses, given=scaled("longrope", factor=2, original_length=64, long_factor="[1.0, 1.0]")
    ),
    "model.rope_scaling.long_factor": Trained(
        ("[1.0, 1.0]", "[3.0, 1.0]"), losses, given=scaled("longrope", factor=2, original_length=16, short_factor="[1.0, 1.0]")
    ),
    "data.path": Trained(("data", "other"), losses),
    "data.sources": Trained(("{data: 1, more: 3}", "{data: 3, more: 1}"), losses, given=("data.path=null",)),
    "data.long_documents": Trained(("keep", "split"), losses),
    "data.corpus": Planned(("null", "stdlib"), missing_data, ("data.path=gone",)),
    "data.tokenizer": Planned(("null", "some.model"), missing_data, ("data.path=gone",)),
    "training.sequence_length": Trained(("32", "24"), lambda seen: (seen.tokens, seen.losses)),
    "training.steps": Trained(("4", "2"), lambda seen: seen.steps),
    "training.batch_size": Trained(("4", "2"), lambda seen: (seen.tokens, seen.losses)),
    "training.micro_batch_size": Planned(("2", "4"), planned(lambda plan: plan.accumulation)),
    "training.precision": Trained(("fp32", "bf16"), losses),
    "training.activations": Planned(("none", "full"), lambda recipe: held(recipe)),
    "training.max_skipped": Planned(("3", "20"), lambda recipe: refused(skips, recipe)),
    "training.fused": Planned(("none", "[norm]"), planned(lambda plan: plan.fused)),
    "attention.kernel": Planned(("memory_efficient", "reference"), planned(lambda plan: plan.kernel.kernel.name)),
    "parallel.dp": Planned(("auto", "2"), ranks_or_refusal),
    "parallel.cp": Planned(("1", "2"), planned(lambda plan: (plan.cp, plan.dp, plan.local_length), world=2)),
    "parallel.tokens_per_rank": Planned(("32", "64"), planned(lambda plan: plan.cp, world=2), ("parallel.cp=auto",)),
    "parallel.ulysses": Planned(("1", "2"), planned(lambda plan: str(plan.layout), world=2), ("parallel.cp=2",)),
    "parallel.layout": Planned(
        ("zigzag", "striped"),
        planned(lambda plan: [plan.layout.chunks(32, 2, rank) for rank in (0, 1)], world=2),
        ("parallel.cp=2",),
    ),
    "optimizer.lr": Trained(("1e-2", "2e-2"), lambda seen: (seen.rates, seen.weights)),
    "optimizer.betas": Trained(("[0.9, 0.95]", "[0.8, 0.95]")),
    "optimizer.eps": Trained(("1e-8", "1e-2")),
    "optimizer.weight_decay": Trained(("0.1", "0.0")),
    "optimizer.grad_clip": Trained(("null", "1e-8")),
    "schedule.kind": Trained(("cosine", "linear"), lambda seen: seen.rates),
    "schedule.warmup_steps": Trained(("0", "2"), lambda seen: seen.rates),
    "schedule.decay_steps": Trained(("1", "3"), lambda seen: seen.rates, given=("schedule.kind=wsd",)),
    "schedule.final_ratio": Trained(("0.1", "0.5"), lambda seen: seen.rates),
    "zero.stage": Planned(("1", "2"), planned(lambda plan: plan.deepspeed["zero_optimization"]["stage"])),
    "zero.offload": Planned(("none", "cpu"), planned(lambda plan: plan.deepspeed["zero_optimization"])),
    "zero.deepspeed": Planned(
        ("null", "{zero_optimization: {reduce_bucket_size: 1000}}"),
        planned(lambda plan: plan.deepspeed["zero_optimization"]["reduce_bucket_size"]),
    ),
    "checkpoint.every": Trained(("1", "3"), lambda seen: seen.checkpoints, weights, ("checkpoint.keep=9",)),
    "checkpoint.keep": Trained(("1", "3"), lambda seen: seen.checkpoints, weights),
    "checkpoint.on_failure": Planned(("go_on", "stop"), lambda recipe: refused(unsaved, recipe)),
    "guards.spike_deviations": Trained(("null", "1e-3"), given=("guards.spike_window=2", "guards.on_spike=skip", *RISING)),
    "guards.spike_window": Trained(("2", "4"), given=("guards.spike_deviations=1e-3", "guards.on_spike=skip", *RISING)),
    "guards.on_spike": Trained(("report", "skip"), given=("guards.spike_deviations=1e-3", "guards.spike_window=2", *RISING)),
    "guards.on_max_skipped": Planned(("stop", "roll_back"), lambda recipe: goes_back(recipe)),
    "guards.max_roll_backs": Planned(("1", "2"), lambda recipe: goes_back(recipe), ("guards.on_max_skipped=roll_back",)),
    "guards.watchdog_seconds": Planned(("null", "60"), lambda recipe: watched(recipe)),
    "evaluation.every": Trained(("null", "1"), lambda seen: seen.held_out, weights),
    "evaluation.sequences": Trained(("1", "4"), lambda seen: seen.held_out, weights),
    "tracking.every": Trained(("1", "3"), lambda seen: len(seen.losses), weights, ("evaluation.every=null",)),
    "tracking.tensorboard": Planned(("false", "true"), lambda recipe: told(recipe)),
    "tracking.wandb": Planned(("disabled", "offline"), lambda recipe: told(recipe)),
    "tracking.project": Planned(("longtrain", "another"), lambda recipe: told(recipe), ("tracking.wandb=offline",)),
    "tracking.entity": Planned(("null", "somebody"), lambda recipe: told(recipe), ("tracking.wandb=offline",)),
    "tracking.group": Planned(("null", "some"), lambda recipe: told(recipe), ("tracking.wandb=offline",)),
    "tracking.tags": Planned(("[]", "[short, long]"), lambda recipe: told(recipe), ("tracking.wandb=offline",)),
}


def refused(act: Callable[[Recipe], None], recipe: Recipe) -> bool:
    try:
        act(recipe)
    except LongtrainError:
        return True
    return False


def skips(recipe: Recipe) -> None:
    """Goes on after three steps in a row without an update, or refuses to."""
    check_skips(Progress(step=9, skipped=3, skipped_in_row=3), recipe.training.max_skipped, Path("nowhere"))


def goes_back(recipe: Recipe) -> bool:
    """Whether a run that was rolled back once tries to go back again when too many steps are skipped; else it ends."""
    tried: list[str] = []
    run = types.SimpleNamespace(
        plan=types.SimpleNamespace(recipe=recipe),
        progress=Progress(step=99, skipped=20, skipped_in_row=20, roll_backs=1),
        folder=Path("nowhere"),
        ctx=types.SimpleNamespace(is_main=True, world=1, all_gather_text=lambda text: [text]),
        settle=lambda: None,
    )
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        answer_skips(run, lambda step, phase: tried.append(phase))  # type: ignore[arg-type]
    return "roll-back" in tried


def watched(recipe: Recipe) -> bool:
    """Whether threads of a watchdog run beside the training."""
    ctx: Any = types.SimpleNamespace(rank=0, world=1)
    with Watchdog(ctx, Path("nowhere"), recipe.guards.watchdog_seconds):
        return any(thread.name == "watchdog" for thread in threading.enumerate())


def unsaved(recipe: Recipe) -> None:
    """What a run does about a checkpoint that was not its last and could not be written."""
    run = types.SimpleNamespace(plan=make_plan(recipe, 1, "cpu"), trackers=Trackers())
    Run._save_failed(run, CheckpointError("no space left"), last=False)  # type: ignore[arg-type]


def told(recipe: Recipe) -> object:
    """What wandb (a fake one) is told, and how many trackers there are."""
    fake = sys.modules["wandb"]
    assert isinstance(fake, FakeWandb)
    fake.runs.clear()
    folder = Path(recipe.run_folder)
    trackers = experiment_trackers(
        recipe.tracking, name=recipe.name, run_id="id", folder=folder, done=0, config={}, say=lambda text: None
    )
    for tracker in trackers:
        tracker.close()
    return len(trackers), [(run.mode, {**run.arguments, "dir": None}) for run in fake.runs]


def held(recipe: Recipe) -> int:
    """Bytes that autograd holds after a forward of the model that the run builds."""
    from longtrain.attention import AttentionMask, Band
    from longtrain.models import Decoder, initialise

    plan = make_plan(recipe, 1, "cpu")
    model = Decoder(plan.model, LocalAttend(plan.kernel.kernel), recipe.training.activations.value)
    initialise(model, 0)
    bytes_held = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal bytes_held
        bytes_held += tensor.nbytes
        return tensor

    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, torch.arange(32)[None], AttentionMask(Band.causal()), tokens)
    return bytes_held


FIELD_NAMES = [dotted(path) for path in FIELDS if not is_section(path)]


def test_every_field_has_a_probe() -> None:
    assert list(PROBES) == FIELD_NAMES, "a new field needs a probe that shows what it does"


@pytest.mark.parametrize("field", FIELD_NAMES)
def test_field_changes_something(field: str) -> None:
    probe = PROBES[field]
    before, after = ((*probe.given, f"{field}={value}") for value in probe.values)
    if isinstance(probe, Planned):
        assert probe.differs(tiny(*before)) != probe.differs(tiny(*after))
        return
    assert probe.differs(outcome(before)) != probe.differs(outcome(after))
    assert probe.same(outcome(before)) == probe.same(outcome(after))
    assert f"{field.split('.')[-1]}:" in outcome(after).recipe, "the run folder says what was trained"

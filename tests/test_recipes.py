"""Every field of a recipe does something, every member of its enums is run, and the built-in recipes can be planned.

A field is proven by training twice in this process, from recipes that differ in that field alone, and looking at what came of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.data.loader import held_out
from longtrain.errors import CheckpointError, DataError, KernelError, LaunchError, LongtrainError, RecipeError, TrainingError
from longtrain.evaluate.held_out import held_out_loss
from longtrain.kernels.local import LocalAttend
from longtrain.parallel import launch
from longtrain.plan import make_plan
from longtrain.plan.describe import describe
from longtrain.recipe.explain import FIELDS, dotted, is_section
from longtrain.recipe.load import builtin_recipes, dump_recipe, load_recipe, parse_recipe, recipe_hash
from longtrain.recipe.schema import Recipe
from longtrain.train.assemble import Run, open_data
from longtrain.train.checkpoint_folder import read_master
from longtrain.train.experiment import experiment_trackers
from longtrain.train.guards import check_skips
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.rollback import answer_skips
from longtrain.train.run import run_training
from longtrain.train.state import Progress
from longtrain.train.tracking import METRICS_FILE, Trackers, read_metrics
from longtrain.train.watchdog import Watchdog
from tests.fake_wandb import FakeWandb
from tests.user import RECIPE, sit_at_desk

# 4 steps, so that schedules can bend
BASE = ("training.steps=4", "model.heads=4", "model.kv_heads=4", "schedule.kind=cosine")


@dataclass(frozen=True)
class Outcome:
    """What can be seen of a training run, apart from how long it took."""

    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    rates: tuple[float, ...]
    gradients: tuple[float, ...]
    weights: str
    checkpoints: tuple[str, ...]
    folder: str
    recipe: str


def outcome(overrides: tuple[str, ...]) -> Outcome:
    """Of a run on one rank, as `longtrain train` does it; the current folder is a desk."""
    return train(dump_recipe(tiny(*overrides)))


@functools.cache
def train(text: str) -> Outcome:
    recipe = parse_recipe(text, "tiny")
    plan = make_plan(recipe, 1, "cpu")
    split, unseen = open_data(plan)
    start = choose(recipe, split, "auto")
    try:
        ctx = launch.start(launch.Launch(), device="cpu")
        batches = held_out(unseen, recipe.evaluation.sequences, micro_batch_size=1, dp=1, dp_rank=0) if unseen else []
        progress = run_training(
            plan, ctx, split, start, until=None, evaluate=lambda run: held_out_loss(run.engine, run.plan, run.ctx, batches)
        )
    finally:
        launch.stop()
    folder = Path(recipe.run_folder)
    rows = read_metrics(folder / METRICS_FILE)
    digest = hashlib.sha256()
    for name, value in read_master(folder / CHECKPOINTS):
        digest.update(name.encode() + value.numpy().tobytes())
    return Outcome(
        steps=progress.step,
        tokens=progress.tokens,
        losses=tuple((row["step"], row["loss"]) for row in rows),
        held_out=tuple((row["step"], row["eval_loss"]) for row in rows if row["eval_loss"] is not None),
        rates=tuple(row["lr"] for row in rows),
        gradients=tuple(row["grad_norm"] for row in rows),
        weights=digest.hexdigest(),
        checkpoints=tuple(sorted(path.name for path in (folder / CHECKPOINTS).iterdir())),
        folder=str(folder),
        recipe=(folder / "recipe.yaml").read_text(),
    )


def tiny(*overrides: str) -> Recipe:
    """The desk's recipe, with a run folder of its own unless `output` or `name` is set."""
    given = {override.split("=")[0] for override in overrides}
    base = [override for override in BASE if override.split("=")[0] not in given]
    recipe = parse_recipe(RECIPE.replace("output: run\n", ""), "tiny", [*overrides, *base])
    if given & {"output", "name"}:
        return recipe
    return recipe.model_copy(update={"output": f"runs/{recipe_hash(recipe)}"})


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


def scaled(kind: str, **values: object) -> tuple[str, ...]:
    """Overrides of model.rope_scaling."""
    given = {"kind": kind or None, **values}
    return tuple(f"model.rope_scaling.{name}={value}" for name, value in given.items() if value is not None)


# the loss of the third step is above those of the first two
RISING = ("optimizer.lr=1.0", "schedule.warmup_steps=1", "schedule.kind=constant")

PROBES: dict[str, Trained | Planned] = {
    "name": Trained(("one", "two"), lambda seen: seen.folder, weights),
    "seed": Trained(("0", "1")),
    "device": Planned(("cpu", "cuda"), device_of),
    "output": Trained(("here", "there"), lambda seen: seen.folder, weights),
    "model.preset": Planned(("null", "llama-7b"), planned(lambda plan: plan.model.max_positions)),
    "model.init": Planned(("null", "weights"), planned(lambda plan: dict(describe(plan))["weights"])),
    "model.family": Trained(("llama", "qwen2")),
    "model.vocab_size": Trained(("320", "330"), losses),
    "model.hidden_size": Trained(("16", "24"), losses),
    "model.layers": Trained(("2", "1"), losses),
    "model.heads": Trained(("4", "2"), losses, given=("model.kv_heads=2",)),
    "model.kv_heads": Trained(("null", "2"), losses),
    "model.head_dim": Trained(("null", "8"), losses),
    "model.intermediate_size": Trained(("24", "32"), losses),
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
        ("model.family=opt", "model.init=weights", "model.max_positions=8"),
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
    tried: list[bool] = []
    run = types.SimpleNamespace(
        plan=types.SimpleNamespace(recipe=recipe),
        progress=Progress(step=99, skipped=20, skipped_in_row=20, roll_backs=1),
        folder=Path("nowhere"),
        ctx=types.SimpleNamespace(is_main=True, world=1, all_gather_text=lambda text: [text]),
        settle=lambda: tried.append(True),
    )
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        answer_skips(run)  # type: ignore[arg-type]
    return bool(tried)


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


@pytest.fixture(scope="module", autouse=True)
def _desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("desk")
        sit_at_desk(root, patch)
        patch.setitem(sys.modules, "wandb", FakeWandb())
        write_data(root / "other", vocab_size=300)
        write_data(root / "more", tokenizer="data/tokenizer.model")
        yield


def write_data(out: Path, **options: Any) -> None:
    from longtrain.data.prepare import prepare

    text = out.with_name("text")
    text.mkdir(exist_ok=True)
    for number in range(20):
        (text / f"{number}.txt").write_text(f"Another text, number {number}, about nothing at all.\n" * 9)
    prepare(str(text), out, held_out=0.2, **options)


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


def choices(annotation: Any) -> list[str]:
    """The values of a field that can be counted: members of an enum, of a Literal, truth values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return [choice for argument in arguments for choice in choices(argument)]
    if origin is typing.Literal:
        return [str(argument) for argument in arguments]
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return [member.value for member in annotation]
    return {bool: ["false", "true"], types.NoneType: ["null"]}.get(annotation, [])


MEMBERS = [
    (name, choice) for path, name in zip(FIELDS, map(dotted, FIELDS), strict=True) for choice in choices(FIELDS[path].annotation)
]
MEMBERS += [("zero.stage", str(stage)) for stage in range(4)]

# what else a member needs to be accepted
WITH = {
    ("schedule.kind", "wsd"): ("schedule.decay_steps=2",),
    ("data.path", "null"): ("data.sources={data: 1, more: 3}",),
    # long enough for some documents to be left
    ("data.long_documents", "drop"): ("training.sequence_length=128", "training.batch_size=2"),
    ("model.positions.extend", "interpolate"): ("model.family=opt",),
    ("model.positions.extend", "random"): ("model.family=opt",),
    ("model.rope_scaling.kind", "linear"): scaled("", factor=2),
    ("model.rope_scaling.kind", "dynamic"): scaled("", factor=2, original_length=16),
    ("model.rope_scaling.kind", "yarn"): scaled("", factor=2, original_length=16),
    ("model.rope_scaling.kind", "llama3"): scaled("", factor=2, original_length=16),
    ("model.rope_scaling.kind", "longrope"): scaled(
        "", factor=2, original_length=16, short_factor="[1.0, 1.0]", long_factor="[1.0, 2.0]"
    ),
}
# null where something else, a preset or imported weights, has to say it
NOT_ALONE = {f"model.{name}" for name in ("family", "vocab_size", "hidden_size", "layers", "heads", "intermediate_size")}
# what a CPU cannot train, and can plan for a GPU
ON_GPU = {
    ("device", "cuda"): (),
    ("training.precision", "fp16"): ("device=cuda",),
    ("attention.kernel", "triton"): ("device=cuda",),
    ("attention.kernel", "flash"): ("device=cuda", "training.precision=bf16", "model.head_dim=8"),
}


@pytest.mark.parametrize(("field", "value"), MEMBERS, ids=[f"{name}={value}" for name, value in MEMBERS])
def test_every_member_runs(field: str, value: str) -> None:
    given = WITH.get((field, value), ())
    if (field, value) == ("attention.kernel", "cudnn"):
        with pytest.raises(KernelError, match="cudnn cannot do this: takes no packed documents"):
            make_plan(tiny("device=cuda", "training.precision=bf16", "model.head_dim=8", f"{field}={value}"), 1, "cuda")
        return
    if value == "null" and field in NOT_ALONE:
        with pytest.raises(RecipeError, match="required key is missing"):
            tiny(f"{field}=null")
        return
    if (field, value) == ("checkpoint.every", "null"):
        with pytest.raises(CheckpointError, match="no such folder"):  # it trained, and left nothing to read
            outcome((f"{field}={value}",))
        return
    if (field, value) in ON_GPU:
        plan = make_plan(tiny(*ON_GPU[field, value], f"{field}={value}"), 1, "cuda")
        assert plan.device == "cuda"
        return
    seen = outcome((*given, f"{field}={value}"))
    assert seen.steps == 4
    assert all(abs(loss) < 20 for _, loss in seen.losses)


@pytest.mark.parametrize("layout", [choice for name, choice in MEMBERS if name == "parallel.layout"])
def test_layouts_in_a_ring_are_planned(layout: str) -> None:
    plan = make_plan(tiny("parallel.cp=4", f"parallel.layout={layout}"), 4, "cpu")
    held_positions = sorted(
        p
        for rank in range(4)
        for c in plan.layout.chunks(32, 4, rank)
        for p in range(c.start, c.start + c.length * c.stride, c.stride)
    )
    assert held_positions == list(range(32))


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name, "the run folder is called like the recipe"
    assert builtin_recipes()[name].read_text().startswith("# "), "`longtrain recipes` shows the first line"
    assert parse_recipe(dump_recipe(recipe), name) == recipe
    devices = ("cpu", "cuda") if recipe.device == "auto" else (recipe.device.value,)
    for device in devices:
        plan = make_plan(recipe, recipe.smallest_world, device)
        assert plan.parameters > 0
        assert json.dumps(plan.deepspeed)

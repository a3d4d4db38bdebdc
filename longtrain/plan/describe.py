"""A plan in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from longtrain.data.opening import compare_tokenizers, prepare_command, tokenizer_commands
from longtrain.errors import DataError
from longtrain.models.activations import Activations, held_bytes
from longtrain.models.families import family_of
from longtrain.models.flops import training_flops
from longtrain.plan.host import available_memory, describe_checkpoint
from longtrain.plan.model import replaced, unseen_positions
from longtrain.plan.plan import Plan
from longtrain.plan.ranks import crowded
from longtrain.recipe.guards import GuardsSection, SkipAction, SpikeAction
from longtrain.recipe.presets import fetch_commands
from longtrain.recipe.schema import Precision, ScheduleKind, TrainingSection
from longtrain.recipe.zero import Offload

SLOW = 2e14
"""FLOP/s that even a slow GPU of these days comes near to."""
SILENT = 10
"""Seconds that any step may take."""


def describe(plan: Plan, host_memory: int | None = None) -> list[tuple[str, str]]:
    """(what, value) lines of a plan: ranks, shapes, tokens, parameters, memory, checkpoints, kernels with their reasons.

    host_memory: bytes that are available on each machine before training; None: as many as on this one.
    """
    recipe, model, training = plan.recipe, plan.model, plan.recipe.training
    ring = f"cp {plan.cp} ({_sharing(plan)})"
    length = training.sequence_length
    padding = plan.padded_length - length
    attention = "causal" if model.window is None else f"causal, window {model.window}"
    gate = "" if model.hidden_act == "silu" else f", hidden_act {model.hidden_act}"
    mode = Activations(training.activations.value)
    held = held_bytes(model, mode, training.micro_batch_size * plan.local_length, plan.dtype.itemsize, plan.fused)
    causal, full = (training.batch_size * flops for flops in training_flops(model, [(0, length)], length))
    lines = [
        ("recipe", recipe.name),
        ("run folder", recipe.run_folder),
        *(("data", line) for line in _data(plan)),
        ("ranks", f"{plan.world} on {plan.device}{_hosts(plan)}: dp {plan.dp} x {ring}"),
        (
            "model",
            f"{model.family}, {plan.parameters:,} parameters: {model.layers} layers, hidden {model.hidden_size}, "
            f"{model.heads} heads / {model.kv_heads} key-value heads of {model.head_dim}, vocabulary {model.vocab_size}{gate}",
        ),
        ("positions", _positions(plan)),
        ("weights", _weights(plan)),
        (
            "sequence",
            f"{length:,} tokens" + (f" (+{padding} padding)" if padding else "") + f", {plan.local_length:,} on each rank",
        ),
        (
            "step",
            f"{training.batch_size} sequences = {plan.tokens_per_step:,} tokens: "
            f"{plan.dp} dp x {training.micro_batch_size} a forward x {plan.accumulation} accumulated",
        ),
        ("steps", f"{training.steps:,} = {training.steps * plan.tokens_per_step:,} tokens"),
        ("model FLOPs", f"{causal:.3g} a step (the whole square: {full:.3g}), where each sequence is one document"),
        ("learning rate", _learning_rate(plan)),
        ("precision", f"{training.precision}, ZeRO stage {recipe.zero.stage}, optimizer offload {recipe.zero.offload}"),
        ("model state", f"about {state_bytes(plan) / 2**30:.3g} GiB on each rank (weights, gradients, master weights, moments)"),
        ("activations", f"{mode}: blocks hold about {held * model.layers / 2**30:.3g} GiB on each rank"),
        *_dropout(plan),
        *_guards(recipe.guards, training),
        ("checkpoint", describe_checkpoint(plan, available_memory() if host_memory is None else host_memory)),
        ("layers", f"fused: {', '.join(plan.fused)}" if plan.fused else "plain torch"),
        ("attention", attention),
        ("kernel", plan.kernel.kernel.name + (" (plain torch: right, but slow on GPUs)" if _slow(plan) else "")),
    ]
    lines += [(f"  not {name}", reason) for name, reason in plan.kernel.others.items()]
    lines += [("warning", warning) for warning in _warnings(plan)]
    return lines


def _data(plan: Plan) -> Iterator[str]:
    """A line for each folder."""
    data, total = plan.recipe.data, sum(plan.recipe.data.folders.values())
    for folder, weight in data.folders.items():
        share = "" if data.sources is None else f", {weight / total:.3g} of the tokens"
        commands = [command for command in tokenizer_commands(plan.recipe) if not command.startswith("#")]
        commands.append(prepare_command(plan.recipe, folder, plan.model.vocab_size))
        yield folder + share + ("" if Path(folder).exists() else f" (not there yet; before training: {' && '.join(commands)})")


def _hosts(plan: Plan) -> str:
    return "" if plan.host == plan.world else f", {plan.host} on each of {plan.world // plan.host} machines"


def _dropout(plan: Plan) -> Iterator[tuple[str, str]]:
    model = plan.model
    if model.dropout or model.attention_dropout:
        yield "dropout", f"{model.dropout:g} of activations, {model.attention_dropout:g} of attention weights"


def _guards(guards: GuardsSection, training: TrainingSection) -> Iterator[tuple[str, str]]:
    """What is not as it is where a recipe says nothing of guards."""
    usual = GuardsSection()
    if guards.spike_deviations is None:
        yield "loss spikes", "not looked for"
    elif any(getattr(guards, name) != getattr(usual, name) for name in ("spike_deviations", "spike_window", "on_spike")):
        answer = "skipped" if guards.on_spike is SpikeAction.SKIP else "reported"
        yield (
            "loss spikes",
            f"{answer}, from {guards.spike_deviations:g} deviations above the mean of the last {guards.spike_window:,} steps",
        )
    skipped = f"after {training.max_skipped:,} steps in a row without an update"
    if guards.on_max_skipped is SkipAction.ROLL_BACK:
        yield "bad steps", f"{skipped} back to the last good checkpoint, {guards.max_roll_backs:,} times at most"
    elif training.max_skipped != TrainingSection.model_fields["max_skipped"].default:
        yield "bad steps", f"{skipped} the run stops"
    if guards.watchdog_seconds is None:
        yield "watchdog", "none: ranks that are stuck wait for ever"
    elif guards.watchdog_seconds != usual.watchdog_seconds:
        yield "watchdog", f"ends the job after {guards.watchdog_seconds:g} seconds without a sign of life"


def _sharing(plan: Plan) -> str:
    parallel = plan.recipe.parallel
    if plan.cp == 1:
        return "no ring"
    ring, heads = f"{parallel.layout} ring", f"Ulysses over {parallel.ulysses}"
    if parallel.ulysses == 1:
        return ring
    return heads if parallel.ulysses == plan.cp else f"{heads} in a {ring} of {plan.cp // parallel.ulysses}"


def _positions(plan: Plan) -> str:
    model, extend = plan.model, plan.recipe.model.positions.extend
    if family_of(model).positions == "learned":
        known = plan.recipe.model.max_positions
        longer = plan.recipe.model.init is not None and known is not None and known < model.max_positions
        more = f", {extend} beyond {known:,}" if longer else ""
        return f"{model.max_positions:,} learned{more}"
    scaling = plan.recipe.model.rope_scaling
    numbers = {name: value for name, value in scaling.model_dump(exclude={"kind"}).items() if isinstance(value, int | float)}
    scaled = "" if scaling.kind == "none" else f", {scaling.kind} ({', '.join(f'{k} {v:g}' for k, v in numbers.items())})"
    return f"rotary, theta {model.rope_theta:g}{scaled}"


def _weights(plan: Plan) -> str:
    init = plan.recipe.model.init
    if init is None:
        return f"random, seed {plan.recipe.seed}"
    if any(Path(init).glob("*.safetensors")):
        return f"from {init}"
    commands = fetch_commands(plan.recipe.model.preset, init)
    get = " && ".join(commands) if commands else "put a Hugging Face folder with its weights there"
    return f"from {init} (not there yet; before training: {get})"


def _slow(plan: Plan) -> bool:
    return plan.device == "cuda" and plan.kernel.kernel.name in ("memory_efficient", "reference")


def doubts(plan: Plan) -> Iterator[str]:
    """What to know before beginning with the weights of model.init. Raises DataError where the data is of no use to them."""
    yield from replaced(plan.recipe)
    for look in (unseen_positions, compare_tokenizers):
        if (remark := look(plan.recipe)) is not None:
            yield remark


def _warnings(plan: Plan) -> Iterator[str]:
    """What would be done without a word."""
    recipe, dtype = plan.recipe, plan.recipe.training.precision
    try:
        yield from doubts(plan)
    except DataError as error:
        yield f"a new run is refused: {error}"
    if plan.kernel.rounds:
        yield (
            f"kernel {plan.kernel.kernel.name} rounds partial results to {dtype} between the blocks of a ring, where others keep "
            "fp32: in tests up to 2.5 times the error of plain attention in that precision, plus 2e-3"
        )
    if crowded(recipe, plan.cp):
        tokens = recipe.training.micro_batch_size * plan.local_length
        wanted = recipe.parallel.tokens_per_rank
        alone = recipe.training.activations == Activations.MINIMAL
        less = "training.activations minimal allows no ring" if alone else "with more ranks each holds less"
        yield f"each rank holds {tokens:,} tokens, more than parallel.tokens_per_rank {wanted:,}: {less}"
    passes = training_flops(plan.model, [(0, recipe.training.sequence_length)], recipe.training.sequence_length).causal
    silent = max(SILENT, math.ceil(passes * recipe.training.micro_batch_size / plan.cp / SLOW))
    patience = recipe.guards.watchdog_seconds
    if patience is not None and patience < silent:
        yield (
            f"guards.watchdog_seconds {patience:g} may end a run that is not stuck: one micro batch may take {silent:,} seconds; "
            "set more"
        )
    if recipe.checkpoint.every is None:
        yield "checkpoint.every is null: no checkpoint is written, and nothing of this run can be resumed or exported"
    if recipe.zero.stage == 1 and dtype is not Precision.FP32 and plan.accumulation > 1:
        # measured in bf16, 64 micro batches: relative gradient error 0.0099, at stage 2 0.0062
        yield (
            f"zero.stage 1 sums the gradients of {plan.accumulation} micro batches in {dtype}, which costs accuracy; "
            "stages 2 and 3 sum them in fp32: set zero.stage to 2"
        )


def _learning_rate(plan: Plan) -> str:
    schedule, peak = plan.recipe.schedule, plan.recipe.optimizer.lr
    parts = [f"{schedule.kind}, peak {peak:g}"]
    if schedule.warmup_steps:
        parts.append(f"after {schedule.warmup_steps:,} steps of warmup")
    if schedule.kind is not ScheduleKind.CONSTANT:
        over = "" if schedule.decay_steps is None else f" over the last {schedule.decay_steps:,} steps"
        parts.append(f"down to {peak * schedule.final_ratio:g}{over}")
    return ", ".join(parts)


def state_bytes(plan: Plan) -> float:
    """Bytes of model state on one rank: low-precision weights and gradients, fp32 master weights and two moments, as ZeRO shares
    them. What offload moves to the host (optimizer state, and from stage 2 on the gradients) is not counted; neither are message
    buffers and the copies of an optimizer step."""
    low, stage, world = plan.dtype.itemsize, plan.recipe.zero.stage, plan.world
    offloaded = plan.recipe.zero.offload is Offload.CPU
    master = 0 if stage == 0 else 4  # stage 0 trains in fp32 only: the weights are the master
    # sums over micro batches are kept in fp32 where the configuration says so
    gradient = 4 if "data_types" in plan.deepspeed else low
    optimizer = 0.0 if offloaded else (master + 8) / (world if stage >= 1 else 1)
    gradients = 0.0 if offloaded and stage >= 2 else gradient / (world if stage >= 2 else 1)
    weights = low / (world if stage >= 3 else 1)
    return plan.parameters * (weights + gradients + optimizer)

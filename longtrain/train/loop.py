"""The training loop: what happens after which step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from longtrain.plan import Plan
from longtrain.plan.speed import peak_flops
from longtrain.recipe.guards import SkipAction, SpikeAction
from longtrain.recipe.schema import Recipe
from longtrain.train.assemble import Run
from longtrain.train.metrics import Evaluation, Metrics, peak_memory_gib, utilisation
from longtrain.train.optim import learning_rate
from longtrain.train.rollback import answer_skips
from longtrain.train.state import Progress
from longtrain.train.step import Prepared, StepOutcome, prepare_step, train_step
from longtrain.train.watchdog import Beat

Evaluate = Callable[[Run], Evaluation]
"""The held-out losses of a run as it stands; called by all ranks."""


def train(run: Run, *, until: int, evaluate: Evaluate | None = None, beat: Beat = lambda step, phase: None) -> Progress:
    """Trains until `until` optimizer steps are done, or some rank is asked to stop; saves as the recipe says and at the end.

    All ranks call it. Raises TrainingError where too many steps in a row had to be skipped, CheckpointError where saving failed and
    the recipe says stop, or it was the last time. What is reported does not depend on where a run was stopped and
    resumed. evaluate: injected by the command line, called where the recipe wants an evaluation. beat: the watchdog's.
    """
    recipe, plan, ctx = run.plan.recipe, run.plan, run.ctx
    peak = peak_flops(torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "cpu", plan.dtype)
    _begin_a_batch(run)
    while run.progress.step < until:
        before, step = run.progress, run.progress.step
        lr = _learning_rate(run, step)
        begin = time.perf_counter()
        beat(step + 1, "data")
        batches = run.loader.step(run.progress.sequences // recipe.training.batch_size)
        beat(step + 1, "agreement on the step")
        prepared = prepare_step(plan, ctx, batches, [run.asked_to_stop(), run.saver.finished])
        stop, finished = prepared.signs
        if finished:
            beat(step + 1, "save")
            run.settle()
        if stop:
            break
        outcome = _step(run, prepared, lr, beat)
        seconds = time.perf_counter() - begin
        done = step + 1
        final = done == recipe.training.steps
        evaluation = None
        if evaluate is not None and _due(done, recipe.evaluation.every, final):
            beat(done, "evaluation")
            evaluation = evaluate(run)
        if done % recipe.tracking.every == 0 or evaluation is not None or final:
            run.trackers.log(_metrics(run, outcome, evaluation, lr, seconds, peak))
            run.stood_still = 0.0
        if not answer_skips(run, beat) and save_due(run.plan.recipe, before, run.progress):
            beat(done, "save")
            run.save()
    beat(run.progress.step, "save")
    run.finish_saving()
    return run.progress


def _begin_a_batch(run: Run) -> None:
    """Moves the data cursor on to where a batch begins: it may stand inside one where the run was forced to another batch_size."""
    batch, at = run.plan.recipe.training.batch_size, run.progress.sequences
    if missing := -at % batch:
        run.progress = replace(run.progress, sequences=at + missing)
        run.trackers.say(
            f"WARNING: training.batch_size {batch} does not divide the {at:,} sequences read before: sequences {at:,} to "
            f"{at + missing - 1:,} of the data are left out, so that none is read twice"
        )


def _step(run: Run, prepared: Prepared, lr: float, beat: Beat) -> StepOutcome:
    """One step, judged by the guards and counted in `run.progress`."""
    recipe, before = run.plan.recipe, run.progress
    training, guards, step = recipe.training, recipe.guards, before.step + 1
    limit = before.losses.limit(guards.spike_deviations, guards.spike_window)
    highest = limit if guards.on_spike is SpikeAction.SKIP else math.inf
    begin: Callable[[str], None] = lambda phase: beat(step, phase)  # noqa: E731
    outcome = train_step(run.engine, run.plan, run.ctx, prepared, lr, highest=highest, begin=begin)
    spike = limit < outcome.loss < math.inf
    run.progress = before.after_step(
        training.batch_size,
        training.sequence_length,
        skipped=outcome.skipped,
        spike=spike,
        losses=before.losses.after(outcome.loss, guards.spike_window, limit),
        loss=outcome.loss,
    )
    reasons = []
    if spike:
        reasons.append(
            f"WARNING: loss {outcome.loss:.4f} is a spike: more than {guards.spike_deviations:g} deviations above "
            f"{before.losses.mean:.4f}, the mean of recent steps (the limit is {limit:.4f})"
        )
    if outcome.skipped and not (spike and highest == limit):
        reasons.append(_skip_reason(run.plan))
    if reasons:
        effect = "nothing was updated, on any rank" if outcome.skipped else "the update was made all the same (guards.on_spike)"
        run.trackers.say(f"step {step}: {'; '.join([*reasons, effect])}")
    return outcome


def save_due(recipe: Recipe, before: Progress, now: Progress) -> bool:
    """Whether a checkpoint is due after the step from `before` to `now`.

    Where a run may roll back, it waits for a step that updated something: saved in a bad stretch, checkpoints that may be spoilt
    would push out the one to go back to.
    """
    every = recipe.checkpoint.every
    if every is None or (recipe.guards.on_max_skipped is SkipAction.ROLL_BACK and now.skipped_in_row):
        return False
    waited = before.skipped_in_row if recipe.guards.on_max_skipped is SkipAction.ROLL_BACK else 0
    return now.step // every > (before.step - waited) // every


def _due(done: int, every: int | None, final: bool) -> bool:
    """Whether to evaluate: also after the first step, to have a beginning to compare with and to fail early."""
    return every is not None and (done % every == 0 or done == 1 or final)


def _skip_reason(plan: Plan) -> str:
    if plan.dtype == torch.float16:
        return "the loss scale was too large and is lower now"
    return "a loss or gradient was not finite"


def _learning_rate(run: Run, step: int) -> float:
    schedule, training = run.plan.recipe.schedule, run.plan.recipe.training
    return learning_rate(
        step,
        kind=schedule.kind.value,
        lr=run.plan.recipe.optimizer.lr,
        steps=training.steps,
        warmup_steps=schedule.warmup_steps,
        decay_steps=schedule.decay_steps,
        final_ratio=schedule.final_ratio,
    )


def _metrics(
    run: Run, outcome: StepOutcome, evaluation: Evaluation | None, lr: float, seconds: float, peak: float | None
) -> Metrics:
    mfu_causal, mfu_full = utilisation(outcome.flops, seconds, run.ctx.world, peak)
    rate = run.plan.tokens_per_step / seconds
    return Metrics(
        step=run.progress.step,
        loss=outcome.loss,
        eval_loss=None if evaluation is None else evaluation.loss,
        lr=lr,
        grad_norm=outcome.grad_norm,
        tokens=run.progress.tokens,
        tokens_per_second=rate,
        tokens_per_second_per_rank=rate / run.ctx.world,
        step_seconds=seconds,
        mfu_causal=mfu_causal,
        mfu_full=mfu_full,
        memory_gib=peak_memory_gib(run.ctx.device),
        eval_by_position=None if evaluation is None else evaluation.by_position,
        skipped_steps=run.progress.skipped,
        save_seconds=run.stood_still or None,
        loss_spikes=run.progress.spikes,
        roll_backs=run.progress.roll_backs,
    )

"""The training loop: what happens after which step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from longtrain.plan import Plan
from longtrain.plan.speed import peak_flops
from longtrain.train.assemble import Run
from longtrain.train.guards import check_skips
from longtrain.train.metrics import Evaluation, Metrics, peak_memory_gib, utilisation
from longtrain.train.optim import learning_rate
from longtrain.train.resume import CHECKPOINTS
from longtrain.train.state import Progress
from longtrain.train.step import StepOutcome, prepare_step, train_step

Evaluate = Callable[[Run], Evaluation]
"""The held-out losses of a run as it stands; called by all ranks."""


def train(run: Run, *, until: int, evaluate: Evaluate | None = None) -> Progress:
    """Trains until `until` optimizer steps are done, or some rank is asked to stop; saves as the recipe says and at the end.

    All ranks call it. Raises TrainingError where too many steps in a row had to be skipped, CheckpointError where saving failed and
    the recipe says stop, or it was the last time. What is reported does not depend on where a run was stopped and
    resumed. evaluate: injected by the command line, called where the recipe wants an evaluation.
    """
    recipe, plan, ctx = run.plan.recipe, run.plan, run.ctx
    peak = peak_flops(torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "cpu", plan.dtype)
    while run.progress.step < until:
        step = run.progress.step
        lr = _learning_rate(run, step)
        begin = time.perf_counter()
        batches = run.loader.step(run.progress.sequences // recipe.training.batch_size)
        prepared = prepare_step(plan, ctx, batches, [run.asked_to_stop(), run.saver.finished])
        stop, finished = prepared.signs
        if finished:
            run.settle()
        if stop:
            break
        outcome = train_step(run.engine, plan, ctx, prepared, lr)
        seconds = time.perf_counter() - begin
        run.progress = run.progress.after_step(recipe.training.batch_size, recipe.training.sequence_length, skipped=outcome.skipped)
        if outcome.skipped:
            run.trackers.say(f"step {step + 1}: {_skip_reason(plan)}; nothing was updated, on any rank")
        done = step + 1
        final = done == recipe.training.steps
        evaluation = None
        if evaluate is not None and _due(done, recipe.evaluation.every, final):
            evaluation = evaluate(run)
        if done % recipe.tracking.every == 0 or evaluation is not None or final:
            run.trackers.log(_metrics(run, outcome, evaluation, lr, seconds, peak))
            run.stood_still = 0.0
        check_skips(run.progress, recipe.training.max_skipped, run.folder / CHECKPOINTS)
        if done % recipe.checkpoint.every == 0:
            run.save()
    run.finish_saving()
    return run.progress


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
    )

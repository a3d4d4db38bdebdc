"""Building a run from a plan: every choice is made here, once, and passed on as a value."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from longtrain.attention import Attend
from longtrain.data.loader import Loader
from longtrain.data.mixture import Split
from longtrain.data.opening import compare_tokenizers, open_split
from longtrain.errors import CheckpointError
from longtrain.kernels.layers import choose_layers
from longtrain.models.decoder import Decoder
from longtrain.models.initialise import initialise
from longtrain.models.pretrained import Pretrained, load_pretrained, open_pretrained
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine, Gathered, build_model, probe
from longtrain.parallel.exchange import ProcessGroupExchange
from longtrain.parallel.ulysses import choose_attend
from longtrain.plan import Plan
from longtrain.plan.describe import doubts
from longtrain.recipe.schema import SaveFailure
from longtrain.train.checkpoint import Saver
from longtrain.train.checkpoint_format import Origin
from longtrain.train.optim import decay_groups
from longtrain.train.resume import CHECKPOINTS, Start, restore, state_of
from longtrain.train.state import Progress
from longtrain.train.tracking import Trackers

TRAIN, HELD_OUT = "train", "heldout"

VERIFY_BYTES = 4 << 30
"""What is read whole at every start: a few seconds from a warm disk."""


@dataclass
class Run:
    """A run that is ready to train. `progress` moves; everything else was decided when it was assembled.

    origin: as in TrainState. asked_to_stop: whether this process was. stood_still: seconds that training did for checkpoints since
    this was last reset.
    """

    plan: Plan
    ctx: ParallelContext
    engine: Engine
    split: Split
    loader: Loader
    folder: Path
    trackers: Trackers = field(default_factory=Trackers)
    progress: Progress = field(default_factory=Progress)
    origin: Origin | None = None
    asked_to_stop: Callable[[], bool] = lambda: False
    stood_still: float = 0.0

    def __post_init__(self) -> None:
        self.saver = Saver(self.ctx)
        # the step of which there is a checkpoint, or one on its way; at step 0 there is nothing to lose
        self._saved = self.progress.step

    def save(self, *, last: bool = False) -> None:
        """Begins a checkpoint, after the one before it is written. A collective of all ranks.

        Raises CheckpointError on every rank where that fails and the recipe, or `last`, says so.
        """
        self.settle()
        began = time.perf_counter()
        recipe = self.plan.recipe
        state = state_of(recipe, self.split, self.progress, self.trackers.run_id, self.origin)
        try:
            self._saved = self.progress.step
            reason = self.saver.begin(self.folder / CHECKPOINTS, self.engine, state, recipe.checkpoint.keep)
            if reason is not None:
                self.trackers.say(f"step {self.progress.step}: the checkpoint was written while training stood still: {reason}")
        except CheckpointError as error:
            self._save_failed(error, last)
        self.stood_still += time.perf_counter() - began

    def settle(self, *, last: bool = False) -> None:
        """Waits until the checkpoint on its way, if any, is written. A collective of all ranks; raises as `save`."""
        began = time.perf_counter()
        try:
            saved = self.saver.settle()
            if saved is not None:
                self.trackers.say(f"saved {saved.path}")
                if saved.remark is not None:
                    self.trackers.say(f"WARNING: {saved.remark}")
        except CheckpointError as error:
            self._save_failed(error, last)
        self.stood_still += time.perf_counter() - began

    def finish_saving(self) -> None:
        """Sees to it that the run as it stands is on disk, unless the recipe wants no checkpoints. A collective of all ranks.

        Raises CheckpointError where it cannot be.
        """
        self.settle()
        if self._saved != self.progress.step and self.plan.recipe.checkpoint.every is not None:
            self.save(last=True)
            self.settle(last=True)

    def _save_failed(self, error: CheckpointError, last: bool) -> None:
        self._saved = -1
        if last or self.plan.recipe.checkpoint.on_failure is SaveFailure.STOP:
            raise error
        self.trackers.say(
            f"ERROR: a checkpoint could not be saved: {error}\nearlier ones are as they were; the next one is tried when it is "
            "due, or the run ends"
        )

    def close(self) -> None:
        self.saver.close()
        self.loader.close()
        self.trackers.close()
        self.engine.close()


def open_data(plan: Plan) -> tuple[Split, Split | None]:
    """The training split, and the held-out one where the recipe evaluates. Raises DataError; touches no device."""
    vocab_size = plan.model.vocab_size
    train = open_split(plan.recipe, TRAIN, vocab_size)
    return train, open_split(plan.recipe, HELD_OUT, vocab_size) if plan.recipe.evaluation.every else None


def verify_data(splits: Sequence[Split]) -> None:
    """Raises DataError where a shard is not, byte for byte, what was prepared.

    Reads splits up to VERIFY_BYTES; `longtrain check-data` reads larger ones.
    """
    for split in splits:
        if split.bytes <= VERIFY_BYTES:
            split.verify()


def build_attend(plan: Plan, ctx: ParallelContext) -> Attend:
    """The Attend that the model sees."""
    return choose_attend(plan.kernel.kernel, ProcessGroupExchange(ctx.cp_group), plan.ring, plan.recipe.parallel.ulysses)


def open_weights(plan: Plan, start: Start) -> Pretrained | None:
    """The weights of model.init, None where there are none or a checkpoint replaces them anyway.

    Raises CheckpointError where they are not all there, DataError where the data has another tokenizer; reads headers only.
    """
    init = plan.recipe.model.init
    if init is None or start.checkpoint is not None:
        return None
    compare_tokenizers(plan.recipe)
    return open_pretrained(Path(init), plan.model)


def first_values(
    plan: Plan, ctx: ParallelContext, start: Start, alive: Callable[[], None] = lambda: None
) -> Callable[[Any, Gathered], None]:
    """What fills a decoder before training: the weights of `open_weights`, or random values. alive: called before each
    parameter."""
    weights, seed = open_weights(plan, start), plan.recipe.seed

    def telling(gathered: Gathered) -> Gathered:
        def whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
            alive()
            return gathered(parameter)

        return whole

    if weights is None:
        return lambda decoder, gathered: initialise(decoder, seed, telling(gathered))
    extend = plan.recipe.model.positions.extend.value
    # of the other ranks the values are not used: see `build_model`
    reads = ctx.is_main
    return lambda decoder, gathered: load_pretrained(decoder, weights, telling(gathered), seed=seed, extend=extend, reads=reads)


def assemble(
    plan: Plan,
    ctx: ParallelContext,
    split: Split,
    start: Start,
    *,
    verified: bool = False,
    alive: Callable[[], None] = lambda: None,
) -> Run:
    """Model, engine and loader of one rank, restored as `start` says. A collective of all ranks. verified, alive: as for `restore`
    and `first_values`."""
    recipe = plan.recipe
    loader = Loader(
        split,
        seed=recipe.seed,
        batch_size=recipe.training.batch_size,
        micro_batch_size=recipe.training.micro_batch_size,
        dp=plan.dp,
        dp_rank=ctx.dp_rank,
    )
    probe(ctx, plan.deepspeed)
    attend = build_attend(plan, ctx)
    model = build_model(
        lambda: Decoder(plan.model, attend, recipe.training.activations.value, choose_layers(plan.fused)),
        ctx,
        recipe.zero.stage,
        plan.dtype,
        first_values(plan, ctx, start, alive),
    )
    engine = Engine(
        model,
        decay_groups(model, recipe.optimizer.weight_decay),
        ctx,
        config=plan.deepspeed,
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
    )
    alive()
    progress = Progress() if start.checkpoint is None else restore(engine, start.checkpoint, verified=verified, alive=alive)
    return Run(plan, ctx, engine, split, loader, Path(recipe.run_folder), progress=progress, origin=start.origin)


def warnings(split: Split, plan: Plan | None = None) -> Sequence[str]:
    """What the user should know about the data, and the weights of model.init, before paying for training. plan: of a run that
    begins; None where a checkpoint replaces the weights."""
    warning = split.warning()
    of_data = [] if warning is None else [f"warning: {split.folder}: {warning}"]
    return of_data + [f"warning: {doubt}" for doubt in (doubts(plan) if plan is not None else ())]

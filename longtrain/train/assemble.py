"""Building a run from a plan: every choice is made here, once, and passed on as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longtrain.attention import Attend
from longtrain.data.loader import Loader
from longtrain.data.manifest import check_model_vocab
from longtrain.data.packed import PackedSplit, context_warning
from longtrain.kernels.local import LocalAttend
from longtrain.models.decoder import Decoder
from longtrain.models.initialise import initialise
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine, build_model, probe
from longtrain.parallel.exchange import ProcessGroupExchange
from longtrain.parallel.ring import RingAttend
from longtrain.plan import Plan
from longtrain.train.optim import decay_groups
from longtrain.train.resume import Start, restore, save_checkpoint
from longtrain.train.state import Progress
from longtrain.train.tracking import Trackers

TRAIN, HELD_OUT = "train", "heldout"

VERIFY_BYTES = 4 << 30
"""What is read whole at every start: a few seconds from a warm disk."""


@dataclass
class Run:
    """A run that is ready to train. `progress` moves; everything else was decided when it was assembled."""

    plan: Plan
    ctx: ParallelContext
    engine: Engine
    split: PackedSplit
    loader: Loader
    folder: Path
    trackers: Trackers = field(default_factory=Trackers)
    progress: Progress = field(default_factory=Progress)

    def save(self) -> Path:
        """Writes a checkpoint. A collective of all ranks."""
        path = save_checkpoint(self.engine, self.plan.recipe, self.split, self.progress, self.folder)
        self.trackers.say(f"saved {path}")
        return path

    def close(self) -> None:
        self.loader.close()
        self.trackers.close()
        self.engine.close()


def open_data(plan: Plan) -> tuple[PackedSplit, PackedSplit | None]:
    """The training split, and the held-out one where the recipe evaluates. Raises DataError; touches no device."""
    recipe = plan.recipe
    train = PackedSplit(recipe.data.path, TRAIN, recipe.training.sequence_length)
    check_model_vocab(train.manifest, recipe.model.vocab_size)
    held_out = PackedSplit(recipe.data.path, HELD_OUT, recipe.training.sequence_length) if recipe.evaluation.every else None
    return train, held_out


def verify_data(splits: Sequence[PackedSplit]) -> None:
    """Raises DataError where a shard is not, byte for byte, what was prepared.

    Reads splits up to VERIFY_BYTES; `longtrain check-data` reads larger ones.
    """
    for split in splits:
        if split.tokens * split.manifest.token_dtype.itemsize <= VERIFY_BYTES:
            split.verify()


def build_attend(plan: Plan, ctx: ParallelContext) -> Attend:
    """The Attend that the model sees."""
    if plan.cp == 1:
        return LocalAttend(plan.kernel.kernel)
    return RingAttend(plan.kernel.kernel, ProcessGroupExchange(ctx.cp_group), plan.layout)


def assemble(plan: Plan, ctx: ParallelContext, split: PackedSplit, start: Start) -> Run:
    """Model, engine and loader of one rank, restored as `start` says. A collective of all ranks."""
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
        lambda: Decoder(plan.model, attend, recipe.training.activations.value),
        ctx,
        recipe.zero.stage,
        plan.dtype,
        lambda decoder, gathered: initialise(decoder, recipe.seed, gathered),  # type: ignore[arg-type]
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
    progress = Progress() if start.checkpoint is None else restore(engine, start.checkpoint)
    return Run(plan, ctx, engine, split, loader, Path(recipe.run_folder), progress=progress)


def warnings(split: PackedSplit) -> Sequence[str]:
    """What the user should know about the data before paying for training."""
    warning = context_warning(split.context_share(), split.sequence_length)
    return [] if warning is None else [f"warning: {split.folder}: {warning}"]

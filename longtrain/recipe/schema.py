"""The recipe: everything that decides a training run, as frozen, strictly typed data.

Each field's description gives its meaning and its unit, so that the reference page can be generated from here. What can be
judged from the recipe alone is judged here; what needs the number of ranks or the device is judged by the planner.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from longtrain.recipe.guards import GuardsSection, SkipAction
from longtrain.recipe.model import Extend, Family, ModelSection
from longtrain.recipe.parallel import ParallelSection, refuses_heads
from longtrain.recipe.section import Conflict, Int, OutputText, PathText, Section
from longtrain.recipe.zero import ZeroSection

_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Activations(StrEnum):
    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"
    MINIMAL = "minimal"


class KernelName(StrEnum):
    AUTO = "auto"
    TRITON = "triton"
    CUDNN = "cudnn"
    FLASH = "flash"
    REFERENCE = "reference"
    MEMORY_EFFICIENT = "memory_efficient"


class ScheduleKind(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"
    WSD = "wsd"
    CONSTANT = "constant"


def _run_name(text: str) -> str:
    if not text or not _NAME_LETTERS.issuperset(text) or text[0] in "._-":
        raise ValueError("use lower-case letters, digits, '.', '_' and '-' only, and begin with a letter or a digit")
    return text


def _label(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > 64 or set(text) & set("/\\#?%:"):
        raise ValueError("use 1 to 64 visible characters, none of / \\ # ? % :")
    return text


RunName = Annotated[str, AfterValidator(_run_name)]
Label = Annotated[str, AfterValidator(_label)]
FusedLayer = Literal["norm", "rotary", "mlp", "loss"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LongDocuments(StrEnum):
    KEEP = "keep"
    SPLIT = "split"
    DROP = "drop"


class DataSection(Section):
    """Text to train on."""

    path: PathText | None = Field(
        default=None, description="Folder of the prepared corpus, relative to the current directory; or set sources."
    )
    sources: dict[PathText, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="Several prepared folders in the place of path, 'FOLDER: weight' each: shares of the training tokens; any "
        "positive numbers, divided by their sum.",
    )
    long_documents: LongDocuments = Field(
        default=LongDocuments.KEEP,
        strict=False,
        description="Documents longer than sequence_length: keep (packed like all, cut where a sequence ends), split (their pieces "
        "of sequence_length fill sequences of their own, the rest is packed), drop (left out).",
    )
    corpus: PathText | None = Field(
        default=None,
        description="What path is prepared from, as --source of scripts/prepare_data.py names it. Only for the message where path "
        "is missing.",
    )
    tokenizer: PathText | None = Field(
        default=None,
        description="What path is prepared with, as --tokenizer of scripts/prepare_data.py names it; null: one of model.vocab_size "
        "tokens is trained. Only for the message where path is missing.",
    )

    @property
    def folders(self) -> dict[str, float]:
        """The prepared folders and their weights."""
        return self.sources if self.sources is not None else {self.path or "": 1.0}

    def conflicts(self) -> Iterator[Conflict]:
        if self.path is None and not self.sources:
            yield Conflict("path", "no data: set path to a folder of prepared data, or sources to several with weights")
        if self.path is not None and self.sources is not None:
            yield Conflict("sources", "path is set too: keep one of them (null unsets a key)")


class TrainingSection(Section):
    """Amount of training, and how one step is held in memory."""

    sequence_length: Int = Field(ge=2, description="Tokens of one training sequence, over all ring ranks.")
    steps: Int = Field(ge=1, description="Number of optimizer steps of the whole run.")
    batch_size: Int = Field(ge=1, description="Sequences of one optimizer step, over all ranks.")
    micro_batch_size: Int = Field(
        default=1, ge=1, description="Sequences of one forward pass on one rank; a divisor of batch_size."
    )
    precision: Precision = Field(
        strict=False,
        description="Number format of weights and activations in the forward and backward pass: fp32, bf16, or fp16 with "
        "loss scaling. Master weights and optimizer state are always fp32.",
    )
    activations: Activations = Field(
        strict=False,
        description="Recomputation in the backward pass, named by what a block keeps: none (nothing is recomputed), "
        "selective (input, attention output and chosen products), full (input and attention output), minimal (input "
        "only: attention runs again).",
    )

    max_skipped: Int = Field(
        default=20,
        ge=1,
        description="Steps in a row without an update, because a loss or gradient was not finite or a spike, after which "
        "guards.on_max_skipped is done.",
    )
    fused: Literal["auto", "none"] | Annotated[tuple[FusedLayer, ...], Field(strict=False)] = Field(
        default="auto",
        description="Layers that run as one Triton kernel each: auto (all on GPUs, none on CPUs), none (plain PyTorch), or a "
        "list of norm (with the addition before it), rotary, mlp (the gated product), loss (output layer and cross entropy).",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.batch_size % self.micro_batch_size:
            yield Conflict(
                "batch_size",
                f"{self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; change one of them",
            )


class AttentionSection(Section):
    """How attention is computed."""

    kernel: KernelName = Field(
        default=KernelName.AUTO,
        strict=False,
        description="Attention kernel: auto (the fastest that can do the task with the same bits in every run), or "
        "one by name, which never falls back: triton (CUDA GPUs), cudnn and flash (cuDNN's, which takes no packed "
        "documents, and FlashAttention-2, as PyTorch brings them: rings round partial results, and gradients differ "
        "from run to run in the last bits), reference (plain PyTorch, memory grows with the square of the sequence), "
        "memory_efficient (plain PyTorch in tiles).",
    )


class OptimizerSection(Section):
    """AdamW."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95), strict=False, description="Decay rates of Adam's first and second moment, each in [0, 1)."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of Adam's second moment.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay, a fraction of the weight for each unit of learning rate."
    )
    grad_clip: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; a larger gradient is scaled down; null: no limit."
    )


class ScheduleSection(Section):
    """Learning rate over the steps."""

    kind: ScheduleKind = Field(
        default=ScheduleKind.COSINE,
        strict=False,
        description="Shape after the warmup: cosine or linear (down to the final rate at the last step), wsd (stable, "
        "then down in the last decay_steps), constant.",
    )
    warmup_steps: Int = Field(default=0, ge=0, description="Steps of linear rise from 0 to the peak rate.")
    decay_steps: Int | None = Field(
        default=None, ge=1, description="Steps of the final decay: required for wsd, null for every other kind."
    )
    final_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Final learning rate as a fraction of the peak; constant does not decay."
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.kind is ScheduleKind.WSD and self.decay_steps is None:
            yield Conflict("decay_steps", "kind wsd needs decay_steps: the number of steps of the final decay")
        if self.kind is not ScheduleKind.WSD and self.decay_steps is not None:
            yield Conflict(
                "decay_steps", f"only kind wsd has decay_steps; delete it or set it to null, or change kind {self.kind} to wsd"
            )


class SaveFailure(StrEnum):
    GO_ON = "go_on"
    STOP = "stop"


class CheckpointSection(Section):
    """When the state of the run is saved."""

    every: Int | None = Field(
        default=500,
        ge=1,
        description="Steps between two checkpoints; the last step is always saved. null: never, not even the last: for measuring.",
    )
    keep: Int = Field(default=3, ge=1, description="Number of newest checkpoints to keep.")
    on_failure: SaveFailure = Field(
        default=SaveFailure.GO_ON,
        strict=False,
        description="After a checkpoint that could not be written, as on a full disk: go_on (say so, and try again when the next "
        "one is due), stop. Earlier ones are not touched; the last one of a run must succeed.",
    )


class EvaluationSection(Section):
    """Loss on held-out text."""

    every: Int | None = Field(default=None, ge=1, description="Steps between two evaluations; null: never.")
    sequences: Int = Field(default=8, ge=1, description="Held-out sequences of one evaluation.")


class Wandb(StrEnum):
    DISABLED = "disabled"
    OFFLINE = "offline"
    ONLINE = "online"


class TrackingSection(Section):
    """Metrics of the run. They are always in metrics.jsonl in the run's folder; project, entity, group and tags are wandb's."""

    every: Int = Field(default=1, ge=1, description="Steps between two reports.")
    tensorboard: bool = Field(default=False, description="Whether to write event files for tensorboard, in the run's folder.")
    wandb: Wandb = Field(
        default=Wandb.DISABLED,
        strict=False,
        description="Whether wandb gets the reports: disabled, offline (in the run's folder, to be uploaded with wandb sync), "
        "online (offline where its server cannot be reached).",
    )
    project: Label = Field(default="longtrain", description="Project of the run in wandb.")
    entity: Label | None = Field(default=None, description="User or team of the run in wandb; null: that of the login.")
    group: Label | None = Field(default=None, description="Group of runs in wandb that this one belongs to.")
    tags: Annotated[tuple[Label, ...], Field(strict=False)] = Field(default=(), description="Tags of the run in wandb.")


class Recipe(Section):
    """Everything that decides a training run."""

    name: RunName = Field(
        description="Name of the run: lower-case letters, digits, '.', '_' and '-'; begins with a letter or a digit."
    )
    seed: Int = Field(default=0, ge=0, description="Seed of weights, data order and dropout.")
    device: Device = Field(
        default=Device.AUTO, strict=False, description="Where to run: auto (cuda where there is a GPU), cpu, cuda."
    )
    output: OutputText | None = Field(default=None, description="Run folder, relative to the current directory; null: runs/<name>.")
    model: ModelSection = Field(description="Shape of the decoder.")
    data: DataSection = Field(description="Text to train on.")
    training: TrainingSection = Field(description="Amount of training, and how one step is held in memory.")
    attention: AttentionSection = Field(default=AttentionSection(), description="How attention is computed.")
    parallel: ParallelSection = Field(default=ParallelSection(), description="How ranks share the work.")
    optimizer: OptimizerSection = Field(description="AdamW.")
    schedule: ScheduleSection = Field(default=ScheduleSection(), description="Learning rate over the steps.")
    zero: ZeroSection = Field(default=ZeroSection(), description="What the ranks do not each keep a copy of.")
    checkpoint: CheckpointSection = Field(default=CheckpointSection(), description="When the run's state is saved.")
    guards: GuardsSection = Field(default=GuardsSection(), description="What is done about bad steps and stuck ranks.")
    evaluation: EvaluationSection = Field(default=EvaluationSection(), description="Loss on held-out text.")
    tracking: TrackingSection = Field(default=TrackingSection(), description="Metrics of the run.")

    @property
    def run_folder(self) -> str:
        """Folder of the run, relative to the current directory."""
        return f"runs/{self.name}" if self.output is None else self.output

    @property
    def meant_world(self) -> int:
        """The number of ranks that the recipe is sized for: the fewest of its dp and cp, which where cp is auto are the fewest that
        keep to tokens_per_rank, if any do; it then runs on fewer too."""
        parallel, training = self.parallel, self.training
        dp = 1 if parallel.dp == "auto" else parallel.dp
        if parallel.cp != "auto":
            return dp * parallel.cp
        if training.activations is Activations.MINIMAL:
            # no ring, however many tokens a rank then holds
            return dp
        held = training.micro_batch_size * training.sequence_length
        return dp * parallel.ulysses * -(-held // (parallel.tokens_per_rank * parallel.ulysses))

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._precision_conflicts()
        yield from self._sharing_conflicts()
        yield from self._model_conflicts()
        yield from self._schedule_conflicts()
        if self.guards.on_max_skipped is SkipAction.ROLL_BACK and (self.checkpoint.keep == 1 or self.checkpoint.every is None):
            yield Conflict(
                "guards.on_max_skipped",
                "roll_back needs checkpoints, and more than the newest one, which may be spoilt: set checkpoint.every, and "
                "checkpoint.keep to 2 or more",
            )

    def _precision_conflicts(self) -> Iterator[Conflict]:
        precision = self.training.precision
        if precision is not Precision.FP32 and self.zero.stage == 0:
            yield Conflict(
                "zero.stage",
                f"stage 0 trains in fp32 only: in {precision} DeepSpeed takes a phantom Adam step at start; "
                "use stage 1, or precision fp32",
            )
        if precision is Precision.FP16 and self.device is Device.CPU:
            yield Conflict("training.precision", "fp16 needs a GPU; use fp32 or bf16, or device cuda")

    def _sharing_conflicts(self) -> Iterator[Conflict]:
        """Between what a rank does and how ranks share it."""
        training, parallel, model = self.training, self.parallel, self.model
        if model.attention_dropout and parallel.ulysses > 1:
            yield Conflict(
                "model.attention_dropout",
                f"parallel.ulysses {parallel.ulysses} shares heads out, and a rank does not know the number of its heads, on which "
                "dropout depends; use a ring (ulysses 1), or model.dropout alone",
            )
        unshared = refuses_heads(model.heads, model.key_value_heads, parallel.ulysses)
        if unshared is not None:
            yield Conflict("parallel.ulysses", f"{unshared}; change it (1: a ring of all cp ranks)")
        if training.activations is Activations.MINIMAL and (parallel.cp not in (1, "auto") or parallel.ulysses > 1):
            yield Conflict(
                "training.activations",
                "minimal runs attention again in the backward, and with parallel.cp > 1 its exchange too; use full, which keeps "
                "the attention output",
            )
        if parallel.dp != "auto" and training.batch_size % (parallel.dp * training.micro_batch_size):
            yield Conflict(
                "training.batch_size",
                f"{training.batch_size} is not a multiple of parallel.dp {parallel.dp} x training.micro_batch_size "
                f"{training.micro_batch_size}; change one of them, or the number of ranks",
            )

    def _model_conflicts(self) -> Iterator[Conflict]:
        """Between the model and how it is trained."""
        training, model = self.training, self.model
        absent = [name for name in ("rotary", "mlp") if name in training.fused] if model.family is Family.OPT else []
        if absent:
            yield Conflict("training.fused", f"family opt has no {' and no '.join(absent)} to fuse; delete it from the list")
        known, extend = model.max_positions or training.sequence_length, model.positions.extend
        learned = model.init is not None and model.family is Family.OPT
        if learned and training.sequence_length > known and extend is Extend.REFUSE:
            yield Conflict(
                "training.sequence_length",
                f"{training.sequence_length} tokens, but the weights of model.init have learned {known} positions; shorten it, or "
                "set model.positions.extend to interpolate or random",
            )

    def _schedule_conflicts(self) -> Iterator[Conflict]:
        training, schedule = self.training, self.schedule
        decay_steps = schedule.decay_steps or 0
        if schedule.warmup_steps > training.steps:
            yield Conflict(
                "schedule.warmup_steps",
                f"a warmup of {schedule.warmup_steps} steps is longer than training.steps {training.steps}; shorten it",
            )
        elif schedule.warmup_steps + decay_steps > training.steps:
            yield Conflict(
                "schedule.decay_steps",
                f"warmup_steps {schedule.warmup_steps} + decay_steps {decay_steps} are more than training.steps "
                f"{training.steps}; shorten one of them",
            )

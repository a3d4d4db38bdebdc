"""The recipe: everything that decides a training run, as frozen, strictly typed data.

Each field's description gives its meaning and its unit, so that the reference page can be generated from here. What can be
judged from the recipe alone is judged here; what needs the number of ranks or the device is judged by the planner.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

CONFLICT = "conflict"
_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


class Conflict(NamedTuple):
    """Fields that cannot hold together: the dotted field to blame, seen from the section that reports it, and what to do."""

    field: str
    message: str


class Section(BaseModel):
    """A frozen group of fields that refuses unknown keys, converted types, nan and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[Conflict]:
        """Every pair of values in this section that cannot hold together. Each value alone is already valid."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        found = tuple(self.conflicts())
        if found:
            text = "; ".join(f"{conflict.field}: {conflict.message}" for conflict in found)
            raise PydanticCustomError(CONFLICT, "{text}", {"text": text, "conflicts": found})
        return self


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Family(StrEnum):
    LLAMA = "llama"


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
    REFERENCE = "reference"
    MEMORY_EFFICIENT = "memory_efficient"


class Layout(StrEnum):
    CONTIGUOUS = "contiguous"
    ZIGZAG = "zigzag"
    STRIPED = "striped"


class ScheduleKind(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"
    WSD = "wsd"
    CONSTANT = "constant"


class Offload(StrEnum):
    NONE = "none"
    CPU = "cpu"


def _run_name(text: str) -> str:
    if not text or not _NAME_LETTERS.issuperset(text) or text[0] in "._-":
        raise ValueError("use lower-case letters, digits, '.', '_' and '-' only, and begin with a letter or a digit")
    return text


def _path_text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("expected a path, without line breaks or other invisible characters")
    return text


# Counts end up in int64 tensors and file offsets.
Int = Annotated[int, Field(le=2**63 - 1)]
RunName = Annotated[str, AfterValidator(_run_name)]
PathText = Annotated[str, AfterValidator(_path_text)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelSection(Section):
    """Shape of the decoder."""

    family: Family = Field(strict=False, description="Architecture: llama (RMSNorm, rotary positions, SwiGLU).")
    vocab_size: Int = Field(ge=2, description="Number of tokens in the vocabulary; at least the tokenizer's.")
    hidden_size: Int = Field(ge=1, description="Width of the residual stream, in features.")
    layers: Int = Field(ge=1, description="Number of decoder blocks.")
    heads: Int = Field(ge=1, description="Number of query heads.")
    kv_heads: Int | None = Field(
        default=None, ge=1, description="Number of key/value heads, a divisor of heads; null: as many as heads."
    )
    head_dim: Int | None = Field(default=None, ge=2, description="Features of one head, an even number; null: hidden_size / heads.")
    intermediate_size: Int = Field(ge=1, description="Width of the feed-forward layer, in features.")
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary wavelengths.")
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the mean square inside RMSNorm.")
    tied_embeddings: bool = Field(default=False, description="Whether the output layer uses the weights of the token embedding.")
    window: Int | None = Field(
        default=None,
        ge=1,
        description="Sliding attention window, in tokens, counting the query itself; null: all earlier tokens.",
    )
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dim_per_head(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.heads if self.head_dim is None else self.head_dim

    def conflicts(self) -> Iterator[Conflict]:
        if self.head_dim is None and self.hidden_size % self.heads:
            yield Conflict(
                "heads",
                f"{self.heads} heads do not divide hidden_size {self.hidden_size}; change one of them, or set head_dim",
            )
        elif self.dim_per_head % 2:
            blamed = "heads" if self.head_dim is None else "head_dim"
            yield Conflict(
                blamed,
                f"a head has {self.dim_per_head} features, but rotary positions turn pairs of features; make it even",
            )
        if self.heads % self.key_value_heads:
            yield Conflict(
                "kv_heads",
                f"{self.key_value_heads} key/value heads do not divide {self.heads} heads; choose a divisor of heads",
            )


class DataSection(Section):
    """Text to train on."""

    path: PathText = Field(description="Folder of the prepared corpus, relative to the current directory.")


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
        description="Attention kernel: auto (the fastest that can do the task), or one by name, which never falls back: "
        "triton (CUDA GPUs), reference (plain PyTorch, memory grows with the square of the sequence), "
        "memory_efficient (plain PyTorch in tiles).",
    )


class ParallelSection(Section):
    """How ranks share the work: the number of ranks is dp * cp."""

    dp: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Data-parallel groups of ranks; auto: all ranks divided by cp."
    )
    cp: Int = Field(default=1, ge=1, description="Ranks of the ring that shares each sequence (context parallelism).")
    layout: Layout = Field(
        default=Layout.ZIGZAG,
        strict=False,
        description="Which positions of a sequence each ring rank holds: contiguous (one run each), zigzag (an early and "
        "a late run each, balances causal attention), striped (every cp-th position).",
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
            yield Conflict("decay_steps", f"only kind wsd has decay_steps; delete it, or change kind {self.kind} to wsd")


class ZeroSection(Section):
    """What the ranks do not each keep a copy of (DeepSpeed ZeRO)."""

    stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="Shared out over all ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters.",
    )
    offload: Offload = Field(
        default=Offload.NONE, strict=False, description="Where optimizer state lives: none (on the device), cpu."
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.offload is Offload.CPU and self.stage == 0:
            yield Conflict("offload", "offload cpu needs zero.stage 1, 2 or 3; stage 0 keeps optimizer state on the device")


class CheckpointSection(Section):
    """When the state of the run is saved."""

    every: Int = Field(default=500, ge=1, description="Steps between two checkpoints; the last step is always saved.")
    keep: Int = Field(default=3, ge=1, description="Number of newest checkpoints to keep.")


class EvaluationSection(Section):
    """Loss on held-out text."""

    every: Int | None = Field(default=None, ge=1, description="Steps between two evaluations; null: never.")
    sequences: Int = Field(default=8, ge=1, description="Held-out sequences of one evaluation.")


class TrackingSection(Section):
    """Metrics of the run."""

    every: Int = Field(default=1, ge=1, description="Steps between two reports.")


class Recipe(Section):
    """Everything that decides a training run."""

    name: RunName = Field(
        description="Name of the run: lower-case letters, digits, '.', '_' and '-'; begins with a letter or a digit."
    )
    seed: Int = Field(default=0, ge=0, description="Seed of weights, data order and dropout.")
    device: Device = Field(
        default=Device.AUTO, strict=False, description="Where to run: auto (cuda where there is a GPU), cpu, cuda."
    )
    output: PathText | None = Field(default=None, description="Run folder, relative to the current directory; null: runs/<name>.")
    model: ModelSection = Field(description="Shape of the decoder.")
    data: DataSection = Field(description="Text to train on.")
    training: TrainingSection = Field(description="Amount of training, and how one step is held in memory.")
    attention: AttentionSection = Field(default=AttentionSection(), description="How attention is computed.")
    parallel: ParallelSection = Field(default=ParallelSection(), description="How ranks share the work.")
    optimizer: OptimizerSection = Field(description="AdamW.")
    schedule: ScheduleSection = Field(default=ScheduleSection(), description="Learning rate over the steps.")
    zero: ZeroSection = Field(default=ZeroSection(), description="What the ranks do not each keep a copy of.")
    checkpoint: CheckpointSection = Field(default=CheckpointSection(), description="When the run's state is saved.")
    evaluation: EvaluationSection = Field(default=EvaluationSection(), description="Loss on held-out text.")
    tracking: TrackingSection = Field(default=TrackingSection(), description="Metrics of the run.")

    @property
    def run_folder(self) -> str:
        """Folder of the run, relative to the current directory."""
        return f"runs/{self.name}" if self.output is None else self.output

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that the recipe runs on."""
        return self.parallel.cp * (1 if self.parallel.dp == "auto" else self.parallel.dp)

    def conflicts(self) -> Iterator[Conflict]:
        training, schedule, parallel = self.training, self.schedule, self.parallel
        if training.precision is not Precision.FP32 and self.zero.stage == 0:
            yield Conflict(
                "zero.stage",
                f"stage 0 trains in fp32 only: in {training.precision} DeepSpeed takes a phantom Adam step at start; "
                "use stage 1, or precision fp32",
            )
        if training.precision is Precision.FP16 and self.device is Device.CPU:
            yield Conflict("training.precision", "fp16 needs a GPU; use fp32 or bf16, or device cuda")
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
        if parallel.dp != "auto" and training.batch_size % (parallel.dp * training.micro_batch_size):
            yield Conflict(
                "training.batch_size",
                f"{training.batch_size} is not a multiple of parallel.dp * micro_batch_size = "
                f"{parallel.dp} * {training.micro_batch_size}; change one of them",
            )

"""The part of a recipe that says what the decoder is and where its weights come from."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, ValidationInfo, field_validator, model_validator

from longtrain.recipe.presets import PRESETS
from longtrain.recipe.section import Conflict, Int, PathText, Section


class Family(StrEnum):
    LLAMA = "llama"
    QWEN2 = "qwen2"
    OPT = "opt"


class HiddenAct(StrEnum):
    SILU = "silu"
    GELU = "gelu"
    GELU_PYTORCH_TANH = "gelu_pytorch_tanh"


class RopeKind(StrEnum):
    NONE = "none"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"
    LONGROPE = "longrope"


class Extend(StrEnum):
    REFUSE = "refuse"
    INTERPOLATE = "interpolate"
    RANDOM = "random"


def _preset(text: str) -> str:
    if text not in PRESETS:
        raise ValueError(f"the presets are {', '.join(PRESETS)}")
    return text


Preset = Annotated[str, AfterValidator(_preset)]
MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "layers": 10_000,
    "heads": 65_536,
    "kv_heads": 65_536,
    "head_dim": 65_536,
    "intermediate_size": 2**24,
    "max_positions": 2**31 - 1,
}
"""Tables are made of these many lines, so that a number which is nonsense must not be tried."""

ROPE_THETA = 10000.0
"""Base of the rotary wavelengths where nothing says another: Su et al. 2021."""

Positive = Annotated[float, Field(gt=0)]
Factors = Annotated[tuple[Positive, ...], Field(strict=False)]


class PositionsSection(Section):
    """Learned positions (family opt)."""

    extend: Extend = Field(
        default=Extend.REFUSE,
        strict=False,
        description="What to do where a sequence is longer than the positions of `model.init`: refuse, interpolate (stretch the "
        "learned ones over the length), random (new ones behind them).",
    )


ROPE_NUMBERS: dict[RopeKind, tuple[frozenset[str], frozenset[str]]] = {
    RopeKind.NONE: (frozenset(), frozenset()),
    RopeKind.LINEAR: (frozenset({"factor"}), frozenset()),
    RopeKind.DYNAMIC: (frozenset({"factor", "original_length"}), frozenset()),
    RopeKind.YARN: (
        frozenset({"factor", "original_length"}),
        frozenset({"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"}),
    ),
    RopeKind.LLAMA3: (frozenset({"factor", "original_length"}), frozenset({"low_freq_factor", "high_freq_factor"})),
    RopeKind.LONGROPE: (
        frozenset({"factor", "original_length", "short_factor", "long_factor"}),
        frozenset({"attention_factor"}),
    ),
}
"""The fields that each kind of scaling needs, and those that it may have."""


class RopeScalingSection(Section):
    """Stretching rotary positions over longer sequences."""

    kind: RopeKind = Field(
        default=RopeKind.NONE,
        strict=False,
        description="How: none, linear (positions divided by factor), dynamic (NTK-aware: rope_theta raised for "
        "training.sequence_length), yarn, llama3 (as LLaMA 3.1), longrope (a factor for every pair of features).",
    )
    factor: float | None = Field(
        default=None, ge=1, description="How many times longer than original_length; needed by every kind but none."
    )
    original_length: Int | None = Field(
        default=None, ge=1, description="Length that the model knew before, in tokens; needed by dynamic, yarn, llama3, longrope."
    )
    low_freq_factor: float | None = Field(
        default=None, gt=0, description="Llama3: wavelengths above original_length / this are stretched; null: 1."
    )
    high_freq_factor: float | None = Field(
        default=None, gt=0, description="Llama3: wavelengths below original_length / this are kept; null: 4."
    )
    beta_fast: float | None = Field(
        default=None, gt=0, description="Yarn: features that turn more often within original_length are kept; null: 32."
    )
    beta_slow: float | None = Field(
        default=None, gt=0, description="Yarn: features that turn less often within original_length are stretched; null: 1."
    )
    attention_factor: float | None = Field(
        default=None, gt=0, description="Yarn and longrope: multiplies cosines and sines; null: what the papers advise."
    )
    mscale: float | None = Field(default=None, gt=0, description="Yarn: with mscale_all_dim, gives attention_factor.")
    mscale_all_dim: float | None = Field(default=None, gt=0, description="Yarn: with mscale, gives attention_factor.")
    short_factor: Factors | None = Field(
        default=None, description="Longrope: divisors of the frequencies up to original_length, head_dim / 2 of them."
    )
    long_factor: Factors | None = Field(
        default=None, description="Longrope: divisors of the frequencies beyond original_length, head_dim / 2 of them."
    )

    def conflicts(self) -> Iterator[Conflict]:
        needed, optional = ROPE_NUMBERS[self.kind]
        for name in type(self).model_fields:
            given = getattr(self, name) is not None
            if name in needed and not given:
                yield Conflict(name, f"kind {self.kind} needs {name}; add it")
            if name != "kind" and given and name not in needed | optional:
                yield Conflict(name, f"kind {self.kind} has no {name}; delete it or set it to null, or change kind")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            yield Conflict("mscale", "mscale and mscale_all_dim go together; set both or neither")
        low, high = self.low_freq_factor or 1.0, self.high_freq_factor or 4.0
        if self.kind is RopeKind.LLAMA3 and low >= high:
            yield Conflict("low_freq_factor", f"low_freq_factor {low:g} must be less than high_freq_factor {high:g}")


FIXED = (
    "family",
    "vocab_size",
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "max_positions",
    "norm_eps",
    "tied_embeddings",
)
"""What the weights of init decide."""
OWN = ("dropout", "attention_dropout")
"""What belongs to the training, not to the model: no preset and no config.json says it."""


class ModelSection(Section):
    """Shape of the decoder."""

    preset: Preset | None = Field(
        default=None,
        description=f"A public model whose shape fills what is not set here: {', '.join(PRESETS)}. null: none. Where the folder of "
        "init is there, its config.json goes before.",
    )
    init: PathText | None = Field(
        default=None,
        description="Hugging Face folder (config.json and safetensors) whose weights training starts from, relative to the current "
        "directory; its config.json fills what is not set here. null: random weights.",
    )
    family: Family | None = Field(
        default=None,
        strict=False,
        description="Architecture: llama (RMSNorm, rotary positions, SwiGLU or GeGLU; also Mistral), qwen2 (llama with biases of "
        "queries, keys and values), opt (LayerNorm, learned positions, ReLU, biases).",
    )
    vocab_size: Int | None = Field(
        default=None, ge=2, le=MOST["vocab_size"], description="Number of tokens in the vocabulary; at least the tokenizer's."
    )
    hidden_size: Int | None = Field(
        default=None, ge=1, le=MOST["hidden_size"], description="Width of the residual stream, in features."
    )
    layers: Int | None = Field(default=None, ge=1, le=MOST["layers"], description="Number of decoder blocks.")
    heads: Int | None = Field(default=None, ge=1, le=MOST["heads"], description="Number of query heads.")
    kv_heads: Int | None = Field(
        default=None,
        ge=1,
        le=MOST["kv_heads"],
        description="Number of key/value heads, a divisor of heads; null: as many as heads.",
    )
    head_dim: Int | None = Field(default=None, ge=2, description="Features of one head, an even number; null: hidden_size / heads.")
    intermediate_size: Int | None = Field(
        default=None, ge=1, le=MOST["intermediate_size"], description="Width of the feed-forward layer, in features."
    )
    hidden_act: HiddenAct | None = Field(
        default=None,
        validate_default=True,
        strict=False,
        description="Activation of the gate of the feed-forward layer: silu (SwiGLU), gelu (GeGLU), gelu_pytorch_tanh (GeGLU, "
        "approximated with tanh); null: that of init, else silu. Family opt has no gate.",
    )
    max_positions: Int | None = Field(
        default=None,
        ge=1,
        le=MOST["max_positions"],
        description="Longest sequence that the weights of init know, in tokens; null: training.sequence_length. A longer "
        "training.sequence_length takes its place in what is exported.",
    )
    rope_theta: float = Field(default=ROPE_THETA, gt=0, description="Base of the rotary wavelengths.")
    norm_eps: float = Field(
        default=1e-5, gt=0, description="Added to the mean square inside RMSNorm, or the variance in LayerNorm."
    )
    tied_embeddings: bool = Field(default=False, description="Whether the output layer uses the weights of the token embedding.")
    window: Int | None = Field(
        default=None,
        ge=1,
        description="Sliding attention window, in tokens, counting the query itself; null: all earlier tokens.",
    )
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the features that attention and the feed-forward layer add to the residual stream which is dropped, "
        "in training only; the same ones on any ranks. Not taken from init: OPT was trained with 0.1.",
    )
    attention_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of attention probabilities that is dropped, in training only; the same ones on any ranks. Not taken "
        "from init.",
    )
    positions: PositionsSection = Field(default=PositionsSection(), description="Learned positions (family opt).")
    rope_scaling: RopeScalingSection = Field(
        default=RopeScalingSection(), description="Stretching rotary positions over longer sequences."
    )

    @field_validator("hidden_act")
    @classmethod
    def _usual_gate(cls, given: HiddenAct | None, others: ValidationInfo) -> HiddenAct | None:
        """So that a recipe which names silu, and one from before there was a choice, are the same."""
        return HiddenAct.SILU if given is None and others.data.get("family") not in (None, Family.OPT) else given

    @model_validator(mode="wrap")
    @classmethod
    def _fill_from_preset(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """What the preset fills, and a gate that is left open, is not in model_fields_set, so that weights may say otherwise."""
        preset = PRESETS.get(given["preset"]) if isinstance(given, dict) and isinstance(given.get("preset"), str) else None
        if preset is None:
            return handler(given)._gate_open(given)
        merged = {**preset, **given}
        inner = given.get("rope_scaling")
        # numbers without a kind change those of the preset's kind
        if isinstance(inner, dict) and "kind" not in inner:
            merged["rope_scaling"] = {**preset.get("rope_scaling", {}), **inner}
        section = handler(merged)
        section.model_fields_set.intersection_update(given)
        if isinstance(inner, dict):
            section.rope_scaling.model_fields_set.intersection_update(inner)
        return section._gate_open(given)

    def _gate_open(self, given: Any) -> Self:
        """This, without `hidden_act` among what was chosen where null was written."""
        if isinstance(given, dict) and given.get("hidden_act") is None:
            self.model_fields_set.discard("hidden_act")
        return self

    @property
    def missing(self) -> tuple[str, ...]:
        """What the shape still lacks, to be read from the config.json of `init`."""
        needed = ("family", "vocab_size", "hidden_size", "layers", "heads", "intermediate_size")
        return tuple(name for name in needed if getattr(self, name) is None)

    @property
    def key_value_heads(self) -> int | None:
        """Number of key/value heads, where the shape says it."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dim_per_head(self) -> int | None:
        """Features of one head, where the shape says it."""
        if self.head_dim is None and self.hidden_size is not None and self.heads is not None:
            return self.hidden_size // self.heads
        return self.head_dim

    def conflicts(self) -> Iterator[Conflict]:
        if self.init is None:
            for name in self.missing:
                yield Conflict(name, f"required key is missing; add '{name}', or a preset or init that has it")
        family = PRESETS[self.preset]["family"] if self.preset else self.family
        if family != self.family:
            yield Conflict("family", f"preset {self.preset} is of family {family}, not {self.family}; delete one of them")
            return
        if self.heads is not None and self.hidden_size is not None:
            yield from self._head_conflicts(self.heads, self.hidden_size)
        if self.heads is not None and self.key_value_heads is not None and self.heads % self.key_value_heads:
            yield Conflict(
                "kv_heads",
                f"{self.key_value_heads} key/value heads do not divide {self.heads} heads; choose a divisor of heads",
            )
        if self.family is Family.OPT:
            yield from self._opt_conflicts()
        elif self.family is not None and self.positions.extend is not Extend.REFUSE:
            yield Conflict("positions.extend", f"family {self.family} has rotary positions; use rope_scaling or rope_theta")

    def _head_conflicts(self, heads: int, hidden_size: int) -> Iterator[Conflict]:
        dim = hidden_size // heads if self.head_dim is None else self.head_dim
        if self.head_dim is None and hidden_size % heads:
            yield Conflict("heads", f"{heads} heads do not divide hidden_size {hidden_size}; change one of them, or set head_dim")
        elif dim % 2:
            blamed = "heads" if self.head_dim is None else "head_dim"
            yield Conflict(blamed, f"a head has {dim} features, and only even numbers are implemented; change it")
        elif dim > (most := MOST["head_dim"]):
            yield Conflict("heads" if self.head_dim is None else "head_dim", f"a head has {dim} features; at most {most} work")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, name)
            if factors is not None and len(factors) != dim // 2:
                yield Conflict(
                    f"rope_scaling.{name}",
                    f"has {len(factors)} numbers, but a head of {dim} features has {dim // 2} pairs of them; give one a pair",
                )

    def _opt_conflicts(self) -> Iterator[Conflict]:
        """What no OPT model has."""
        if self.heads is not None and self.kv_heads not in (None, self.heads):
            yield Conflict("kv_heads", "family opt has as many key/value heads as heads; delete it")
        if self.head_dim is not None and self.heads is not None and self.head_dim * self.heads != self.hidden_size:
            yield Conflict("head_dim", "a head of family opt has hidden_size / heads features; delete it")
        if self.hidden_act is not None:
            yield Conflict("hidden_act", "the feed-forward layer of family opt has ReLU and no gate; delete it, or set it to null")
        if self.window is not None:
            yield Conflict("window", "family opt sees all earlier tokens; delete it, or set it to null")
        if self.norm_eps != 1e-5:
            yield Conflict("norm_eps", "the norms of family opt add 1e-5; delete it")
        if self.rope_theta != ROPE_THETA:
            yield Conflict("rope_theta", f"family opt has learned positions; delete it, or set it to {ROPE_THETA}")
        if self.rope_scaling.kind is not RopeKind.NONE:
            yield Conflict(
                "rope_scaling.kind", "family opt has learned positions; delete it or set it to none, or use positions.extend"
            )

"""What a decoder is made of, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from longtrain.errors import PlanError
from longtrain.models.rope import RopeScaling, check_scaling

HIDDEN_ACTS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""What a gate may be activated by, as Hugging Face calls it: its name in `kernels.plain.ACTIVATIONS`."""

MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "layers": 10_000,
    "heads": 65_536,
    "head_dim": 65_536,
    "intermediate_size": 2**24,
    "max_positions": 2**31 - 1,
}
"""Tables are made of these many lines, so that a number which is nonsense must not be tried."""


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder; `families.family_of` says what its parts are.

    vocab_size, hidden_size, layers, heads, kv_heads, head_dim, intermediate_size: counts, at least 1; kv_heads divides heads (GQA,
    Ainslie et al. 2023), head_dim is even. max_positions: the longest sequence the model has positions for. rope_theta,
    rope_scaling: of rotary positions. window: how many keys a query sees, its own included; None is all earlier ones. init_std: of
    the normal distribution that weights start from. dropout: of what attention and the feed-forward layer add to the residual
    stream, attention_dropout: of attention probabilities; in [0, 1), in training only. hidden_act: the activation of the gate, by
    its name in HIDDEN_ACTS, where the family's feed-forward layer has one.

    Raises:
        PlanError: a number that no decoder can have, or an activation that is not implemented.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    window: int | None = None
    init_std: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        counts = ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "intermediate_size", "max_positions")
        for name in counts:
            if getattr(self, name) < 1:
                raise PlanError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise PlanError(f"model.{name} is {getattr(self, name)}; it must be at most {most}")
        if self.heads % self.kv_heads:
            raise PlanError(f"model.kv_heads {self.kv_heads} does not divide model.heads {self.heads}; choose a divisor")
        if self.head_dim % 2:
            raise PlanError(f"model.head_dim {self.head_dim} is odd; only even ones are implemented, choose one")
        if self.window is not None and self.window < 1:
            raise PlanError(f"model.window {self.window} counts the query itself, so it must be at least 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise PlanError(f"model.{name} is {getattr(self, name)}; it must be at least 0 and less than 1")
        if self.hidden_act not in HIDDEN_ACTS:
            raise PlanError(f"model.hidden_act {self.hidden_act!r} is not implemented; choose one of: {', '.join(HIDDEN_ACTS)}")
        check_scaling(self.rope_scaling, self.rope_theta, self.head_dim)

"""Decoders: configuration, modules, first values, FLOPs, and their Hugging Face form."""

from longtrain.models.activations import Activations, held_bytes
from longtrain.models.config import ModelConfig
from longtrain.models.decoder import Decoder
from longtrain.models.families import hugging_face_names, parameter_count, parameter_shapes
from longtrain.models.flops import Flops, attention_pairs, training_flops
from longtrain.models.initialise import initialise

__all__ = [
    "Activations",
    "Decoder",
    "Flops",
    "ModelConfig",
    "attention_pairs",
    "held_bytes",
    "hugging_face_names",
    "initialise",
    "parameter_count",
    "parameter_shapes",
    "training_flops",
]

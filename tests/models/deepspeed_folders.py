"""Checkpoint folders as DeepSpeed itself writes them, of a tiny model with Hugging Face's parameter names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.local import LocalAttend
from longtrain.models import Decoder, ModelConfig, initialise
from longtrain.models.config_json import config_json
from longtrain.parallel import deepspeed as adapter
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.zero_config import DTYPES, deepspeed_config
from longtrain.train.optim import decay_groups

MASTER = "master.safetensors"
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=64,
)


def save_all(ctx: ParallelContext, base: str, cases: dict[str, dict[str, Any]]) -> None:
    """Trains and saves a model for every case (folder: options of `save_one`), with its master weights in MASTER beside it."""
    for folder, options in cases.items():
        master = save_one(ctx, Path(base) / folder, **options)
        if ctx.is_main:
            save_file(master, Path(base) / folder / MASTER)


def save_one(
    ctx: ParallelContext, folder: Path, *, stage: int, precision: str, tied: bool = False, client: Any = None, **more: Any
) -> dict[str, Tensor]:
    """Two steps of AdamW under DeepSpeed's ZeRO, then its own save_checkpoint with `client` beside the model.

    Returns the master weights, fp32, whole. more: keys of DeepSpeed's section zero_optimization, or its section data_types.
    """
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter.attach()
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    model.to(DTYPES[precision])
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage} | {key: value for key, value in more.items() if key != "data_types"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if "data_types" in more:
        config["data_types"] = more["data_types"]
    if precision != "fp32":
        config[precision] = {"enabled": True}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.01)
    made: tuple[Any, ...] = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine = made[0]
    for step in range(2):
        tokens = torch.randint(61, (1, 16), generator=torch.Generator().manual_seed(10 * step + ctx.rank))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    # not by DeepSpeed's own look-up where it can be avoided: with round_robin_gradients that finds other parameters' elements
    plain = precision == "fp32" and stage < 3
    whole: Any = deepspeed.utils.safe_get_full_fp32_param
    master = {name: (p.detach() if plain else whole(p)).clone() for name, p in engine.module.named_parameters()}
    engine.save_checkpoint(str(folder), client_state=client or {})
    if ctx.is_main:
        model.config.save_pretrained(folder)
    engine.destroy()
    return master


def _fill(model: Any, gathered: Any) -> None:
    initialise(model, 0, gathered)


def save_ours(ctx: ParallelContext, folder: str) -> None:
    """The same for a decoder of ours under our Engine: its parameters have our names."""
    model = adapter.build_model(lambda: Decoder(CONFIG, LocalAttend(ReferenceKernel())), ctx, 1, torch.bfloat16, _fill)
    config = deepspeed_config(stage=1, precision="bf16", world=ctx.world)
    engine = adapter.Engine(model, decay_groups(model, 0.1), ctx, config=config, lr=0.01)
    engine._engine.save_checkpoint(folder)
    master = {piece.name: piece.tensors["master"].clone() for piece in engine.owned_ranges()}
    shapes = {name: info.shape for name, info in engine.parameters().items()}
    save_file({name: value.view(shapes[name]) for name, value in master.items()}, Path(folder) / MASTER)
    content = config_json(CONFIG, torch.bfloat16, 1, 2)
    (Path(folder) / "config.json").write_text(json.dumps(content))
    engine.close()

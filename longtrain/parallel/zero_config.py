"""DeepSpeed's configuration from plain values, and what it must never be asked to do."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Elements of one gradient message. DeepSpeed's 5e8 costs 2 GB of fp32 copy (and as much again when overlapping) and buys little:
# two H200 gather at 240 GB/s with 64 MiB messages and at 271 with 256 MiB.
BUCKET = 50_000_000
# Elements that ZeRO-3 updates at once on a rank; the step copies this much in fp32.
SUB_GROUP = 100_000_000


def deepspeed_config(
    *,
    stage: int,
    precision: str = "fp32",
    offload: str = "none",
    accumulation: int = 1,
    micro_batch: int = 1,
    world: int = 1,
    grad_clip: float | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration as plain data. Raises ValueError for what no recipe can ask for: DeepSpeed would accept it.

    precision: fp32 | bf16 | fp16. offload: none | cpu (master weights, moments and the optimizer step). micro_batch: sequences
    per rank and forward; DeepSpeed only multiplies it. grad_clip: L2 norm, None for no clipping.
    """
    if precision not in DTYPES or offload not in ("none", "cpu"):
        raise ValueError(f"precision {precision!r} or offload {offload!r} is not known")
    if stage == 0 and (precision, offload) != ("fp32", "none"):
        # Measured in bf16: a phantom Adam step at initialisation turns a weight of 1.0 into 0.95.
        raise ValueError(f"stage 0 is for fp32 without offload, not for {precision} and offload {offload}")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        # Sums of bf16 gradients over ranks lose what small shards contribute.
        "communication_data_type": "fp32",
        # Explicit, because DeepSpeed clips at 1.0 where nothing is said.
        "gradient_clipping": grad_clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    if stage > 0:
        config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "sub_group_size": SUB_GROUP}
    if offload == "cpu":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision == "fp16":
        # The window never ends for DeepSpeed: it would double the scale before it divides the gradients by it. Engine.step does it.
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}
        config["fp16"] |= {"loss_scale_window": 2**62, "min_loss_scale": 1}
    if precision != "fp32" and accumulation > 1 and stage >= 2:
        # Shards, so cheap. Stage 1 would hold whole fp32 gradients, and DeepSpeed would swap in another optimizer class.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config

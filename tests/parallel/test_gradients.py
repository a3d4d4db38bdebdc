"""dp x ring x ZeRO trains as one process of plain torch does: gradients, loss, norm, and parameters after some steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtrain.attention import Band, SequenceLayout
from longtrain.batch import IGNORE, Batch
from longtrain.models.config import ModelConfig
from longtrain.models.families import parameter_shapes
from longtrain.models.initialise import initial_value
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.shard import shard_batch
from longtrain.plan.plan import model_config
from longtrain.recipe.zero import RAW_KEYS
from tests.distributed import run_ranks
from tests.grid import RATES, Arrays, Case, Grids, Task, train, whole
from tests.tiny import ragged_batch, take_rows

LAYOUTS = ("contiguous", "zigzag", "striped")
TOLERANCE = 1e-6
# Every other one has labels on every rank, so that each layout of each stage is also tried with gradients on all of them.
TASKS = (
    Task(),
    Task(length=45, window=13, starved=True),
    Task(length=45, tied=True, clip=0.3),
    Task(tied=True, clip=0.3, starved=True),
)


def cases(dp: int, cp: int) -> list[Case]:
    """Every stage, layout and accumulation; tasks, activations and kernels take turns."""
    layouts = LAYOUTS if cp > 1 else ("contiguous",)
    modes = ("none", "selective", "full") if cp > 1 else ("none", "selective", "full", "minimal")
    found = []
    for turn, (stage, layout, accumulation) in enumerate(product(range(4), layouts, (1, 2))):
        shifted = turn + stage  # else every stage would meet the same combinations
        task, mode = TASKS[shifted % len(TASKS)], modes[shifted % len(modes)]
        kernel = ("memory_efficient", "reference")[shifted // 2 % 2]
        found.append(Case(dp, cp, stage, layout, accumulation, mode, kernel, task))
    return found


def sharing_heads(world: int) -> list[Case]:
    """Every stage where ranks share heads: all of them, or groups of two in a ring, in turns; layouts as the ring needs them."""
    found = []
    for stage in range(4):
        for turn, cp in enumerate((2,) if world == 2 else (2, 4)):
            layout, mode = LAYOUTS[(stage + turn) % 3], ("none", "selective", "full")[(stage + 2 * turn) % 3]
            task, kernel = TASKS[(stage + turn) % len(TASKS)], ("memory_efficient", "reference")[turn]
            found.append(Case(world // cp, cp, stage, layout, 1 + stage % 2, mode, kernel, task, ulysses=2))
    return found


def with_raw_keys() -> list[Case]:
    """Two ranks, with DeepSpeed's own keys far from what is generated: every one that a stage reads."""
    found = []
    for stage in (1, 2, 3):
        zero = {name: key for name, key in RAW_KEYS.items() if name.startswith("zero_optimization.") and "offload" not in name}
        keys = {name: key.kind for name, key in zero.items() if stage in key.stages}
        plain = {name.partition(".")[2]: 300 if kind is int else name.endswith("comm") for name, kind in keys.items()}
        raw = json.dumps({"zero_optimization": plain, "steps_per_print": 1, "wall_clock_breakdown": True})
        found.append(Case(1, 2, stage, "zigzag", 2, "none", "memory_efficient", Task(length=45, clip=0.3), raw=raw))
    return found


@dataclass(frozen=True)
class Outcome:
    """losses and norms of every step; master weights after the last, gradients of the first, as it reached Adam."""

    losses: list[float]
    norms: list[float]
    parameters: Arrays
    gradients: Arrays


@cache
def truth(task: Task) -> Outcome:
    """One process, plain torch, and in fp64, so that whatever differs is the candidate's: mean cross entropy, clipping, AdamW."""
    recipe, config = task.recipe(), model_config(task.recipe())
    shapes = parameter_shapes(config)
    weights = {name: initial_value(config, recipe.seed, name, shape).double().requires_grad_() for name, shape in shapes.items()}
    decay, betas = recipe.optimizer.weight_decay, recipe.optimizer.betas
    decayed, others = ([p for p in weights.values() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=recipe.optimizer.eps)
    losses, norms, gradients = [], [], {}
    for step, rate in enumerate(RATES):
        batch = ragged_batch(step, task.length, starved=task.starved)
        logits = plain_logits(weights, config, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), task.clip or float("inf"))
        gradients = gradients or {name: p.grad.flatten().numpy().copy() for name, p in weights.items() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return Outcome(losses, norms, {name: p.detach().flatten().numpy() for name, p in weights.items()}, gradients)


def plain_logits(weights: dict[str, Tensor], config: ModelConfig, batch: Batch) -> Tensor:
    """LLaMA in the dtype of its weights, sharing nothing with longtrain.models but names: [B, T, V]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (config.hidden_size,), weights[name], config.norm_eps)

    def turned(x: Tensor) -> Tensor:
        """Features i and i + D/2 as one complex number, turned by its angle."""
        pairs = torch.complex(*x.unflatten(-1, (2, -1)).unbind(-2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), -1)

    i = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    angles = batch.positions[:, None, :, None] * config.rope_theta ** (-i / config.head_dim)
    distance = batch.positions[:, :, None] - batch.positions[:, None, :]
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    seen = same & (distance >= 0) & (distance < (config.window or config.max_positions))
    x = weights["embedding.weight"][batch.tokens]
    for block in (f"blocks.{layer}." for layer in range(config.layers)):
        y = norm(x, block + "attention_norm.weight")
        names = (f"{block}attention.{name}.weight" for name in ("query", "key", "value"))
        q, k, v = (F.linear(y, weights[name]).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for name in names)
        out = F.scaled_dot_product_attention(turned(q), turned(k), v, seen[:, None], enable_gqa=True)
        x = x + F.linear(out.transpose(1, 2).flatten(2), weights[block + "attention.output.weight"])
        y = norm(x, block + "mlp_norm.weight")
        y = F.silu(F.linear(y, weights[block + "mlp.gate.weight"])) * F.linear(y, weights[block + "mlp.up.weight"])
        x = x + F.linear(y, weights[block + "mlp.down.weight"])
    return F.linear(norm(x, "norm.weight"), weights["embedding.weight" if config.tied_embeddings else "head.weight"])


def _train_all(ctx: ParallelContext, todo: Sequence[Case]) -> list[dict[str, Any]]:
    contexts, results = Grids(ctx), []
    for case in todo:
        steps = [ragged_batch(step, case.task.length, starved=case.task.starved) for step in range(len(RATES))]
        results.append(train(contexts(case), case, steps))
    return results


def worst(found: Mapping[str, npt.NDArray[np.floating]], true: Arrays) -> tuple[float, str]:
    """The largest error in units of max(largest of this parameter, 1e-3 x largest of the model), and whose it is."""
    assert found.keys() == true.keys()
    largest = max(float(np.abs(value).max()) for value in true.values())
    ratios = []
    for name, value in true.items():
        assert found[name].shape == value.shape, name
        unit = max(float(np.abs(value).max()), 1e-3 * largest)
        ratios.append((float(np.abs(found[name].astype(np.float64) - value).max()) / unit, name))
    return max(ratios)


def _outcome(case: Case, ranks: Sequence[dict[str, Any]]) -> Outcome:
    """What all ranks did together. Decay is decoupled, so Adam's first moment after one step is (1 - beta1) x gradient."""
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"], f"{case}: ranks report different losses"
        assert rank["norms"] == ranks[0]["norms"], f"{case}: ranks report different norms"
    share = 1 - case.task.recipe().optimizer.betas[0]
    moments = whole([rank["exp_avg"] for rank in ranks], "exp_avg")
    gradients = {name: value / np.float32(share) for name, value in moments.items()}
    return Outcome(ranks[0]["losses"], ranks[0]["norms"], whole([rank["master"] for rank in ranks], "master"), gradients)


def check(case: Case, ranks: Sequence[dict[str, Any]], tolerance: float = TOLERANCE) -> None:
    """fp32 within rounding of the truth; bf16 and fp16 as a vector, and only as well as they can be."""
    found, true = _outcome(case, ranks), truth(case.task)
    low = case.precision != "fp32"
    assert found.losses == pytest.approx(true.losses, rel=2e-2 if low else tolerance), case
    assert found.norms == pytest.approx(true.norms, rel=5e-2 if low else tolerance), case
    if low:
        for name, value in true.gradients.items():
            error = np.linalg.norm(found.gradients[name] - value)
            assert error <= 0.05 * np.linalg.norm(value), f"{case}: gradient of {name}"
        return
    ratio, name = worst(found.gradients, true.gradients)
    assert ratio <= tolerance, f"{case}: gradient of {name} is off by {ratio:.2e}"
    ratio, name = worst(found.parameters, true.parameters)
    # Adam divides by the root of the second moment, which makes the rounding of small gradients as large as that of large ones
    assert ratio <= 3 * tolerance, f"{case}: {name} is off by {ratio:.2e} after {len(RATES)} steps"


BF16 = {
    2: [
        Case(2, 1, 1, "contiguous", 2, "none", "memory_efficient", Task(tied=True), "bf16"),
        Case(1, 2, 2, "zigzag", 2, "full", "memory_efficient", Task(length=45), "bf16"),
        Case(1, 2, 3, "striped", 1, "selective", "memory_efficient", Task(clip=0.3), "bf16"),
    ]
}


@pytest.mark.parametrize("grids", [[(1, 1)], [(2, 1), (1, 2)], [(2, 2)]], ids=["world 1", "world 2", "world 4"])
def test_gradients_loss_and_parameters_are_those_of_one_process(grids: list[tuple[int, int]]) -> None:
    world = grids[0][0] * grids[0][1]
    todo = [case for grid in grids for case in cases(*grid)] + BF16.get(world, []) + (sharing_heads(world) if world > 1 else [])
    todo += with_raw_keys() if world == 2 else []
    ranks = run_ranks(_train_all, world, todo, timeout=280)
    for index, case in enumerate(todo):
        check(case, [rank[index] for rank in ranks])


@pytest.mark.gpu
@pytest.mark.parametrize("grids", [[(1, 1)], [(2, 1), (1, 2)]], ids=["world 1", "world 2"])
def test_gradients_on_gpus(grids: list[tuple[int, int]]) -> None:
    """The same over NCCL; cuBLAS sums in another order, so the bound is a little wider."""
    world = grids[0][0] * grids[0][1]
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    low = [replace(case, precision=name) for case in BF16[2] if case.dp * case.cp == world for name in ("bf16", "fp16")]
    todo = [case for grid in grids for case in cases(*grid)] + low + (sharing_heads(world) if world > 1 else [])
    ranks = run_ranks(_train_all, world, todo, timeout=280, device="cuda")
    for index, case in enumerate(todo):
        check(case, [rank[index] for rank in ranks], 3 * TOLERANCE)


def test_every_value_is_tried_with_every_stage() -> None:
    """The turns that `cases` takes leave nothing out."""
    todo = [case for grid in ((1, 1), (2, 1), (1, 2), (2, 2)) for case in cases(*grid)]
    for stage in range(4):
        seen = Counter[object]()
        for case in (case for case in todo if case.stage == stage):
            seen.update([case.activations, case.kernel, case.task, (case.layout, case.accumulation, case.cp), case.task.clip])
        assert set(seen) >= {"none", "selective", "full", "reference", "memory_efficient", None, 0.3, *TASKS}
        assert set(seen) >= set(product(LAYOUTS, (1, 2), (2,)))
    assert "minimal" in {case.activations for case in todo}
    shared = [*sharing_heads(2), *sharing_heads(4)]
    assert {(case.stage, case.dp, case.cp) for case in shared} == set(product(range(4), (1,), (2, 4))) | set(
        product(range(4), (2,), (2,))
    )
    assert {case.layout for case in shared if case.cp == 4} == set(LAYOUTS)
    assert {case.activations for case in shared} == {"none", "selective", "full"}


def test_a_starved_shard_has_no_label() -> None:
    """What makes the tasks hard is really there: a ring rank, and a micro batch, without anything to learn."""
    for layout in SequenceLayout:
        for length, starved in product((45, 48), (True, False)):
            batch = ragged_batch(0, length, starved=starved)
            third, fourth = (shard_batch(take_rows(batch, [row]), layout, 2, 1, Band.causal()) for row in (2, 3))
            assert third.trainable == fourth.trainable == 0
            everything = [shard_batch(batch, layout, 2, rank, Band.causal()).trainable for rank in (0, 1)]
            assert everything[0] > 0
            assert (everything[1] == 0) == starved


def test_the_bound_sees_a_wrong_scale() -> None:
    """Control: gradients that are off by one token in all of them, and clipping that is forgotten, are found."""
    task = Task()
    true = truth(task)
    tokens = int((ragged_batch(0, task.length).labels != IGNORE).sum())
    off = {name: value * tokens / (tokens + 1) for name, value in true.gradients.items()}
    assert worst(off, true.gradients)[0] > 1000 * TOLERANCE
    assert worst(truth(replace(task, clip=0.3)).parameters, true.parameters)[0] > 100 * TOLERANCE

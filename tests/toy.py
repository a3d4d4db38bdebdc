"""A model of a few hundred parameters with every awkward thing in it, and its training on fixed data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longtrain.batch import IGNORE
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine, Gathered, StepResult, build_model
from longtrain.parallel.loss import loss_scale
from longtrain.parallel.zero_config import DTYPES, deepspeed_config
from longtrain.train.optim import decay_groups

VOCAB, WIDTH, ROWS, LENGTH = 11, 7, 4, 5
LR, DECAY, BETAS = 0.02, 0.1, (0.9, 0.95)


class Toy(nn.Module):
    """Tied embeddings, odd sizes that no world divides, a bias of one element, an fp32 buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, 3 * WIDTH)
        self.gate = nn.Linear(WIDTH, 1)
        self.back = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(WIDTH, dtype=torch.float32) / 256 + 1)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        normed = self.norm(x)
        x = x + self.back(torch.tanh(self.hidden(normed))) * torch.sigmoid(self.gate(normed)) * self.table.to(x.dtype)
        logits = self.head(x).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def initialise(model: nn.Module, gathered: Gathered) -> None:
    """Values that depend on the parameter's name only."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name) * 1000 + sum(name.encode()))
        with gathered(parameter), torch.no_grad():
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(std=0.3, generator=generator)
            parameter.copy_(values + (name == "norm.weight"))


def rows(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [ROWS, LENGTH] of a step. The last row never has a label; step 1 has few; step 4 has none at all."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    labels[-1] = IGNORE
    if step == 1:
        labels[:, 1:] = IGNORE
    if step == 4:
        labels[:] = IGNORE
    return tokens, labels


def make_engine(
    ctx: ParallelContext,
    *,
    stage: int,
    precision: str = "fp32",
    accumulation: int = 1,
    grad_clip: float | None = None,
    offload: str = "none",
) -> Engine:
    config = deepspeed_config(
        stage=stage,
        precision=precision,
        offload=offload,
        accumulation=accumulation,
        micro_batch=ROWS // (ctx.world * accumulation),
        world=ctx.world,
        grad_clip=grad_clip,
    )
    model = build_model(Toy, ctx, stage, DTYPES[precision], initialise)
    return Engine(model, decay_groups(model, DECAY), ctx, config=config, lr=LR, betas=BETAS)


def train(engine: Engine, steps: range, poison: Callable[[int], float] = lambda step: 1.0) -> list[StepResult]:
    """The ranks share the rows of every step; `poison(step)` multiplies this rank's loss."""
    results = []
    ctx, parts = engine.ctx, engine.ctx.world * engine.accumulation
    for step in steps:
        tokens, labels = rows(step)
        mine = [slice((m * ctx.world + ctx.rank), None, parts) for m in range(engine.accumulation)]
        count = int(ctx.all_reduce_sum([sum(int((labels[part] != IGNORE).sum()) for part in mine)])[0])
        scale = loss_scale(world=ctx.world, accumulation=engine.accumulation, tokens=count)
        engine.set_lr(LR / (step + 1))
        for part in mine:
            engine.backward(engine.forward(tokens[part], labels[part]) * poison(step), scale)
        results.append(engine.step())
    return results


def plain(steps: range, *, grad_clip: float | None) -> tuple[nn.Module, list[float]]:
    """The same training in one process without DeepSpeed, and its gradient norms."""
    model = Toy()
    initialise(model, lambda parameter: torch.no_grad())
    optimizer = torch.optim.AdamW(decay_groups(model, DECAY), lr=LR, betas=BETAS)
    norms = []
    for step in steps:
        tokens, labels = rows(step)
        for group in optimizer.param_groups:
            group["lr"] = LR / (step + 1)
        (model(tokens, labels) / max(1, int((labels != IGNORE).sum()))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


def loss_of(engine: Engine) -> float:
    """Evaluation loss on fixed rows: shows the weights that the model computes with, on this rank."""
    engine.train(False)
    with torch.no_grad():
        loss = float(engine.forward(*rows(0)))
    engine.train(True)
    return loss


def owned(engine: Engine) -> list[tuple[str, int, dict[str, list[float]]]]:
    """This rank's ranges as plain data."""
    return [(r.name, r.start, {key: view.tolist() for key, view in r.tensors.items()}) for r in engine.owned_ranges()]


def digest(engine: Engine) -> str:
    """Changes with any bit of what this rank owns and of the weights it computes with."""
    text: list[Any] = [owned(engine), sorted(engine.adam_steps().items()), loss_of(engine).hex()]
    return hashlib.sha256(repr(text).encode()).hexdigest()


def assemble(ranks: list[list[tuple[str, int, dict[str, list[float]]]]], kind: str) -> dict[str, Tensor]:
    """Whole flat parameters out of the ranges of all ranks. Fails where ranges overlap or leave a hole."""
    pieces: dict[str, list[tuple[int, list[float]]]] = {}
    for ranges in ranks:
        for name, start, tensors in ranges:
            pieces.setdefault(name, []).append((start, tensors[kind]))
    whole = {}
    for name, parts in pieces.items():
        values: list[float] = []
        for start, part in sorted(parts):
            assert start == len(values), f"{name}: range at {start}, expected {len(values)}"
            values += part
        whole[name] = torch.tensor(values)
    return whole

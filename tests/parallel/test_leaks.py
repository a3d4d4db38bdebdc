"""Documents packed into one sequence know nothing of each other, in any ring: the probe that other trainers failed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from longtrain.attention import AttentionMask, SequenceLayout
from longtrain.batch import IGNORE, Batch
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.shard import Shard, shard_batch
from tests.attention_cases import boundaries, segments
from tests.distributed import run_ranks
from tests.grid import ROWS, Case, Grids, Task, make_engine, train
from tests.tiny import VOCAB, noise

LENGTHS = (5, 22, 1, 17)
LENGTH = sum(LENGTHS)
CHANGED = 12  # in the second document, which holds positions 5 to 26
AFTER = range(CHANGED, 27)
WAYS = {
    "contiguous": ("reference", 1, None),
    "zigzag": ("memory_efficient", 3, None),
    "striped": ("memory_efficient", 2, 11),
}
CASES = [
    Case(ROWS // cp, cp, stage, layout, 1, "full", kernel, Task(length=LENGTH, window=window))
    for cp, layouts in ((1, ("zigzag",)), (2, ("zigzag", "striped")), (4, tuple(WAYS)))
    for layout, (kernel, stage, window) in WAYS.items()
    if layout in layouts
]


def packed(changed: bool) -> Batch:
    """Four rows of the same documents; labels in the last document of each only. One token of the first row may be changed."""
    tokens = torch.tensor(noise(3, ROWS * LENGTH, VOCAB)).view(ROWS, LENGTH)
    labels = tokens.roll(-1, 1)
    labels[:, : LENGTH - LENGTHS[-1]] = IGNORE
    labels[:, -1] = IGNORE
    if changed:
        tokens[0, CHANGED] = (tokens[0, CHANGED] + 1) % VOCAB
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(ROWS, -1).contiguous()
    documents = (LENGTHS,) * ROWS
    return Batch(tokens, labels, positions, segments(documents, LENGTH), boundaries(documents))


def _probe(ctx: ParallelContext) -> list[dict[str, Any]]:
    contexts, found = Grids(ctx), []
    for case in CASES:
        own, plan = contexts(case), case.plan()
        engine = make_engine(case, plan, own)

        def logits(shard: Shard, engine: Any = engine) -> Any:
            engine.train(False)
            with torch.no_grad():
                return engine.forward(shard.tokens, shard.positions, shard.mask).numpy().copy()

        shards = [shard_batch(packed(changed), plan.layout, plan.cp, own.cp_rank, plan.band) for changed in (False, True)]
        leaking = [replace(shard, mask=AttentionMask(plan.band)) for shard in shards]
        result: dict[str, Any] = {"packed": [logits(s) for s in shards], "leaking": [logits(s) for s in leaking]}
        engine.close()
        result["steps"] = [train(own, case, [packed(changed)]) for changed in (False, True)]
        found.append(result)
    return found


def _changed_positions(case: Case, ranks: list[dict[str, Any]], kind: str) -> set[tuple[int, int]]:
    """(row, position) of every logit vector in which a bit changed."""
    layout = SequenceLayout(case.layout)
    before, after = (
        layout.unshard([torch.from_numpy(rank[kind][index]) for rank in ranks[: case.cp]], LENGTH).numpy() for index in (0, 1)
    )
    return {(int(row), int(position)) for row, position in np.argwhere((before != after).any(-1))}


def test_a_changed_token_changes_only_what_comes_after_it_in_its_document() -> None:
    """Forward: bitwise the same logits elsewhere. Backward: bitwise the same gradients where other documents bear the loss."""
    ranks = run_ranks(_probe, 4, dp=4, timeout=200)
    for index, case in enumerate(CASES):
        found = [rank[index] for rank in ranks]
        # with a window of 11 in two layers a change reaches 20 positions further; the document ends before
        assert _changed_positions(case, found, "packed") == {(0, position) for position in AFTER}, case
        leaked = _changed_positions(case, found, "leaking")
        assert leaked > {(0, position) for position in AFTER}, f"{case}: the control must leak"
        for rank in found:
            plain, changed = rank["steps"]
            assert plain["losses"] == changed["losses"], case
            assert plain["norms"] == changed["norms"], case
            assert [name for name, _, _ in plain["exp_avg"]] == [name for name, _, _ in changed["exp_avg"]]
            for (name, _, before), (_, _, after) in zip(plain["exp_avg"], changed["exp_avg"], strict=True):
                assert np.array_equal(before["exp_avg"], after["exp_avg"]), f"{case}: gradient of {name}"

"""A checkpoint goes on anywhere: other ranks, another grid, another ZeRO stage, with offload or without, it is the same run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from longtrain.parallel.context import Grid, ParallelContext
from longtrain.parallel.deepspeed import MOMENTS
from longtrain.plan import make_plan
from longtrain.train import assemble as assembly
from longtrain.train.assemble import open_data
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.run import run_training
from longtrain.train.state import Progress
from longtrain.train.tracking import METRICS_FILE, read_metrics
from tests.distributed import run_ranks
from tests.grid import Grids
from tests.tiny import tiny_recipe, write_corpus

SAVED, STEPS, BATCH, SEQUENCES = 3, 5, 4, 7
KINDS = ("master", *MOMENTS)
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}
LONG = (pytest.mark.faults, pytest.mark.timeout(3000))
Parameters = dict[tuple[str, str], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Place:
    """Where a run trains."""

    dp: int
    cp: int
    stage: int
    offload: str = "none"
    precision: str = "fp32"

    @property
    def world(self) -> int:
        return self.dp * self.cp

    def overrides(self, base: Path, run: str) -> list[str]:
        own = {
            "data.path": base / "data",
            "output": base / run,
            "training.steps": STEPS,
            "training.precision": self.precision,
            "parallel.cp": self.cp,
            "zero.stage": self.stage,
            "zero.offload": self.offload,
            "checkpoint.every": 1000,
        }
        return [f"{key}={value}" for key, value in own.items()]

    def __str__(self) -> str:
        return f"{self.dp}x{self.cp}-stage{self.stage}-{self.offload}-{self.precision}"


@dataclass(frozen=True)
class Seen:
    """One rank's part of a run. order: what it read. held: (kind, parameter, start, values) that it owned when it had loaded."""

    order: list[int]
    held: list[tuple[str, str, int, npt.NDArray[np.float32]]]
    adam_steps: set[int]


@contextmanager
def _watched(held: list[Any], adam_steps: set[int]) -> Iterator[None]:
    restore = assembly.restore

    def watched(engine: Any, start: Path, **more: Any) -> Progress:
        progress = restore(engine, start, **more)
        for piece in engine.owned_ranges():
            held.extend((kind, piece.name, piece.start, piece.tensors[kind].cpu().numpy().copy()) for kind in KINDS)
        adam_steps.update(engine.adam_steps().values())
        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "restore", watched)
        yield


def _run(ctx: ParallelContext, place: Place, base: Path, run: str, resume: str, until: int | None) -> Seen:
    plan = make_plan(tiny_recipe(*place.overrides(base, run)), ctx.world, "cpu")
    split, _ = open_data(plan)
    start = choose(plan.recipe, split, resume)
    ctx.all_gather_text("chosen")
    seen, read = Seen([], [], set()), split.sequence

    def recorded(index: int) -> Any:
        seen.order.append(index)
        return read(index)

    split.sequence = recorded  # type: ignore[method-assign]
    with redirect_stdout(io.StringIO()), _watched(seen.held, seen.adam_steps):
        run_training(plan, ctx, split, start, until=until, evaluate=None)
    return seen


def _save_all(ctx: ParallelContext, sources: Sequence[Place], base: Path) -> list[list[Seen]]:
    """Every run up to where others go on from it, and then itself."""
    grids = Grids(ctx)
    return [
        [_run(grids(Grid(place.dp, place.cp)), place, base, str(place), "auto", until) for until in (SAVED, None)]
        for place in sources
    ]


def _load_all(ctx: ParallelContext, pairs: Sequence[tuple[Place, Place]], base: Path) -> list[Seen]:
    grids, seen = Grids(ctx), []
    for source, target in pairs:
        start = str(_step(base, source, SAVED))
        seen.append(_run(grids(Grid(target.dp, target.cp)), target, base, f"{source}-{target}", start, None))
    return seen


def _step(base: Path, place: Place, step: int) -> Path:
    return base / str(place) / CHECKPOINTS / f"step-{step:08d}"


def _put_together(pieces: Sequence[tuple[str, str, int, npt.NDArray[np.float32]]]) -> Parameters:
    """Whole parameters and moments out of ranges, which neither overlap nor leave a hole."""
    whole: Parameters = {}
    for kind, name, start, values in sorted(pieces, key=lambda piece: piece[:3]):
        before = whole.get((kind, name), np.empty(0, np.float32))
        assert start == before.size, f"{kind} of {name}: a range at {start}, expected {before.size}"
        whole[kind, name] = np.concatenate([before, values])
    return whole


def _saved(step: Path) -> Parameters:
    """What the files of a checkpoint hold, read without the code that is under test."""
    pieces = []
    for file in step.glob("rank-*.safetensors"):
        for key, values in load_file(file).items():
            (kind, rest), start = key.split("/", 1), key.rsplit("@", 1)[1]
            pieces.append((kind, rest.rsplit("@", 1)[0], int(start), values))
    return _put_together(pieces)


def _losses(base: Path, run: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(base / run / METRICS_FILE)}


def _orders(ranks: Sequence[Seen], place: Place) -> list[set[int]]:
    """The sequences of every step, over the data-parallel ranks; the loader reads one step ahead."""
    share, orders = BATCH // place.dp, [rank.order for rank in ranks[:: place.cp]]
    steps = len(orders[0]) // share
    return [{index for order in orders for index in order[step * share : (step + 1) * share]} for step in range(steps)]


def _check(base: Path, source: Place, target: Place, straight: Sequence[Seen], ranks: Sequence[Seen]) -> None:
    pair = f"{source} -> {target}"
    found = _put_together([piece for rank in ranks for piece in rank.held])
    wanted = _saved(_step(base, source, SAVED))
    assert found.keys() == wanted.keys(), pair
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted), pair
    assert all(np.any(wanted[key]) for key in wanted if key[0] != "master"), "moments of nothing would prove nothing"
    assert all(rank.adam_steps == {SAVED} for rank in ranks), pair
    more = STEPS - SAVED
    assert _orders(ranks, target)[:more] == _orders(straight, source)[:more], pair
    losses, true = _losses(base, f"{source}-{target}"), _losses(base, str(source))
    assert set(losses) == set(range(SAVED + 1, STEPS + 1)), pair
    low = source.precision != "fp32"
    assert losses == pytest.approx({step: true[step] for step in losses}, rel=0.01 if low else 2e-6), pair


def _matrix(sources: Sequence[Place], targets: Mapping[Place, Sequence[Place]], base: Path) -> int:
    """Saves at every source, loads what each target takes; how many pairs there were."""
    write_corpus(base / "data", SEQUENCES)
    straight: dict[Place, list[Seen]] = {}
    for world in sorted({place.world for place in sources}):
        mine = [place for place in sources if place.world == world]
        ranks = run_ranks(_save_all, world, mine, base, timeout=1000)
        straight |= {place: [rank[number][1] for rank in ranks] for number, place in enumerate(mine)}
    for world in sorted({place.world for place in targets}):
        pairs = [(source, target) for target, some in targets.items() if target.world == world for source in some]
        ranks = run_ranks(_load_all, world, pairs, base, timeout=2500)
        for number, (source, target) in enumerate(pairs):
            _check(base, source, target, straight[source], [rank[number] for rank in ranks])
    return sum(len(some) for some in targets.values())


def test_a_run_goes_on_elsewhere(tmp_path: Path) -> None:
    four, one = Place(2, 2, 3), Place(1, 1, 1)
    targets = {Place(2, 1, 1, "cpu"): [four], Place(1, 1, 2): [four], Place(1, 2, 3): [four, one], Place(1, 4, 2): [one]}
    assert _matrix([four, one], targets, tmp_path) == 5


@pytest.mark.parametrize("world", [pytest.param(world, marks=LONG) for world in GRIDS])
def test_every_place_goes_on_in_every_other(tmp_path: Path, world: int) -> None:
    """Saved by `world` ranks at stages 1, 2 and 3, each in another grid; with offload and in bf16 into one grid of each world."""
    grids, lasts = [grid for grids in GRIDS.values() for grid in grids], [grids[-1] for grids in GRIDS.values()]
    sources = [Place(*GRIDS[world][stage % len(GRIDS[world])], stage) for stage in (1, 2, 3)]
    offloaded = [replace(place, offload="cpu") for place in sources]
    low = [replace(place, precision="bf16") for place in sources]
    targets = {Place(*grid, stage, offload): [*sources] for grid in grids for stage in (1, 2, 3) for offload in ("none", "cpu")}
    for grid in lasts:
        for stage in (1, 2, 3):
            targets[Place(*grid, stage)] += offloaded
            targets[Place(*grid, stage, "none", "bf16")] = low
    assert _matrix([*sources, *offloaded, *low], targets, tmp_path) == 3 * 36 + 3 * 9 + 3 * 9

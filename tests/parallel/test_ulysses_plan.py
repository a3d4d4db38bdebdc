"""From a recipe with parallel.ulysses to the gradients of a decoder: those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.batch import IGNORE, Batch
from longtrain.errors import KernelError, RecipeError
from longtrain.kernels.local import LocalAttend
from longtrain.models.decoder import Decoder
from longtrain.models.initialise import initialise
from longtrain.parallel.shard import shard_batch
from longtrain.parallel.ulysses import UlyssesLayout, choose_attend
from longtrain.plan import Plan, make_plan
from longtrain.plan.describe import describe
from tests.attention_cases import boundaries, segments
from tests.ring_threads import ThreadExchange, run_ring
from tests.tiny import VOCAB, noise, tiny_recipe

LENGTHS = (5, 22, 1, 17)
LENGTH = sum(LENGTHS)


def plan_of(cp: int, ulysses: int, *overrides: str, device: str = "cpu", sequence_length: int = LENGTH) -> Plan:
    shared = (f"parallel.cp={cp}", f"parallel.ulysses={ulysses}", f"training.sequence_length={sequence_length}")
    return make_plan(tiny_recipe(*shared, f"device={device}", *overrides), cp, device)


def packed() -> Batch:
    """Two rows of several documents, a prime number of tokens more than the layouts split."""
    tokens = torch.tensor(noise(3, 2 * LENGTH, VOCAB)).view(2, LENGTH)
    labels = tokens.roll(-1, 1)
    labels[:, [4, 26, 27, 44]] = IGNORE
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1).contiguous()
    return Batch(tokens, labels, positions, segments((LENGTHS,) * 2, LENGTH), boundaries((LENGTHS,) * 2))


def gradients(plan: Plan, attend: Any, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    model = Decoder(plan.model, attend, plan.recipe.training.activations.value)
    initialise(model, 0)
    model.double()
    shard = shard_batch(packed(), plan.layout, plan.cp, rank, plan.band)
    loss = model(shard.tokens, shard.positions, shard.mask, shard.labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("cp", "ulysses", "mode"), [(2, 2, "none"), (4, 4, "full"), (4, 2, "none"), (4, 2, "selective")])
def test_a_decoder_has_the_gradients_of_one_process(cp: int, ulysses: int, mode: str, layout: str) -> None:
    """Four ranks share two key-value heads in one case."""
    overrides = (f"parallel.layout={layout}", f"training.activations={mode}", "attention.kernel=reference", "model.window=11")
    plan, alone = plan_of(cp, ulysses, *overrides), plan_of(1, 1, *overrides)
    loss, expected = gradients(alone, LocalAttend(alone.kernel.kernel), 0)

    def work(exchange: ThreadExchange) -> tuple[Tensor, dict[str, Tensor]]:
        attend = choose_attend(plan.kernel.kernel, exchange, plan.ring, plan.recipe.parallel.ulysses)
        return gradients(plan, attend, exchange.rank)

    ranks = run_ring(cp, work).results
    torch.testing.assert_close(torch.stack([found for found, _ in ranks]).sum(), loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        total = torch.stack([found[name] for _, found in ranks]).sum(0)
        assert (total - gradient).abs().max() <= 2e-6 * gradient.abs().max().clamp(min=1e-6), name


def test_the_plan_deals_for_groups() -> None:
    plan = plan_of(4, 2)
    assert plan.layout == UlyssesLayout(plan.ring, 2)
    assert plan.padded_length == 48
    assert plan.local_length == 12
    words = dict(describe(plan))
    assert words["ranks"].endswith("dp 1 x cp 4 (Ulysses over 2 in a zigzag ring of 2)")
    assert dict(describe(plan_of(2, 2)))["ranks"].endswith("cp 2 (Ulysses over 2)")
    assert plan_of(4, 1).layout == plan.ring


def test_without_a_ring_the_kernel_sees_the_whole_sequence() -> None:
    """So nothing of it is rounded, and striped layouts need no other band."""
    flash = ("attention.kernel=flash", "training.precision=bf16", "parallel.layout=striped", "model.head_dim=8")
    plan = plan_of(2, 2, *flash, device="cuda")
    assert plan.kernel.kernel.name == "flash"
    assert not plan.kernel.rounds
    with pytest.raises(KernelError, match=r"attention.kernel: flash cannot do this: takes packed documents under"):
        plan_of(2, 1, *flash, device="cuda")


def test_rounded_partial_results_are_taken_by_name_and_told() -> None:
    flash = ("attention.kernel=flash", "training.precision=bf16", "model.head_dim=8")
    plan = plan_of(2, 1, *flash, device="cuda")
    assert plan.kernel.kernel.name == "flash"
    told = [value for what, value in describe(plan) if what == "warning"]
    assert any("kernel flash rounds partial results to bf16 between the blocks of a ring" in line for line in told)
    auto = plan_of(2, 1, "training.precision=bf16", device="cuda")
    assert auto.kernel.kernel.name != "flash"
    assert auto.kernel.others["flash"].startswith("rounds partial results")
    assert not any("rounds partial" in value for what, value in describe(auto) if what == "warning")


@pytest.mark.parametrize(
    ("cp", "ulysses", "overrides", "message"),
    [
        (4, 3, (), r"ulysses.*3 does not divide cp 4"),
        (2, 4, (), r"ulysses.*4 does not divide cp 2"),
        (3, 3, (), r"parallel.ulysses=\d: 4 query heads do not split over 3 ranks"),
        (8, 8, (), r"parallel.ulysses=\d: 4 query heads do not split over 8 ranks"),
        (
            4,
            4,
            ("model.heads=12", "model.kv_heads=6", "model.hidden_size=48"),
            r"parallel.ulysses=4: 6 key-value heads neither split over 4 ranks nor does each go to equally many",
        ),
    ],
)
def test_refused_by_field(cp: int, ulysses: int, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(cp, ulysses, *overrides)

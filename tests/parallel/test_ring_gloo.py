"""The ring over real processes and a real network stack."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist

from longtrain.attention import Band, SequenceLayout
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.exchange import ProcessGroupExchange
from longtrain.parallel.ring import RingAttend
from tests.attention_cases import Case
from tests.distributed import run_ranks
from tests.parity import assert_results_close, naive_attention, results

PACKED = ((20, 1, 0, 24, 15), (33, 27))
"""Documents of 61 positions, the last one of row 1 padding; the layouts pad further."""

CASES = (
    Case(Band.causal(), 48),
    Case(Band.full(), 48, heads=4, value_dim=6),
    Case(Band.causal(), 61, q_documents=PACKED, heads=4),
    Case(Band.causal(7), 61, q_documents=PACKED),
    Case(Band.causal(13), 48, heads=4, kv_heads=1, alibi=True, softcap=2.0),
    Case(Band.causal(), 61, q_documents=PACKED, dropout=0.3, alibi=True),
    Case(Band.causal(), 61, q_documents=((), (1,))),
    Case(Band.full(), 24, 48, q_documents=((10, 14), (20,)), k_documents=((30, 5), (1, 40))),
    Case(Band(3, 9), 48),
    Case(Band.causal(13), 61, q_documents=PACKED, heads=4, dropout=0.3, alibi=True, softcap=2.0, sinks=True),
)


@pytest.mark.parametrize(("dp", "cp"), [(1, 2), (1, 3), (1, 4), (2, 2)])
def test_equals_dense_attention(dp: int, cp: int) -> None:
    """dp 2 x cp 2: two rings at once, each over some ranks of the world."""
    run_ranks(check_all, dp * cp, dp=dp, cp=cp)


def check_all(ctx: ParallelContext) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    exchange = ProcessGroupExchange(ctx.cp_group)
    assert (exchange.rank, exchange.size) == (ctx.cp_rank, ctx.cp)
    for case, layout in product(CASES, SequenceLayout):
        case = replace(case, seed=ctx.dp_rank)
        check(case, layout, ctx.cp_group, torch.float64)
    for layout in SequenceLayout:
        for case in (CASES[2], CASES[-1]):
            check(case, layout, ctx.cp_group, torch.bfloat16)


def check(case: Case, layout: SequenceLayout, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
    exchange = ProcessGroupExchange(group)
    t = case.tensors(dtype)
    exact = case.in_dtype(t, torch.float64)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout, exact.dlse)
    plain = results(naive_attention, t[:3], t.mask, t.spec, t.dout, t.dlse)

    def mine(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        missing = layout.padded_length(x.shape[dim], exchange.size) - x.shape[dim]
        padding = torch.zeros_like(x.narrow(dim, 0, 1)).repeat_interleave(missing, dim)
        return layout.shard(torch.cat([x, padding], dim), exchange.size, exchange.rank, dim)

    kernel = MemoryEfficientKernel(8, 16) if case.heads == 4 else ReferenceKernel()
    attend = RingAttend(kernel, exchange, layout).with_lse
    shards = [mine(x.detach(), dim) for x, dim in zip(t[:5], (1, 1, 1, 1, 2), strict=True)]
    ring, again = (results(attend, shards[:3], t.mask, t.spec, *shards[3:]) for _ in range(2))
    for name, value in ring.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
        noise = 1e-12 if dtype == torch.float64 else None
        if name == "dsinks":  # of the rows of each rank
            parts = [torch.empty_like(value) for _ in range(exchange.size)]
            dist.all_gather(parts, value, group=group)
            assert_results_close({name: torch.stack(parts).sum(0)}, {name: truth[name]}, {name: plain[name]}, noise)
            continue
        dim = 2 if name == "lse" else 1
        expected, low = (mine(whole[name], dim) for whole in (truth, plain))
        if name == "lse":  # padding sees nothing but the sinks
            blind = torch.tensor(-torch.inf) if t.spec.sinks is None else t.spec.sinks.detach()[:, None].to(value.dtype)
            seen = mine(torch.ones_like(truth["lse"], dtype=torch.int8), 2).bool()
            assert torch.equal(value[~seen], blind.expand_as(value)[~seen].to(value.dtype))
            value, expected, low = (x.masked_fill(~seen, -torch.inf) for x in (value, expected, low))
        assert_results_close({name: value}, {name: expected}, {name: low}, noise)

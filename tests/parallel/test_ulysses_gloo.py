"""Ulysses and Ulysses in a ring over real processes and a real network stack."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist

from longtrain.attention import Band, SequenceLayout
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.exchange import ProcessGroupExchange
from longtrain.parallel.ulysses import UlyssesLayout, choose_attend
from tests.attention_cases import Case
from tests.distributed import run_ranks
from tests.parity import assert_results_close, naive_attention, results

CASES = (
    Case(Band.causal(), 48, heads=4, kv_heads=4),
    Case(Band.causal(7), 48, heads=8, kv_heads=2, q_documents=((20, 1, 0, 24), (33, 15)), sinks=True),
    Case(Band.causal(), 48, heads=4, kv_heads=1, alibi=True, softcap=2.0),
    Case(Band.full(), 24, 48, heads=4, kv_heads=2, value_dim=6),
)


@pytest.mark.parametrize(("dp", "cp", "size"), [(1, 2, 2), (1, 4, 4), (1, 4, 2), (2, 2, 2)])
def test_equals_dense_attention(dp: int, cp: int, size: int) -> None:
    run_ranks(check_all, dp * cp, size, dp=dp, cp=cp)


def check_all(ctx: ParallelContext, size: int) -> None:
    exchange = ProcessGroupExchange(ctx.cp_group)
    for case, layout, dtype in product(CASES, SequenceLayout, (torch.float64, torch.bfloat16)):
        dealt = UlyssesLayout(layout, size)
        t = case.tensors(dtype)
        exact = case.in_dtype(t, torch.float64)
        truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout, exact.dlse)
        plain = results(naive_attention, t[:3], t.mask, t.spec, t.dout, t.dlse)
        attend = choose_attend(MemoryEfficientKernel(8, 16), exchange, layout, size)
        dims = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}
        shards = [dealt.shard(x.detach(), exchange.size, exchange.rank, dim) for x, dim in zip(t[:5], (1, 1, 1, 1, 2), strict=True)]
        got, again = (results(attend.with_lse, shards[:3], t.mask, t.spec, *shards[3:]) for _ in range(2))  # type: ignore[attr-defined]
        assert all(torch.equal(got[name], again[name]) for name in got)
        if "dsinks" in got:  # of the rows of each rank
            dist.all_reduce(got["dsinks"], group=ctx.cp_group)
        for name, value in got.items():
            expected, low = (
                dealt.shard(x[name], exchange.size, exchange.rank, dims[name]) if name in dims else x[name] for x in (truth, plain)
            )
            assert_results_close({name: value}, {name: expected}, {name: low}, 1e-12 if dtype == torch.float64 else None)

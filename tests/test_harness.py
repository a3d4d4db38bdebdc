"""The tools of the tests fail when they should."""

from __future__ import annotations

import pytest
import torch

from longtrain.attention import Band
from longtrain.attention.reference import ReferenceKernel
from tests.attention_cases import Case, check_kernel
from tests.parity import assert_close_to_truth
from tests.ring_threads import ThreadExchange, run_ring


def test_parity_knows_a_wrong_result() -> None:
    truth = torch.randn(64, 64)
    low = truth.bfloat16()
    assert_close_to_truth(low, truth, low)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close_to_truth(low + torch.eye(64).bfloat16() / 4, truth, low)
    with pytest.raises(AssertionError, match="rms error"):
        assert_close_to_truth(truth + 0.012 * truth.sign(), truth, low, noise=0.0)
    with pytest.raises(AssertionError, match="NaN"):
        assert_close_to_truth(low.index_fill(0, torch.tensor([3]), torch.nan), truth, low)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_close_to_truth(low.index_fill(0, torch.tensor([3]), -torch.inf), truth, low)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["dq", "dk", "dv", "dbias"])
def test_a_kernel_with_a_wrong_gradient_fails(gradient: str, dtype: torch.dtype) -> None:
    class Wrong(ReferenceKernel):
        def backward(self, *args, **kwargs):
            grads = super().backward(*args, **kwargs)
            return grads._replace(**{gradient: getattr(grads, gradient) * 1.02})

    case = Case(Band.causal(), 64, heads=2, kv_heads=1, bias="matrix")
    check_kernel(ReferenceKernel(), case, dtype)
    with pytest.raises(AssertionError, match=gradient):
        check_kernel(Wrong(), case, dtype)


def test_a_ring_passes_parcels_in_order() -> None:
    def work(exchange: ThreadExchange) -> list[float]:
        buffers = [torch.empty(1) for _ in range(4)]
        to, source = (exchange.rank + 1) % 3, (exchange.rank - 1) % 3
        mine = [torch.tensor([10.0 * exchange.rank + i]) for i in range(4)]
        first = exchange.start([(to, t) for t in mine[:2]], [(source, t) for t in buffers[:2]])
        second = exchange.start([(to, t) for t in mine[2:]], [(source, t) for t in buffers[2:]])
        first.wait()
        assert all(b.isnan() for b in buffers[2:])
        second.wait()
        return [b.item() for b in buffers]

    done = run_ring(3, work)
    assert done.messages == 12
    assert done.results == [[20, 21, 22, 23], [0, 1, 2, 3], [10, 11, 12, 13]]


def test_a_ring_reports_what_goes_wrong() -> None:
    def exchange_once(send: torch.Tensor | None, buffer: torch.Tensor | None, spoil: bool = False):
        def work(exchange: ThreadExchange) -> None:
            if exchange.rank == 0:
                transfer = exchange.start([(1, send)] if send is not None else [], [])
                if spoil and send is not None:
                    send.zero_()
                transfer.wait()
            else:
                exchange.start([], [(0, buffer)] if buffer is not None else []).wait()

        return work

    four, five = torch.ones(4), torch.ones(5)
    run_ring(2, exchange_once(four, four.clone()))
    with pytest.raises(AssertionError, match=r"never received.*\(0, 1\): 1"):
        run_ring(2, exchange_once(four, None))
    with pytest.raises(AssertionError, match=r"sent \(4,\), expected \(5,\)"):
        run_ring(2, exchange_once(four, five))
    with pytest.raises(AssertionError, match=r"sent torch\.float32, expected torch.float64"):
        run_ring(2, exchange_once(four, four.double()))
    with pytest.raises(AssertionError, match="must be contiguous"):
        run_ring(2, exchange_once(torch.ones(4, 4).t(), four))
    with pytest.raises(AssertionError, match="written to while it was being sent"):
        run_ring(2, exchange_once(torch.ones(4), four, spoil=True))


def test_a_failing_rank_ends_the_ring() -> None:
    def work(exchange: ThreadExchange) -> None:
        if exchange.rank == 2:
            raise KeyError("mine")
        exchange.start([], [((exchange.rank + 1) % 3, torch.empty(1))]).wait()

    with pytest.raises(KeyError, match="mine") as error:
        run_ring(3, work)
    assert error.value.__notes__ == ["on rank 2 of 3"]


def test_a_parcel_that_nobody_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ring_threads.TIMEOUT", 0.2)
    with pytest.raises(TimeoutError, match="nobody sent"):
        run_ring(2, lambda exchange: exchange.start([], [(1 - exchange.rank, torch.empty(1))]).wait())

"""A decoder block on the Triton kernels, compiled by inductor: one graph, no worse than eager code."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.attention import AttentionMask, AttentionSpec, Band
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.layers import choose_layers, fusable
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.one_call import attention
from longtrain.models import Decoder, ModelConfig, initialise
from tests.attention_cases import Case, boundaries, segments
from tests.parity import assert_close_to_truth, assert_results_close, naive_attention, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PACKED = ((500, 1, 0, 470), (1000,))
LENGTH = 1000


class Plain:
    """Textbook attention as an Attend."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, spec: AttentionSpec | None = None, *, keep: object = None
    ) -> Tensor:
        return naive_attention(q, k, v, mask, spec or AttentionSpec())[0]


def decoder(attend: Any, dtype: torch.dtype, fused: Collection[str] = ()) -> Decoder:
    """The same numbers, rounded to bf16, in `dtype`."""
    config = ModelConfig(
        family="llama",
        vocab_size=7,
        hidden_size=512,
        layers=1,
        heads=8,
        kv_heads=2,
        head_dim=64,
        intermediate_size=1024,
        max_positions=LENGTH,
        init_std=0.05,
    )
    model = Decoder(config, attend, layers=choose_layers(fused))
    initialise(model, seed=1)
    return model.to("cuda", torch.bfloat16).to(dtype)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("band", [Band.causal(), Band.causal(300)])
def test_a_compiled_decoder_block_is_one_graph(band: Band, packed: bool, fused: bool) -> None:
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    ids = segments(PACKED, LENGTH).cuda() if packed else None
    mask = AttentionMask(band, ids, ids, boundaries(PACKED) if packed else None)
    rounded = torch.randn(2, LENGTH, 512, device="cuda").bfloat16()
    cotangent = torch.randn(2, LENGTH, 512, device="cuda").bfloat16()
    positions = torch.arange(LENGTH, device="cuda").expand(2, LENGTH)

    def run(model: Decoder, dtype: torch.dtype, compiled: bool = False) -> dict[str, Tensor]:
        block, x = model.blocks[0], rounded.to(dtype).requires_grad_()
        forward = torch.compile(block, fullgraph=True) if compiled else block
        wanted = {"x": x} | dict(block.named_parameters())
        y = forward(x, model.positions(x, positions)[1], mask)
        return {"y": y.detach()} | dict(
            zip(wanted, torch.autograd.grad(y, tuple(wanted.values()), cotangent.to(dtype)), strict=True)
        )

    truth = run(decoder(Plain(), torch.float32), torch.float32)
    model = decoder(LocalAttend(FlashKernel()), torch.bfloat16, fusable("cuda") if fused else ())
    eager, compiled = run(model, torch.bfloat16), run(model, torch.bfloat16, compiled=True)
    for name, value in truth.items():
        assert_close_to_truth(compiled[name], value, eager[name], name)


@pytest.mark.parametrize(
    "case",
    [
        Case(Band.causal(), 333, None, 2, 4, 2, 64),
        Case(Band.causal(100), 333, None, 2, 4, 2, 64, 80, ((200, 1, 100), (333,)), None, 0.4, 2.0, True, "heads", 0.2, sinks=True),
    ],
)
def test_compiled_attention_is_eager_attention(case: Case) -> None:
    torch.compiler.reset()
    t = case.tensors(torch.bfloat16, "cuda")
    attend = LocalAttend(FlashKernel()).with_lse
    eager = results(attend, t[:3], t.mask, t.spec, t.dout, t.dlse)
    compiled = results(torch.compile(attend, fullgraph=True), t[:3], t.mask, t.spec, t.dout, t.dlse)
    exact = case.in_dtype(t, torch.float32)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout, exact.dlse)
    assert_results_close(compiled, truth, eager)


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_one_call_is_one_graph_for_all_lengths(kernel: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True)
    for at, length in enumerate((333, 500, 801)):
        case = Case(Band.causal(100), length, None, 2, 4, 2, 64, q_documents=((200, 1, length - 201), (length,)))
        t = case.tensors(torch.bfloat16, "cuda")
        q, k, v = (x.requires_grad_() for x in (t.q, t.k, t.v))
        with torch.compiler.set_stance("fail_on_recompile" if at > 1 else "default"):
            found, expected = (call(q, k, v, t.mask, t.spec, kernel=kernel) for call in (compiled, attention))
            grads = [torch.autograd.grad(out, (q, k, v), t.dout) for out in (found, expected)]
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

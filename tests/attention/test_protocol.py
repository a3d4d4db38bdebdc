from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtrain.attention import AttentionMask, AttentionSpec, Band, Block
from longtrain.attention.protocol import check_inputs
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError
from longtrain.kernels.local import LocalAttend
from tests.attention_cases import Case

GOOD = Case(Band.causal(), 6, 5, 2, 4, 2, 8, 3, ((6,), (2, 3)), ((5,), (1,)), alibi=True, bias="whole", dropout=0.1)
ATTENDS = {"eager": LocalAttend(ReferenceKernel()), "compiled": torch.compile(LocalAttend(ReferenceKernel()), backend="eager")}


def ids(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


WRONG = {
    "heads": (
        {"k": torch.zeros(2, 5, 3, 8), "v": torch.zeros(2, 5, 3, 3)},
        "q is [2, 6, 4, 8], k [2, 5, 3, 8]: 4 heads are no multiple of 3",
    ),
    "no key heads": ({"k": torch.zeros(2, 5, 0, 8), "v": torch.zeros(2, 5, 0, 3)}, "4 heads are no multiple of 0"),
    "more key heads": ({"k": torch.zeros(2, 5, 8, 8), "v": torch.zeros(2, 5, 8, 3)}, "4 heads are no multiple of 8"),
    "width": ({"k": torch.zeros(2, 5, 2, 16)}, "k is [2, 5, 2, 16], must be [2, 5, 2, 8]: q is [2, 6, 4, 8], k [2, 5, 2, 16]"),
    "batch of k": ({"k": torch.zeros(1, 5, 2, 8)}, "k is [1, 5, 2, 8], must be [2, 5, 2, 8]"),
    "batch of v": ({"v": torch.zeros(3, 5, 2, 3)}, "v is [3, 5, 2, 3], must be [2, 5, 2, 3]"),
    "length of v": ({"v": torch.zeros(2, 4, 2, 3)}, "v is [2, 4, 2, 3], must be [2, 5, 2, 3]"),
    "heads of v": ({"v": torch.zeros(2, 5, 4, 3)}, "v is [2, 5, 4, 3], must be [2, 5, 2, 3]"),
    "one slope": ({"alibi_slopes": torch.ones(1)}, "alibi_slopes is [1], must be [4]"),
    "one seed": ({"dropout_seed": ids(1, dtype=torch.int64)}, "dropout_seed is [1], must be [2]"),
    "one row of segments": ({"q_segments": ids(1, 6)}, "q_segments is [1, 6], must be [2, 6]"),
    "short segments": ({"q_segments": ids(2, 5)}, "q_segments is [2, 5], must be [2, 6]"),
    "long segments of keys": ({"k_segments": ids(2, 6)}, "k_segments is [2, 6], must be [2, 5]"),
    "int64 segments": ({"k_segments": ids(2, 5, dtype=torch.int64)}, "k_segments are torch.int64, must be torch.int32"),
    "wide bias": ({"bias": torch.zeros(6, 6)}, "bias is [6, 6], must broadcast to [2, 4, 6, 5]"),
    "two dtypes": (
        {"v": torch.zeros(2, 5, 2, 3).bfloat16()},
        "q is torch.float32, k torch.float32, v torch.bfloat16: give them one",
    ),
    "a mask as a bias": ({"bias": torch.ones(6, 5, dtype=torch.bool)}, "bias is torch.bool, must be torch.float16, "),
    "no width": ({"q": torch.zeros(2, 6, 4, 0), "k": torch.zeros(2, 5, 2, 0)}, "q is [2, 6, 4, 0]: a width of 0 gives no scores"),
    "sinks": ({"sinks": torch.zeros(3)}, "sinks is [3], must be [4]"),
    "deep bias": ({"bias": torch.zeros(1, 2, 4, 6, 5)}, "bias is [1, 2, 4, 6, 5], must broadcast to [2, 4, 6, 5]"),
}
ELSEWHERE = {
    "k": ({"k": torch.zeros(2, 5, 2, 8, device="meta")}, "k is on meta, q on cpu: give both on one device"),
    "bias": ({"bias": torch.zeros(6, 5, device="meta")}, "bias is on meta, q on cpu"),
    "sinks": ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta, q on cpu"),
    "segments": ({"k_segments": ids(2, 5).to("meta")}, "k_segments is on meta, q on cpu: mask.to(device) moves it"),
}


def problem(changes: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, AttentionMask, AttentionSpec]:
    t = GOOD.tensors(torch.float32)
    given = {"q": t.q, "k": t.k, "v": t.v, **changes}
    mask = replace(t.mask, **{name: x for name, x in changes.items() if name.endswith("segments")})
    spec = replace(t.spec, **{name: x for name, x in changes.items() if hasattr(t.spec, name)})
    return given["q"], given["k"], given["v"], mask, spec


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("attend", ATTENDS)
def test_shapes_that_do_not_belong_together(attend: str, name: str) -> None:
    """Refused before any kernel, eager and compiled, with the name of the tensor."""
    torch._dynamo.reset()  # too many compilations, and it runs eagerly
    check_refused(attend, *WRONG[name])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_devices_that_do_not_belong_together(name: str) -> None:
    """The device meta stands for another one; of it, a compiled operator would run nothing."""
    check_refused("eager", *ELSEWHERE[name])


def check_refused(attend: str, changes: dict[str, Tensor], message: str) -> None:
    assert ATTENDS[attend](*problem({})).shape == (2, 6, 4, 3)
    with pytest.raises(KernelError) as error:
        ATTENDS[attend](*problem(changes))
    assert str(error.value).startswith("attention: ")
    assert message in str(error.value)


def test_a_tensor_of_three_dimensions() -> None:
    _, k, v, mask, spec = problem({})
    with pytest.raises(KernelError, match=r"attention: q is \[2, 6, 8\], must be \[batch, tokens, heads, width\]"):
        ATTENDS["eager"](torch.zeros(2, 6, 8), k, v, mask, spec)


def test_shapes_are_read_without_data() -> None:
    """Tensors of no device, which reading would fail on, as it would wait for a GPU."""
    q, k, v, mask, spec = problem({})
    given = {"bias": torch.empty(4, 1, 5), "dropout_seed": torch.empty(2, dtype=torch.int64), "alibi_slopes": torch.empty(4)}
    spec = replace(spec, **{name: x.to("meta") for name, x in given.items()})
    block = Block.of(mask.to("meta"))
    q, k, v = (x.to("meta") for x in (q, k, v))
    check_inputs(q, k, v, spec, block)
    with pytest.raises(KernelError, match="v is"):
        check_inputs(q, k, v[:, 1:], spec, block)

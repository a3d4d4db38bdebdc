"""What the four modes keep, how often attention runs, and that gradients do not notice."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain.attention import AttentionMask, Band, Block, Grads, Keep, Partial
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.language import interprets
from longtrain.kernels.layers import choose_layers
from longtrain.kernels.local import LocalAttend
from longtrain.models import Activations, Decoder, ModelConfig, held_bytes
from longtrain.models.activations import KeptProduct

MODES = list(Activations)


class CountingKernel(ReferenceKernel):
    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def forward(self, *args, **kwargs) -> Partial:
        self.forwards += 1
        return super().forward(*args, **kwargs)

    def backward(self, *args, **kwargs) -> Grads:
        self.backwards += 1
        return super().backward(*args, **kwargs)


class ContiguousKernel(ReferenceKernel):
    """Returns memory laid out as its shape, as fast kernels do; the reference's transposed output is copied by what follows."""

    def forward(self, *args, **kwargs) -> Partial:
        out, lse = super().forward(*args, **kwargs)
        return Partial(out.contiguous(), lse)


class Storages(TorchDispatchMode):
    """Weak references to every storage that an operation returned, with its size, but for those known before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.known:
                    self.seen[reference.cdata] = (reference, storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def gradients(model: Decoder, batch: tuple[Tensor, Tensor, AttentionMask, Tensor]) -> dict[str, Tensor]:
    loss = model(*batch)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_bitwise_equal(config: ModelConfig, build: Callable, plain_batch: Callable, mode: Activations) -> None:
    batch = plain_batch(config)
    expected = gradients(build(config), batch)
    actual = gradients(build(config, mode), batch)
    assert len(expected) == len(dict(build(config).named_parameters())) + 1
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.parametrize(("mode", "runs"), [("none", 1), ("selective", 1), ("full", 1), ("minimal", 2)])
def test_how_often_attention_runs(small: ModelConfig, build: Callable, plain_batch: Callable, mode: str, runs: int) -> None:
    kernel = CountingKernel()
    model = build(small, mode, LocalAttend(kernel))
    loss = model(*plain_batch(small))
    assert kernel.forwards == small.layers
    loss.backward()
    assert (kernel.forwards, kernel.backwards) == (runs * small.layers, small.layers)
    with torch.no_grad():
        model(*plain_batch(small))
    assert kernel.forwards == (runs + 1) * small.layers


@pytest.mark.parametrize("mode", MODES)
def test_products_are_computed_once_where_they_are_kept(
    small: ModelConfig, build: Callable, plain_batch: Callable, mode: Activations
) -> None:
    """Every matrix product of the backward, recomputation included, counted by shape of its result."""

    class Count(TorchDispatchMode):
        forward_products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            weights = {p.data_ptr() for block in model.blocks for p in block.attention.parameters()}
            transposed = func.overloadpacket == torch.ops.aten.mm and args[1].stride(0) == 1
            if transposed and args[1].data_ptr() in weights:
                self.forward_products += 1
            return func(*args, **(kwargs or {}))

    model = build(small, mode)
    loss = model(*plain_batch(small))
    with Count() as count:
        loss.backward()
    again = {Activations.NONE: 0, Activations.SELECTIVE: 0, Activations.FULL: 4, Activations.MINIMAL: 4}[mode]
    assert count.forward_products == again * small.layers


def bytes_held(config: ModelConfig, build: Callable, batch: tuple, mode: Activations, dtype: torch.dtype) -> int:
    model = build(config, mode, LocalAttend(ContiguousKernel())).to(dtype)
    with no_garbage_collection(), Storages([*model.parameters(), *batch[:2], batch[3]]) as storages:
        loss = model(*batch)
        held = storages.alive()
        loss.backward()
        model.zero_grad(set_to_none=True)
        left = storages.alive()
    assert left == loss.nbytes, "a cycle keeps memory until the garbage collector runs"
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_held_by_a_block(
    small: ModelConfig, build: Callable, plain_batch: Callable, mode: Activations, dtype: torch.dtype
) -> None:
    config = replace(small, tied_embeddings=True)
    batch = plain_batch(config, length=33)
    two, four = (bytes_held(replace(config, layers=layers), build, batch, mode, dtype) for layers in (2, 4))
    assert (four - two) / 2 == held_bytes(config, mode, batch[0].numel(), dtype.itemsize)


def bytes_saved(model: Decoder, batch: tuple) -> int:
    """Of all tensors that autograd holds after a forward, but for parameters. What Triton's interpreter leaves is not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*batch)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.skipif(not interprets(), reason="kernels run on CPUs in Triton's interpreter only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [("norm",), ("mlp",), ("norm", "rotary", "mlp")])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bytes_held_by_a_fused_block(
    small: ModelConfig, build: Callable, plain_batch: Callable, family: str, fused: tuple[str, ...], dtype: torch.dtype
) -> None:
    if family == "opt" and "norm" not in fused and dtype is torch.bfloat16:
        pytest.skip("on CPUs, plain LayerNorm keeps its statistics in bf16")
    config = replace(small, tied_embeddings=True, family=family)
    batch = plain_batch(config, length=9)
    attend, layers = LocalAttend(ContiguousKernel()), choose_layers(fused)
    two, four = (bytes_saved(build(replace(config, layers=n), "none", attend, layers).to(dtype), batch) for n in (2, 4))
    assert (four - two) / 2 == held_bytes(config, Activations.NONE, batch[0].numel(), dtype.itemsize, fused)


def test_bytes_held_by_a_block_of_opt(small: ModelConfig, build: Callable, plain_batch: Callable) -> None:
    config = replace(small, tied_embeddings=True, family="opt")
    batch = plain_batch(config)
    for mode in MODES:
        two, four = (bytes_held(replace(config, layers=layers), build, batch, mode, torch.float32) for layers in (2, 4))
        assert (four - two) / 2 == held_bytes(config, mode, batch[0].numel(), 4)


def test_modes_are_ordered_by_what_they_hold(small: ModelConfig) -> None:
    for itemsize in (2, 4):
        held = [held_bytes(small, mode, 100, itemsize) for mode in MODES]
        assert MODES == ["none", "selective", "full", "minimal"]
        assert held == sorted(set(held), reverse=True)


def test_a_block_with_frozen_parameters(small: ModelConfig, build: Callable, plain_batch: Callable) -> None:
    batch = plain_batch(small)
    results = []
    for mode in MODES:
        model = build(small, mode)
        model.embedding.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
        model.blocks[1].attention.key.requires_grad_(False)
        results.append(gradients(model, batch))
    names = results[0].keys()
    assert not any(name.startswith(("embedding", "blocks.0", "blocks.1.attention.key")) for name in names)
    for result in results[1:]:
        assert result.keys() == names
        assert all(torch.equal(result[name], results[0][name]) for name in names)


def test_kept_product_is_a_linear_layer() -> None:
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(lambda *args: KeptProduct.apply(*args, Keep(), "product"), (x, weight, bias))
    keep = Keep()
    first = KeptProduct.apply(x, weight, bias, keep, "product")
    torch.testing.assert_close(first, torch.nn.functional.linear(x, weight, bias))
    again = KeptProduct.apply(x + 1, weight, bias, keep, "product")
    assert torch.equal(first, again), "the second run recalls"


def test_unknown_mode(small: ModelConfig) -> None:
    with pytest.raises(ValueError, match="sometimes"):
        Decoder(small, LocalAttend(ReferenceKernel()), "sometimes")


def test_a_mask_with_documents_is_seen_in_the_recomputation(small: ModelConfig, build: Callable) -> None:
    tokens = torch.randint(small.vocab_size, (1, 12))
    segments = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2], dtype=torch.int32)
    positions = torch.tensor([[*range(5), *range(5), 0, 0]])
    labels = tokens.masked_fill(segments == -1, -100)
    batch = (tokens, positions, AttentionMask(Band.causal(), segments, segments, ((0, 5, 10),)), labels)
    results = [gradients(build(small, mode), batch) for mode in MODES]
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)
    assert all(torch.isfinite(gradient).all() for gradient in results[0].values())
    assert Block.of(batch[2]).q_segments is segments

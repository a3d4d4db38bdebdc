"""Which attention kernels there are, what each can do, and which one to take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from longtrain.attention.mask import Band
from longtrain.attention.protocol import AttentionKernel, Needs, band_kind
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.measured import measured
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.kernels.vendor import CudnnKernel, FlashAttention2Kernel

AUTO = "auto"

_VENDOR = "its gradients differ from run to run in the last bits: ask for it by name"
BY_NAME: dict[str, str] = {
    "cudnn": _VENDOR,
    "flash": _VENDOR,
}
"""Kernels that `auto` leaves alone, and why."""


def kernels() -> tuple[AttentionKernel, ...]:
    """Every kernel; which is the fastest stands in `kernels.measured`."""
    return (FlashKernel(), CudnnKernel(), FlashAttention2Kernel(), MemoryEfficientKernel(), ReferenceKernel())


def kinds_of(bands: Iterable[Band]) -> frozenset[str]:
    """The block kinds of a schedule, for `Needs`."""
    return frozenset(band_kind(band) for band in bands)


@dataclass(frozen=True)
class Choice:
    """The kernel taken, and for every other one why not. rounds: its partial results in a ring are of the inputs' precision, where
    fp32 was needed."""

    kernel: AttentionKernel
    others: dict[str, str]
    rounds: bool = False


def unknown(wanted: str, names: Iterable[str], setting: str) -> KernelError:
    """That no kernel has this name. setting: what was set to it."""
    return KernelError(f"{setting}: there is no kernel {wanted!r}; there are: {', '.join((AUTO, *names))}")


def select(
    needs: Needs,
    wanted: str = AUTO,
    candidates: tuple[AttentionKernel, ...] | None = None,
    *,
    setting: str = "attention.kernel",
) -> Choice:
    """The fastest kernel (`kernels.measured`) that can do all that `needs` holds. Asking by name never falls back, and
    accepts partial results that are not fp32. setting: what the caller calls `wanted`, for the messages.

    Raises KernelError with every kernel's reasons where none can, or where the wanted one cannot.
    """
    candidates = kernels() if candidates is None else candidates
    by_name, strict = {kernel.name: kernel for kernel in candidates}, needs
    if wanted != AUTO:
        needs = replace(needs, fp32_partials=False)
    reasons = {name: kernel.refuses(needs) for name, kernel in by_name.items()}
    if wanted != AUTO and wanted not in by_name:
        raise unknown(wanted, by_name, setting)
    if wanted != AUTO and reasons[wanted]:
        able = [name for name, why in reasons.items() if not why]
        hint = f"; set {setting} to {' or '.join([AUTO, *able])}" if able else ""
        raise KernelError(f"{setting}: {wanted} cannot do this: {'; '.join(reasons[wanted])}{hint}")
    if wanted == AUTO:
        reasons = {name: why or ([BY_NAME[name]] if name in BY_NAME else []) for name, why in reasons.items()}
    order = measured(needs)
    rank = {name: place for place, name in enumerate(order.order)}
    able = sorted((name for name, why in reasons.items() if not why), key=lambda name: rank.get(name, len(rank)))
    if not able:
        raise KernelError("no attention kernel can do this:\n" + "\n".join(f"  {n}: {'; '.join(w)}" for n, w in reasons.items()))
    taken = able[0] if wanted == AUTO else wanted
    others = {}
    for name, why in reasons.items():
        if name != taken:
            others[name] = "; ".join(why) or (order.behind(name, taken) if wanted == AUTO else f"able, but {taken} was asked for")
    return Choice(by_name[taken], others, rounds=needs != strict and bool(by_name[taken].refuses(strict)))

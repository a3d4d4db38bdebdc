"""Linear layer and cross entropy in Triton: products by torch, everything between them in two passes over 16-bit scores.

Three products a token and vocabulary entry, logits are not recomputed. A panel of tokens goes through the vocabulary twice: first
logits (fp32) -> log-sum-exp, and scores below their maximum kept in 16 bits (fp32 for fp32 inputs); then scores -> dlogits -> dx,
dW. The first panel keeps its scores in the memory of dW, which nothing has been written to yet: a block of 2 C 16-bit scores a
vocabulary entry is just as large as C fp32 gradients. So up to 2 C tokens, dW is written once.

Why this order, by arithmetic for an H100 (3 TB/s, 700 TFLOP/s, bf16; 8K tokens, hidden 4096, vocabulary 128K: 37.7 ms of
products). This one: 10 bytes a logit beside the products 3.6 ms, sums of dx 0.4, scaling and rounding dW 1.1: 43 ms expected.
Chunks of 2048 tokens with fp32 logits: dW (2 GiB) read and written by each, up to 5 ms more; of 1024, 11 ms. Recomputed logits
(Wijmans et al. 2024, Cut Cross-Entropy): 12.6 ms more for the fourth product. bf16 logits (Hsu et al. 2024, Liger Kernel) are
smaller but wrong by up to 0.03 at 10; scores below the maximum round to a relative 2^-12 a unit, where probability is. The label's
score stays fp32: its gradient is large wherever it lies, also where a soft-cap saturates.

Legend: i_ program index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride of rows; rows are tokens, columns vocabulary
entries, padded so that rows start aligned. Statistics are [blocks of columns, rows].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.batch import IGNORE
from longtrain.kernels.flash.common import tanh
from longtrain.kernels.language import constexpr, jit, tl
from longtrain.kernels.products import product_

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IGNORED = tl.constexpr(IGNORE)
LOWEST = tl.constexpr(-65504.0)
DYNAMIC = ["rows", "first", "column", "columns"]


@jit(do_not_specialize=DYNAMIC)
def scores_kernel(
    p_logits, p_scores, p_labels, p_maxima, p_lse, p_sums, p_targets, s_logits, s_scores, rows, first, column, columns, padded,
    softcap, SOFTCAP: constexpr, SMOOTH: constexpr, STORE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Of BLOCK logits of a row: maximum, log-sum-exp, sum, the label's score where it is among them, and scores - maximum.
    `column` is the vocabulary entry of the first of `columns` logits, `first` the first block's row in the statistics."""
    i_r, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < columns
    p_row = p_logits + i_r * s_logits
    b_s = tl.load(p_row + o_c, mask=o_c < padded, other=0.0)
    if SOFTCAP:
        b_s = softcap * tanh(b_s / softcap)
    o_s = (first + i_b).to(tl.int64) * rows + i_r
    if SMOOTH:
        tl.store(p_sums + o_s, tl.sum(tl.where(m_c, b_s, 0.0)))
    b_s = tl.where(m_c, b_s, -float("inf"))
    maximum = tl.max(b_s)
    b_d = b_s - maximum
    tl.store(p_maxima + o_s, maximum)
    tl.store(p_lse + o_s, maximum + tl.log(tl.sum(tl.exp(b_d))))
    o_l = tl.load(p_labels + i_r) - column
    if (o_l >= i_b * BLOCK) & (o_l < tl.minimum((i_b + 1) * BLOCK, columns)):
        target = tl.load(p_row + o_l)
        if SOFTCAP:
            target = softcap * tanh(target / softcap)
        tl.store(p_targets + i_r, target)
    if STORE:
        b_d = tl.maximum(b_d, LOWEST).to(p_scores.dtype.element_ty)
        tl.store(p_scores + i_r * s_scores + o_c, b_d, mask=o_c < padded)


@jit(do_not_specialize=DYNAMIC)
def dlogits_kernel(
    p_scores, p_dlogits, p_labels, p_maxima, p_lse, p_targets, s_scores, rows, first, column, columns, padded, softcap, z_loss,
    hit, spread, SOFTCAP: constexpr, SMOOTH: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """(softmax (1 + 2 z_loss lse) - hit [label] - spread) times the soft-cap's slope, 0 in rows without loss. May be in place."""
    i_r, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < padded
    label = tl.load(p_labels + i_r)
    maximum = tl.load(p_maxima + (first + i_b).to(tl.int64) * rows + i_r)
    lse = tl.load(p_lse + i_r)
    b_d = tl.load(p_scores + i_r * s_scores + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_g = tl.exp(b_d + (maximum - lse)) * (1.0 + 2.0 * z_loss * lse)
    if SMOOTH:
        b_g -= spread
    o_l = label - column
    o_l = tl.where((o_l >= 0) & (o_l < columns), o_l, -1).to(tl.int32)
    b_g = tl.where(o_c == o_l, b_g - hit, b_g)
    if SOFTCAP:
        # 1 - t^2 cancels near the cap: from a score of 16 bits the label's slope could be wrong by tens of per cent
        b_t = tl.where(o_c == o_l, tl.load(p_targets + i_r), b_d + maximum) / softcap
        b_g *= 1.0 - b_t * b_t
    b_g = tl.where((o_c < columns) & (label != IGNORED), b_g, 0.0)
    tl.store(p_dlogits + i_r * s_scores + o_c, b_g.to(p_dlogits.dtype.element_ty), mask=m_c)


@jit
def scale_kernel(p_from, p_to, p_scale, count, IN_PLACE: constexpr, BLOCK: constexpr):
    """to = from * scale, rounded once. In place a scale of 1 is nothing to do, and only the device knows it."""
    scale = tl.load(p_scale).to(tl.float32)
    if IN_PLACE:  # noqa: SIM102
        if scale == 1.0:
            return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = o < count - start
    b = tl.load(p_from + start + o, mask=m, other=0.0).to(tl.float32) * scale
    tl.store(p_to + start + o, b.to(p_to.dtype.element_ty), mask=m)


class Terms(NamedTuple):
    """What the loss of a token is: lse - target, smoothed, + z_loss * lse^2; softcap 0: none."""

    z_loss: float = 0.0
    softcap: float = 0.0
    label_smoothing: float = 0.0


class Parts(NamedTuple):
    """loss: sum over tokens. dx, and dW in fp32 or wider in two halves (`cut`), for a gradient of 1; empty where not wanted."""

    loss: Tensor
    dx: Tensor
    upper: Tensor
    lower: Tensor


@dataclass(frozen=True)
class Sizes:
    """columns, warps: logits and warps of a program. block: columns of dlogits in one product where they have no memory of their
    own. logits: fp32 logits that exist at once. memory: bytes beside dx and dW. tokens: most of a panel, 0: as memory allows.
    `python -m benchmarks.loss --tune` measures."""

    columns: int = 4096
    warps: int = 4
    block: int = 2**15
    logits: int = 2**25
    memory: int = 7 * 2**27
    tokens: int = 0


SIZES = Sizes()
ALIGN = 64
"""Elements that rows are padded to: 16-byte accesses and cuBLAS' fast products need aligned rows."""
TILE = 256
"""Vocabulary entries that blocks, and tokens / 2 that panels are multiples of: whole tiles of a product."""
SCALED = 2**20
"""Elements that the scaled dW starts with, in memory of their own."""


def up(x: int, to: int) -> int:
    return -(-x // to) * to


def cut(vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of the upper half of dW. All, where dW is as wide as W; else the upper half holds all of dW once it is rounded."""
    return vocabulary if dtype.itemsize > 2 else min(vocabulary, up(-(-vocabulary // 2), TILE))


def blocks_of(vocabulary: int, halves: int, width: int) -> list[tuple[int, int]]:
    """[begin, end) of even blocks of at most about `width` columns, none of which lies in both halves."""
    blocks = []
    for begin, end in ((0, halves), (halves, vocabulary)):
        if begin < end:
            step = up(-(-(end - begin) // -(-(end - begin) // width)), TILE)
            blocks += [(at, min(at + step, end)) for at in range(begin, end, step)]
    return blocks


def fused_parts(hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms, dx: bool, dw: bool, sizes: Sizes = SIZES) -> Parts:
    """Loss and gradients of hidden [N, C], weight [V, C], labels int64 [N], as `linear_cross_entropy` defines them."""
    return _Problem(hidden, weight.contiguous(), labels.contiguous(), terms, dx, dw, sizes).parts()


def scale_(x: Tensor, scale: Tensor) -> Tensor:
    """x times a scalar on the device, in place; contiguous."""
    scale_into(x, x, scale)
    return x


def scaled_weight_gradient_(upper: Tensor, lower: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dW times a scalar, rounded to dtype, in the memory of its upper half; at no moment is there a second dW."""
    if upper.dtype == dtype:
        return scale_(upper, scale)
    source, rest = upper.view(-1), lower.view(-1)
    result = source.view(dtype)[: source.numel() + rest.numel()]
    # elements [a, 2a) fill the bytes of elements [a / 2, a), which are done by then
    done = min(SCALED, source.numel())
    start = torch.empty(done, dtype=dtype, device=upper.device)
    scale_into(source[:done], start, scale)
    result[:done].copy_(start)
    while done < source.numel():
        end = min(2 * done, source.numel())
        scale_into(source[done:end], result[done:end], scale)
        done = end
    scale_into(rest, result[source.numel() :], scale)
    return result.view(-1, upper.shape[1])


def scale_into(source: Tensor, target: Tensor, scale: Tensor) -> None:
    """target = source times a scalar on the device, rounded to target's dtype; both contiguous."""
    block = 4096
    if source.numel():
        with _device(source):
            in_place = source.data_ptr() == target.data_ptr()
            scale_kernel[(-(-source.numel() // block),)](source, target, scale, source.numel(), IN_PLACE=in_place, BLOCK=block)


def _device(x: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class _Problem:
    def __init__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms, need_dx: bool, need_dw: bool, sizes: Sizes
    ) -> None:
        self.hidden, self.weight, self.labels, self.terms, self.sizes = hidden, weight, labels, terms, sizes
        self.need_dx, self.need_dw, self.gradient = need_dx, need_dw, need_dx or need_dw
        (self.tokens, self.width), self.vocabulary = hidden.shape, weight.shape[0]
        self.halves = cut(self.vocabulary, weight.dtype)
        self.kept = torch.float32 if weight.dtype == torch.float32 else torch.float16
        self.dx = torch.empty(hidden.shape if need_dx else (0,), dtype=hidden.dtype, device=hidden.device)
        rows = (self.halves, self.vocabulary - self.halves) if need_dw else (0, 0)
        self.dw = [torch.empty(count, self.width, dtype=torch.float32, device=hidden.device) for count in rows]

    def parts(self) -> Parts:
        loss = self.hidden.new_zeros((), dtype=torch.float32)
        if self.tokens == 0:
            for half in self.dw:
                half.zero_()
        with _device(self.hidden):
            for begin, end, inside in self.panels():
                loss = loss + _Panel(self, begin, end, inside).run()
        return Parts(loss, self.dx, self.dw[0], self.dw[1])

    def panels(self) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, whether the scores are kept in dW) of panels; only the first may keep them there."""
        sizes, size = self.sizes, self.kept.itemsize
        most = _whole(sizes.logits // self.columns)
        room = sizes.memory - 4 * sizes.logits
        sums = 4 * self.width if self.need_dx and size == 2 else 0
        outside = min(most, _whole(room // (size * up(self.vocabulary, ALIGN) + sums))) if self.gradient else most
        inside = 0
        if self.need_dw:
            blocks = blocks_of(self.vocabulary, self.halves, sizes.block)
            rows = (4 * self.width * (end - begin) // (size * up(end - begin, ALIGN)) for begin, end in blocks)
            inside = min(most, _whole(min(*rows, room // (size * max(end - begin for begin, end in blocks) + sums))))
        inside, outside = (min(x, sizes.tokens or x) for x in (inside, max(outside, 1)))
        first = min(inside, self.tokens) if inside >= min(self.tokens, outside) else 0
        if first:
            yield 0, first, True
        if rest := self.tokens - first:
            step = -(-rest // -(-rest // outside))
            step = min(up(step, TILE // 2), outside)
            for begin in range(first, self.tokens, step):
                yield begin, min(begin + step, self.tokens), False

    @property
    def columns(self) -> int:
        """Columns of a program: a power of two."""
        return min(self.sizes.columns, 1 << (self.vocabulary - 1).bit_length())

    def gradient_of(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of dW."""
        return self.dw[0][begin:end] if end <= self.halves else self.dw[1][begin - self.halves : end - self.halves]


def _whole(tokens: int) -> int:
    """Rounded down to whole tiles, of what is more than one."""
    return tokens // (TILE // 2) * (TILE // 2) if tokens >= TILE // 2 else tokens


class _Panel:
    """Tokens [begin, end) of a problem; inside: their scores are kept in the memory of dW."""

    def __init__(self, problem: _Problem, begin: int, end: int, inside: bool) -> None:
        self.problem, self.inside, self.rows = problem, inside, slice(begin, end)
        self.x, self.labels = problem.hidden[self.rows], problem.labels[self.rows]
        self.blocks = blocks_of(problem.vocabulary, problem.halves, problem.sizes.block if inside else problem.vocabulary)
        count = sum(-(-(end - begin) // problem.columns) for begin, end in self.blocks)
        self.maxima, self.lses, self.sums = torch.empty(3, count, len(self.x), dtype=torch.float32, device=self.x.device)
        # a label outside the vocabulary is never found: NaN is all that can be said about it without waiting for the device
        self.targets = torch.full_like(self.maxima[0], torch.nan)
        self.constants = {
            "SOFTCAP": problem.terms.softcap > 0,
            "SMOOTH": problem.terms.label_smoothing > 0,
            "BLOCK": problem.columns,
            "num_warps": problem.sizes.warps,
        }

    def run(self) -> Tensor:
        """The loss of these tokens; writes their dx, and adds to dW."""
        z_loss, _, smoothing = self.problem.terms
        scores = self.scores()
        lse = self.lses.logsumexp(0)
        losses = lse - (1 - smoothing) * self.targets
        if smoothing:
            losses -= self.sums.sum(0) * (smoothing / self.problem.vocabulary)
        if z_loss:
            losses += z_loss * lse.square()
        if scores:
            self.gradients(scores, lse)
        return losses.where(self.labels != IGNORE, 0.0).sum()

    def scores(self) -> list[Tensor]:
        """First pass: statistics, and a block of scores [n, columns] for every block of the vocabulary."""
        problem, n = self.problem, len(self.x)
        widest = max(end - begin for begin, end in self.blocks)
        wide = min(max(problem.sizes.logits // n // problem.columns, 1) * problem.columns, up(widest, ALIGN))
        logits = torch.empty(n, wide, dtype=torch.float32, device=self.x.device)
        scores, first = self.room() if problem.gradient else [], 0
        for i, (start, stop) in enumerate(self.blocks):
            for begin in range(start, stop, wide):
                end = min(begin + wide, stop)
                kept = scores[i][:, begin - start :] if scores else logits
                product_(logits[:, : end - begin], self.x, problem.weight[begin:end].t())
                programs = -(-(end - begin) // problem.columns)
                scores_kernel[(n, programs)](
                    logits, kept, self.labels, self.maxima, self.lses, self.sums, self.targets, logits.stride(0), kept.stride(0),
                    n, first, begin, end - begin, up(end - begin, ALIGN), problem.terms.softcap,
                    STORE=bool(scores), **self.constants,
                )  # fmt: skip
                first += programs
        return scores

    def room(self) -> list[Tensor]:
        """Memory for the scores of every block, rows padded."""
        problem, n = self.problem, len(self.x)
        widths = [up(end - begin, ALIGN) for begin, end in self.blocks]
        if self.inside:
            flat = [problem.gradient_of(*block).view(-1).view(problem.kept) for block in self.blocks]
            return [block[: n * width].view(n, width) for block, width in zip(flat, widths, strict=True)]
        return [torch.empty(n, width, dtype=problem.kept, device=self.x.device) for width in widths]

    def gradients(self, scores: list[Tensor], lse: Tensor) -> None:
        """Second pass: a block's dlogits, its share of dx, its dW."""
        problem, dtype = self.problem, self.x.dtype
        z_loss, softcap, smoothing = problem.terms
        sums = None
        if problem.need_dx:
            sums = problem.dx[self.rows] if dtype == torch.float32 else torch.empty_like(self.x, dtype=torch.float32)
        scratch = torch.empty(max(x.numel() for x in scores) if self.inside else 0, dtype=dtype, device=self.x.device)
        first = 0
        for (begin, end), kept in zip(self.blocks, scores, strict=True):
            dlogits = scratch[: kept.numel()].view_as(kept) if self.inside else kept.view(dtype)
            programs = -(-(end - begin) // problem.columns)
            dlogits_kernel[(len(self.x), programs)](
                kept, dlogits, self.labels, self.maxima, lse, self.targets, kept.stride(0), len(self.x), first, begin, end - begin,
                kept.shape[1], softcap, z_loss, 1 - smoothing, smoothing / problem.vocabulary, **self.constants,
            )  # fmt: skip
            first += programs
            dlogits = dlogits[:, : end - begin]
            if sums is not None:
                product_(sums, dlogits, problem.weight[begin:end], add=begin > 0)
            if problem.need_dw:
                product_(problem.gradient_of(begin, end), dlogits.t(), self.x, add=self.rows.start > 0)
        if sums is not None and sums.dtype != dtype:
            problem.dx[self.rows] = sums

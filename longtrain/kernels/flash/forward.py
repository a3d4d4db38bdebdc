"""Forward: one program a tile of queries of one head walks over the keys that it sees. Legend in common.py.

Dao et al. 2022, 2023 (FlashAttention): the softmax is kept as a running maximum and sum, exponentials are of base 2.
"""

from longtrain.kernels.flash.common import (
    DYNAMIC,
    LOG2E,
    head_of,
    head_word,
    kept,
    load_tile,
    place,
    scores,
    seen,
    walk,
)
from longtrain.kernels.language import constexpr, jit, tl


@jit(do_not_specialize=DYNAMIC)
def forward_kernel(
    q, k, v, p_out, p_lse, p_q_segments, p_k_segments, p_documents, p_bias, p_slopes, p_seed,
    s_q, s_k, s_v, s_out, s_lse, s_q_segments, s_k_segments, s_bias,
    heads, group, queries, keys, lo, hi, q_start, k_start, stride, scale, softcap, threshold, rescale,
    D: constexpr, DV: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr, RUNS: constexpr, SOFTCAP: constexpr, ALIBI: constexpr,
    BIAS: constexpr, DROPOUT: constexpr, PLAIN: constexpr, INTO: constexpr, PRECISION: constexpr, TMA: constexpr,
):  # fmt: skip
    """out [B, Tq, H, DV] and lse [B, H, Tq]; INTO merges with what they hold. Grid: `place`, of queries."""
    shape, band = (heads, group, queries, keys), (lo, hi)
    origin, numbers = (q_start, k_start, stride), (scale, softcap, threshold, rescale)
    i_m, _i_bh, i_b, i_h, i_kh = place(shape[0], shape[1], HAS_LO and not HAS_HI)
    row = i_m * BLOCK_M
    o_m = row + tl.arange(0, BLOCK_M)

    begin, full_begin, full_end, end, b_first, b_last = walk(
        p_documents, p_q_segments, s_q_segments, i_b, i_m, tl.num_programs(1), row, shape[2], shape[3], band[0], band[1], -2,
        HAS_LO, HAS_HI, DOCUMENTS, RUNS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    slope = 0.0
    if ALIBI:
        slope = tl.load(p_slopes + i_h)
    word = i_h
    if DROPOUT:
        word = head_word(p_seed, i_b, i_h)
    if BIAS:
        p_bias += i_b.to(tl.int64) * s_bias[0] + i_h.to(tl.int64) * s_bias[1]

    b_q = load_tile(head_of(q, s_q, i_b, i_h, False), s_q[1], i_b, i_h, row, shape[2], D, BLOCK_M, BLOCK_D, False)
    p_k = head_of(k, s_k, i_b, i_kh, TMA)
    p_v = head_of(v, s_v, i_b, i_kh, TMA)
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for o_n in range(begin, end, BLOCK_N):
        o_n = tl.multiple_of(o_n, BLOCK_N)
        o_k = o_n + tl.arange(0, BLOCK_N)
        b_k = load_tile(p_k, s_k[1], i_b, i_kh, o_n, shape[3], D, BLOCK_N, BLOCK_D, TMA)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if not PLAIN:
            b_s, _ = scores(b_s, o_m[:, None], o_k[None, :], shape, origin, numbers, slope, p_bias, s_bias, SOFTCAP, ALIBI, BIAS)
        if (o_n < full_begin) | (o_n >= full_end):
            m_s = seen(
                o_m, o_k, b_first, b_last, p_k_segments, s_k_segments, i_b, shape, band, False, HAS_LO, HAS_HI, DOCUMENTS, RUNS
            )
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.max(b_s, 1)
        if PLAIN:
            b_new = b_new * numbers[0]
        b_new = tl.maximum(b_max, b_new)
        # a row that saw nothing so far: -inf - -inf would be NaN
        b_floor = tl.where(b_new == float("-inf"), 0.0, b_new)
        if PLAIN:
            b_p = tl.exp2(b_s * (numbers[0] * LOG2E) - (b_floor * LOG2E)[:, None])
        else:  # large scores lose less if subtracted first
            b_p = tl.exp2((b_s - b_floor[:, None]) * LOG2E)
        b_old = tl.exp2((b_max - b_floor) * LOG2E)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_acc = b_acc * b_old[:, None]
        if DROPOUT:
            b_p = tl.where(kept(word, o_m[:, None], o_k[None, :], origin, numbers), b_p, 0.0)
        b_v = load_tile(p_v, s_v[1], i_b, i_kh, o_n, shape[3], DV, BLOCK_N, BLOCK_V, TMA)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new

    m_none = b_sum == 0  # not so where it is NaN, which must show in lse
    b_lse = tl.where(m_none, float("-inf"), b_max + tl.log(b_sum))
    b_weight = tl.where(m_none, 0.0, 1.0 / b_sum)
    if DROPOUT:
        b_weight = b_weight * numbers[3]
    m_m = o_m < shape[2]
    p_lse += i_b.to(tl.int64) * s_lse[0] + i_h.to(tl.int64) * s_lse[1] + o_m.to(tl.int64) * s_lse[2]
    o_v = tl.arange(0, BLOCK_V)
    p_tile = p_out + i_b.to(tl.int64) * s_out[0] + i_h.to(tl.int64) * s_out[2]
    p_tile += o_m.to(tl.int64)[:, None] * s_out[1] + o_v[None, :]
    m_tile = m_m[:, None] & (o_v < DV)[None, :]
    if INTO:
        b_before = tl.load(p_lse, mask=m_m, other=float("-inf"))
        b_high = tl.maximum(b_before, b_lse)
        b_high = tl.where(b_high == float("-inf"), 0.0, b_high)
        b_total = b_high + tl.log(tl.exp(b_before - b_high) + tl.exp(b_lse - b_high))
        b_base = tl.where(b_total == float("-inf"), 0.0, b_total)
        b_acc = b_acc * (b_weight * tl.exp(b_lse - b_base))[:, None]
        b_acc += tl.load(p_tile, mask=m_tile, other=0.0) * tl.exp(b_before - b_base)[:, None]
        b_lse = b_total
    else:
        b_acc = b_acc * b_weight[:, None]
    tl.store(p_lse, b_lse, mask=m_m)
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_tile)

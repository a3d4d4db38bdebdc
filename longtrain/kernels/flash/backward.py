"""Backward: dq by tiles of queries, dk and dv by tiles of keys, dbias by its own tiles. Legend in common.py.

Every element is owned by one program and summed in one order, so two runs are equal bit for bit. Probabilities are recomputed from
lse. For dk and dv the products are computed transposed, K Q^T and V dO^T: transposing a product held in registers gives wrong
numbers on Hopper (Triton 3.4 to 3.7). p_lse and p_delta come as rows_kernel writes them.
"""

from longtrain.kernels.flash.common import (
    DYNAMIC,
    LOG2E,
    head_of,
    head_word,
    kept,
    load_segments,
    load_tile,
    place,
    scores,
    seen,
    store_tile,
    visible,
    walk,
)
from longtrain.kernels.language import constexpr, jit, tl


@jit(do_not_specialize=["heads", "length"])
def rows_kernel(p_lse, p_delta, p_lses, p_deltas, s_lse, s_delta, heads, length, BLOCK: constexpr):
    """lse and delta, [B, H, T], padded so that tiles need no mask: in rows that do not exist or see nothing an lse of
    +inf makes probabilities 0. Grid: blocks of rows x heads x batch."""
    blocks = tl.cdiv(length, BLOCK)
    i_t, i_bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_t = i_t * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < length
    b_lse = tl.load(p_lse + i_b * s_lse[0] + i_h * s_lse[1] + o_t.to(tl.int64) * s_lse[2], mask=m_t, other=float("-inf"))
    b_delta = tl.load(p_delta + i_b * s_delta[0] + i_h * s_delta[1] + o_t.to(tl.int64) * s_delta[2], mask=m_t, other=0.0)
    o_out = i_bh.to(tl.int64) * (blocks * BLOCK) + o_t
    tl.store(p_lses + o_out, tl.where(b_lse == float("-inf"), float("inf"), b_lse))
    tl.store(p_deltas + o_out, b_delta)


@jit(do_not_specialize=["heads", "length"])
def delta_kernel(
    p_do, p_out, p_dlse, p_delta, s_do, s_out, s_dlse, heads, length, DV: constexpr, BLOCK_V: constexpr, BLOCK_T: constexpr
):
    """sum(dout * out) - dlse, [B, H, T]. Grid: blocks of rows x heads x batch."""
    blocks = tl.cdiv(length, BLOCK_T)
    i_t, i_bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_b, i_h = i_bh // heads, i_bh % heads
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < length
    b_do = load_tile(head_of(p_do, s_do, i_b, i_h, False), s_do[1], i_b, i_h, i_t * BLOCK_T, length, DV, BLOCK_T, BLOCK_V, False)
    b_out = load_tile(
        head_of(p_out, s_out, i_b, i_h, False), s_out[1], i_b, i_h, i_t * BLOCK_T, length, DV, BLOCK_T, BLOCK_V, False
    )
    p_dlse += i_b.to(tl.int64) * s_dlse[0] + i_h.to(tl.int64) * s_dlse[1] + o_t.to(tl.int64) * s_dlse[2]
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1) - tl.load(p_dlse, mask=m_t, other=0.0)
    tl.store(p_delta + i_bh.to(tl.int64) * length + o_t, b_delta, mask=m_t)


@jit
def _probabilities(
    b_s, b_lse, o_q, o_k, shape, origin, numbers, slope, p_bias, s_bias, SOFTCAP: constexpr, ALIBI: constexpr, BIAS: constexpr
):
    """Probabilities of a tile without its mask, in either orientation, and the derivative of the soft-cap."""
    if SOFTCAP or ALIBI or BIAS:
        b_s, b_slope = scores(b_s, o_q, o_k, shape, origin, numbers, slope, p_bias, s_bias, SOFTCAP, ALIBI, BIAS)
        return tl.exp2((b_s - b_lse) * LOG2E), b_slope
    else:
        return tl.exp2(b_s * (numbers[0] * LOG2E) - b_lse * LOG2E), 1.0


@jit
def _gradients(b_p, b_dp, b_slope, b_delta, o_q, o_k, origin, numbers, word, SOFTCAP: constexpr, DROPOUT: constexpr):
    """(dropped probabilities, gradient of scores, gradient of scaled products) of a tile, in either orientation."""
    b_dropped = b_p
    if DROPOUT:
        m_kept = kept(word, o_q, o_k, origin, numbers)
        b_dropped = tl.where(m_kept, b_p * numbers[3], 0.0)
        b_dp = tl.where(m_kept, b_dp * numbers[3], 0.0)
    b_ds = b_p * (b_dp - b_delta)
    b_dx = b_ds
    if SOFTCAP:
        b_dx = b_ds * b_slope
    return b_dropped, b_ds, b_dx


@jit(do_not_specialize=DYNAMIC)
def queries_kernel(
    q, k, v, p_do, p_lse, p_delta, p_dq, p_sums, p_q_segments, p_k_segments, p_documents, p_bias, p_slopes, p_seed,
    s_q, s_k, s_v, s_do, s_lse, s_dq, s_q_segments, s_k_segments, s_bias,
    heads, group, queries, keys, lo, hi, q_start, k_start, stride, scale, softcap, threshold, rescale,
    D: constexpr, DV: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr, RUNS: constexpr, SOFTCAP: constexpr, ALIBI: constexpr,
    BIAS: constexpr, DROPOUT: constexpr, SUMS: constexpr, INTO: constexpr, PRECISION: constexpr, TMA: constexpr,
):  # fmt: skip
    """dq, and with SUMS the gradient of scores summed over keys, fp32 [B, H, Tq]. Grid: `place`, of queries."""
    shape, band = (heads, group, queries, keys), (lo, hi)
    origin, numbers = (q_start, k_start, stride), (scale, softcap, threshold, rescale)
    i_m, i_bh, i_b, i_h, i_kh = place(shape[0], shape[1], HAS_LO and not HAS_HI)
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
    b_do = load_tile(head_of(p_do, s_do, i_b, i_h, False), s_do[1], i_b, i_h, row, shape[2], DV, BLOCK_M, BLOCK_V, False)
    p_lse += i_b.to(tl.int64) * s_lse[0] + i_h.to(tl.int64) * s_lse[1]
    p_delta += i_b.to(tl.int64) * s_lse[0] + i_h.to(tl.int64) * s_lse[1]
    b_lse, b_delta = tl.load(p_lse + o_m), tl.load(p_delta + o_m)
    p_k = head_of(k, s_k, i_b, i_kh, TMA)
    p_v = head_of(v, s_v, i_b, i_kh, TMA)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sums = tl.zeros([BLOCK_M], tl.float32)
    for o_n in range(begin, end, BLOCK_N):
        o_n = tl.multiple_of(o_n, BLOCK_N)
        o_k = o_n + tl.arange(0, BLOCK_N)
        b_k = load_tile(p_k, s_k[1], i_b, i_kh, o_n, shape[3], D, BLOCK_N, BLOCK_D, TMA)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_v = load_tile(p_v, s_v[1], i_b, i_kh, o_n, shape[3], DV, BLOCK_N, BLOCK_V, TMA)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_p, b_slope = _probabilities(
            b_s, b_lse[:, None], o_m[:, None], o_k[None, :], shape, origin, numbers, slope, p_bias, s_bias, SOFTCAP, ALIBI, BIAS
        )
        if (o_n < full_begin) | (o_n >= full_end):
            m_s = seen(
                o_m, o_k, b_first, b_last, p_k_segments, s_k_segments, i_b, shape, band, False, HAS_LO, HAS_HI, DOCUMENTS, RUNS
            )
            b_p = tl.where(m_s, b_p, 0.0)
        _, b_ds, b_dx = _gradients(
            b_p, b_dp, b_slope, b_delta[:, None], o_m[:, None], o_k[None, :], origin, numbers, word, SOFTCAP, DROPOUT
        )
        if SUMS:
            b_sums += tl.sum(b_ds, 1)
        b_dq = tl.dot(b_dx.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    if SUMS:
        tl.store(p_sums + i_bh.to(tl.int64) * shape[2] + o_m, b_sums, mask=o_m < shape[2])
    store_tile(head_of(p_dq, s_dq, i_b, i_h, False), b_dq * numbers[0], s_dq[1], row, shape[2], D, BLOCK_M, BLOCK_D, INTO)


@jit(do_not_specialize=DYNAMIC)
def keys_kernel(
    q, p_k, p_v, do, p_lse, p_delta, p_dk, p_dv, p_sums, p_q_segments, p_k_segments, p_documents, p_bias, p_slopes, p_seed,
    s_q, s_k, s_v, s_do, s_lse, s_dk, s_dv, s_q_segments, s_k_segments, s_bias,
    heads, group, queries, keys, lo, hi, q_start, k_start, stride, scale, softcap, threshold, rescale,
    D: constexpr, DV: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr, RUNS: constexpr, SOFTCAP: constexpr, ALIBI: constexpr,
    BIAS: constexpr, DROPOUT: constexpr, SUMS: constexpr, INTO: constexpr, PRECISION: constexpr, TMA: constexpr,
):  # fmt: skip
    """dk, dv, and with SUMS the gradient of scores summed over queries, fp32 [B, H, Tk]. Grid: `place`, of keys and key heads;
    the query heads of a key head are summed here."""
    shape, band = (heads, group, queries, keys), (lo, hi)
    origin, numbers = (q_start, k_start, stride), (scale, softcap, threshold, rescale)
    i_n, _i_bh, i_b, i_kh, _i_none = place(shape[0] // shape[1], 1, HAS_HI and not HAS_LO)
    row = i_n * BLOCK_N
    o_n = row + tl.arange(0, BLOCK_N)

    # the band as keys see it: -hi <= key - query <= -lo
    begin, full_begin, full_end, end, b_first, b_last = walk(
        p_documents, p_k_segments, s_k_segments, i_b, i_n, tl.num_programs(1), row, shape[3], shape[2], -band[1], -band[0], -1,
        HAS_HI, HAS_LO, DOCUMENTS, RUNS, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    b_k = load_tile(head_of(p_k, s_k, i_b, i_kh, False), s_k[1], i_b, i_kh, row, shape[3], D, BLOCK_N, BLOCK_D, False)
    b_v = load_tile(head_of(p_v, s_v, i_b, i_kh, False), s_v[1], i_b, i_kh, row, shape[3], DV, BLOCK_N, BLOCK_V, False)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for i_g in range(0, shape[1]):
        i_h = i_kh * shape[1] + i_g
        i_row = (i_b * shape[0] + i_h).to(tl.int64)
        slope = 0.0
        if ALIBI:
            slope = tl.load(p_slopes + i_h)
        word = i_h
        if DROPOUT:
            word = head_word(p_seed, i_b, i_h)
        p_b = p_bias
        if BIAS:
            p_b = p_bias + i_b.to(tl.int64) * s_bias[0] + i_h.to(tl.int64) * s_bias[1]
        p_q = head_of(q, s_q, i_b, i_h, TMA)
        p_do = head_of(do, s_do, i_b, i_h, TMA)
        p_l = p_lse + i_b.to(tl.int64) * s_lse[0] + i_h.to(tl.int64) * s_lse[1]
        p_d = p_delta + i_b.to(tl.int64) * s_lse[0] + i_h.to(tl.int64) * s_lse[1]
        b_sums = tl.zeros([BLOCK_N], tl.float32)
        for o_m in range(begin, end, BLOCK_M):
            o_m = tl.multiple_of(o_m, BLOCK_M)
            o_q = o_m + tl.arange(0, BLOCK_M)
            b_q = load_tile(p_q, s_q[1], i_b, i_h, o_m, shape[2], D, BLOCK_M, BLOCK_D, TMA)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            b_do = load_tile(p_do, s_do[1], i_b, i_h, o_m, shape[2], DV, BLOCK_M, BLOCK_V, TMA)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_lse, b_delta = tl.load(p_l + o_q), tl.load(p_d + o_q)
            b_p, b_slope = _probabilities(
                b_s, b_lse[None, :], o_q[None, :], o_n[:, None], shape, origin, numbers, slope, p_b, s_bias, SOFTCAP, ALIBI, BIAS
            )
            if (o_m < full_begin) | (o_m >= full_end):
                m_s = seen(
                    o_n, o_q, b_first, b_last, p_q_segments, s_q_segments, i_b, shape, band, True, HAS_LO, HAS_HI, DOCUMENTS, RUNS
                )
                b_p = tl.where(m_s, b_p, 0.0)
            b_dropped, b_ds, b_dx = _gradients(
                b_p, b_dp, b_slope, b_delta[None, :], o_q[None, :], o_n[:, None], origin, numbers, word, SOFTCAP, DROPOUT
            )
            if SUMS:
                b_sums += tl.sum(b_ds, 1)
            b_dv = tl.dot(b_dropped.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dk = tl.dot(b_dx.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        if SUMS:
            tl.store(p_sums + i_row * shape[3] + o_n, b_sums, mask=o_n < shape[3])
    store_tile(head_of(p_dk, s_dk, i_b, i_kh, False), b_dk * numbers[0], s_dk[1], row, shape[3], D, BLOCK_N, BLOCK_D, INTO)
    store_tile(head_of(p_dv, s_dv, i_b, i_kh, False), b_dv, s_dv[1], row, shape[3], DV, BLOCK_N, BLOCK_V, INTO)


@jit(do_not_specialize=[*DYNAMIC, "batches", "shared"])
def bias_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dbias, p_q_segments, p_k_segments, p_bias, p_slopes, p_seed,
    s_q, s_k, s_v, s_do, s_lse, s_dbias, s_q_segments, s_k_segments, s_bias,
    heads, group, queries, keys, lo, hi, q_start, k_start, stride, scale, softcap, threshold, rescale,
    batches, shared,
    D: constexpr, DV: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr, SOFTCAP: constexpr, ALIBI: constexpr, DROPOUT: constexpr,
    INTO: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """dbias with rows and columns, summed over the `batches` and `shared` heads that it is broadcast to.

    Grid: tiles of keys x tiles of queries x heads x batch of the bias.
    """
    shape, band = (heads, group, queries, keys), (lo, hi)
    origin, numbers = (q_start, k_start, stride), (scale, softcap, threshold, rescale)
    columns, rows = tl.cdiv(shape[3], BLOCK_N), tl.cdiv(shape[2], BLOCK_M)
    i_n, rest = tl.program_id(0) % columns, tl.program_id(0) // columns
    i_m, rest = rest % rows, rest // rows
    own_heads = shape[0] // shared
    i_bh, i_bb = rest % own_heads, rest // own_heads
    o_q = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, batches * shared):
        i_b, i_h = i_bb + i // shared, i_bh + i % shared
        i_kh = i_h // shape[1]
        b_q = load_tile(head_of(p_q, s_q, i_b, i_h, False), s_q[1], i_b, i_h, i_m * BLOCK_M, shape[2], D, BLOCK_M, BLOCK_D, False)
        b_k = load_tile(head_of(p_k, s_k, i_b, i_kh, False), s_k[1], i_b, i_kh, i_n * BLOCK_N, shape[3], D, BLOCK_N, BLOCK_D, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_do = load_tile(
            head_of(p_do, s_do, i_b, i_h, False), s_do[1], i_b, i_h, i_m * BLOCK_M, shape[2], DV, BLOCK_M, BLOCK_V, False
        )
        b_v = load_tile(
            head_of(p_v, s_v, i_b, i_kh, False), s_v[1], i_b, i_kh, i_n * BLOCK_N, shape[3], DV, BLOCK_N, BLOCK_V, False
        )
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        p_l = p_lse + i_b.to(tl.int64) * s_lse[0] + i_h.to(tl.int64) * s_lse[1]
        p_d = p_delta + i_b.to(tl.int64) * s_lse[0] + i_h.to(tl.int64) * s_lse[1]
        b_lse, b_delta = tl.load(p_l + o_q), tl.load(p_d + o_q)
        slope = 0.0
        if ALIBI:
            slope = tl.load(p_slopes + i_h)
        word = i_h
        if DROPOUT:
            word = head_word(p_seed, i_b, i_h)
        b_q_segments, b_k_segments = o_q, o_k
        if DOCUMENTS:
            b_q_segments = load_segments(p_q_segments, s_q_segments, i_b, o_q, shape[2], -2)
            b_k_segments = load_segments(p_k_segments, s_k_segments, i_b, o_k, shape[3], -1)
        p_b = p_bias + i_b.to(tl.int64) * s_bias[0] + i_h.to(tl.int64) * s_bias[1]
        b_p, b_slope = _probabilities(
            b_s, b_lse[:, None], o_q[:, None], o_k[None, :], shape, origin, numbers, slope, p_b, s_bias, SOFTCAP, ALIBI, True
        )
        m_s = visible(
            o_q[:, None], o_k[None, :], b_q_segments[:, None], b_k_segments[None, :], shape, band, HAS_LO, HAS_HI, DOCUMENTS
        )
        b_p = tl.where(m_s, b_p, 0.0)
        _, b_ds, _ = _gradients(
            b_p, b_dp, b_slope, b_delta[:, None], o_q[:, None], o_k[None, :], origin, numbers, word, SOFTCAP, DROPOUT
        )
        b_sum += b_ds
    p_out = p_dbias + i_bb.to(tl.int64) * s_dbias[0] + i_bh.to(tl.int64) * s_dbias[1]
    p_out += o_q.to(tl.int64)[:, None] * s_dbias[2] + o_k.to(tl.int64)[None, :] * s_dbias[3]
    m_out = (o_q < shape[2])[:, None] & (o_k < shape[3])[None, :]
    if INTO:
        b_sum += tl.load(p_out, mask=m_out, other=0.0)
    tl.store(p_out, b_sum.to(p_dbias.dtype.element_ty), mask=m_out)

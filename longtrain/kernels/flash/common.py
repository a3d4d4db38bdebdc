"""What the attention kernels share: which tiles hold something visible, how a tile is read, and what is done to its scores.

Legend: i_ program index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ strides; M query rows and N key rows of a tile.
Indices `o_q`, `o_k` and everything made of them broadcast, so that the same functions serve tiles [M, N] and [N, M].
Tuples: s_* = strides of (batch, position, head); shape = (heads, query heads a key head, queries, keys);
band = (lo, hi); origin = (q_start, k_start, stride); numbers = (scale, softcap, dropout threshold, 1 / (1 - dropout)).
"""

from longtrain.kernels.language import constexpr, jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(0x7FFFFFFF)

# what changes from call to call must not compile a kernel anew; as elements of a tuple these would. A length of 1 as a constant
# crashes ptxas besides. Groups of query heads are left out: a loop over one head is none, which saves registers.
DYNAMIC = ["heads", "queries", "keys", "lo", "hi", "q_start", "k_start", "stride", "threshold"]


@jit(do_not_specialize=["length", "tiles"])
def spans_kernel(p_segments, p_spans, s_segments, length, tiles, BLOCK: constexpr):
    """Per tile of positions: least document, greatest document, and the only document where there is one and no padding."""
    i_b, i_t = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_t = i_t * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < length
    p_t = p_segments + i_b.to(tl.int64) * s_segments[0] + o_t.to(tl.int64) * s_segments[1]
    b_s = tl.load(p_t, mask=m_t, other=-1)
    least = tl.min(tl.where(b_s >= 0, b_s, NONE))
    greatest = tl.max(tl.where(b_s >= 0, b_s, -1))
    padding = tl.max(tl.where(m_t & (b_s < 0), 1, 0))
    p_out = p_spans + tl.program_id(0).to(tl.int64) * 3
    tl.store(p_out, least)
    tl.store(p_out + 1, greatest)
    tl.store(p_out + 2, tl.where((least == greatest) & (padding == 0), least, -1))


@jit(do_not_specialize=["rows", "columns"])
def ranges_kernel(p_rows, p_columns, p_ranges, rows, columns, CHUNK: constexpr):
    """Per tile of rows, in tiles of columns: [begin, end) shares a document; [full_begin, full_end) is of the very same one."""
    i_b = (tl.program_id(0) // rows).to(tl.int64)
    p_row = p_rows + tl.program_id(0).to(tl.int64) * 3
    least, greatest, only = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    begin, end = columns, columns * 0
    full_begin, full_end = columns, columns
    for o in range(0, columns, CHUNK):
        o_c = o + tl.arange(0, CHUNK)
        m_c = o_c < columns
        p_c = p_columns + (i_b * columns + o_c) * 3
        b_least = tl.load(p_c, mask=m_c, other=NONE)
        b_greatest = tl.load(p_c + 1, mask=m_c, other=-1)
        b_only = tl.load(p_c + 2, mask=m_c, other=-1)
        m_touch = (b_least <= greatest) & (b_greatest >= least)
        begin = tl.minimum(begin, tl.min(tl.where(m_touch, o_c, columns)))
        end = tl.maximum(end, tl.max(tl.where(m_touch, o_c + 1, 0)))
        m_full = (b_only == only) & (b_only >= 0)
        full_begin = tl.minimum(full_begin, tl.min(tl.where(m_full, o_c, columns)))
        full_end = tl.minimum(full_end, tl.min(tl.where(m_full | (o_c <= full_begin), columns, o_c)))
    p_out = p_ranges + tl.program_id(0).to(tl.int64) * 4
    tl.store(p_out, begin)
    tl.store(p_out + 1, end)
    tl.store(p_out + 2, full_begin)
    tl.store(p_out + 3, full_end)


@jit(do_not_specialize=["length", "columns", "steps"])
def runs_kernel(p_own, p_other, p_runs, s_own, s_other, length, columns, steps, BLOCK: constexpr):
    """Per position the first and the last of the other side's positions in its document, int32 [B, 2, length].

    Segments ascend, padding last, so both ends are found by bisection, and both ascend too. Nothing to see: last is first - 1.
    Grid: blocks of positions x batch.
    """
    blocks = tl.cdiv(length, BLOCK)
    i_t, i_b = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    o_t = i_t * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < length
    b_s = tl.load(p_own + i_b * s_own[0] + o_t.to(tl.int64) * s_own[1], mask=m_t, other=-1)
    b_s = tl.where(b_s < 0, NONE, b_s)
    p_other += i_b * s_other[0]
    first, first_end = o_t * 0, o_t * 0 + columns
    after, after_end = o_t * 0, o_t * 0 + columns
    for _ in range(0, steps):
        middle = (first + first_end) // 2
        b_o = tl.load(p_other + middle.to(tl.int64) * s_other[1], mask=middle < columns, other=-1)
        m_up = (first < first_end) & (b_o >= 0) & (b_o < b_s)
        first, first_end = tl.where(m_up, middle + 1, first), tl.where(m_up, first_end, middle)
        middle = (after + after_end) // 2
        b_o = tl.load(p_other + middle.to(tl.int64) * s_other[1], mask=middle < columns, other=-1)
        m_up = (after < after_end) & (b_o >= 0) & (b_o <= b_s)
        after, after_end = tl.where(m_up, middle + 1, after), tl.where(m_up, after_end, middle)
    p_out = p_runs + i_b * 2 * length + o_t
    tl.store(p_out, first, mask=m_t)
    tl.store(p_out + length, after - 1, mask=m_t)


@jit
def tile_range(
    p_ranges, row, row_end, columns, lo, hi,
    HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """(begin, full_begin, full_end, end), multiples of BLOCK but for the end: the columns c that rows [row, row_end) see under
    lo <= row - c <= hi, and among them whole tiles that need no mask."""
    begin = row * 0
    end = begin + columns
    full_begin = begin
    full_end = end
    if HAS_HI:
        begin = tl.maximum(row - hi, 0)
        full_begin = tl.maximum(row_end - 1 - hi, 0)
    if HAS_LO:
        end = tl.minimum(row_end - lo, columns)
        full_end = tl.maximum(tl.minimum(row + 1 - lo, columns), 0)
    begin = begin // BLOCK * BLOCK
    full_begin = (full_begin + BLOCK - 1) // BLOCK * BLOCK
    full_end = full_end // BLOCK * BLOCK
    if DOCUMENTS:
        begin = tl.maximum(begin, tl.load(p_ranges) * BLOCK)
        end = tl.minimum(end, tl.load(p_ranges + 1) * BLOCK)
        full_begin = tl.maximum(full_begin, tl.load(p_ranges + 2) * BLOCK)
        full_end = tl.minimum(full_end, tl.load(p_ranges + 3) * BLOCK)
    return tl.multiple_of(begin, BLOCK), full_begin, full_end, end


@jit
def walk(
    p_documents, p_segments, s_segments, i_b, i_t, tiles, row, rows, columns, lo, hi, OTHER: constexpr,
    HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr, RUNS: constexpr, BLOCK_R: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """What a tile of rows walks over: its `tile_range`, and the documents of its rows.

    They come as (first, last) column that each row sees under lo <= row - column <= hi where documents are RUNS, else as segments,
    twice. p_documents: of runs_kernel or of ranges_kernel.
    """
    o_r = row + tl.arange(0, BLOCK_R)
    if RUNS:
        last_row = tl.minimum(row + BLOCK_R, rows) - 1
        o_r = tl.minimum(o_r, last_row)  # rows beyond the last, which are never stored, see what it sees
        p_row = p_documents + i_b.to(tl.int64) * 2 * rows
        b_first, b_last = tl.load(p_row + o_r), tl.load(p_row + rows + o_r)
        # both ascend: the ends of the tile need no reduction, which would wait for all warps
        least_first, greatest_first = tl.load(p_row + row), tl.load(p_row + last_row)
        least_last, greatest_last = tl.load(p_row + rows + row), tl.load(p_row + rows + last_row)
        if HAS_HI:
            b_first = tl.maximum(b_first, o_r - hi)
            least_first, greatest_first = tl.maximum(least_first, row - hi), tl.maximum(greatest_first, last_row - hi)
        if HAS_LO:
            b_last = tl.minimum(b_last, o_r - lo)
            least_last, greatest_last = tl.minimum(least_last, row - lo), tl.minimum(greatest_last, last_row - lo)
        begin = tl.multiple_of(least_first // BLOCK_C * BLOCK_C, BLOCK_C)
        full_begin = (greatest_first + BLOCK_C - 1) // BLOCK_C * BLOCK_C
        full_end = (least_last + 1) // BLOCK_C * BLOCK_C
        return begin, full_begin, full_end, greatest_last + 1, b_first, b_last
    else:
        b_segments, p_row = o_r, p_documents
        if DOCUMENTS:
            b_segments = load_segments(p_segments, s_segments, i_b, o_r, rows, OTHER)
            p_row = p_documents + (i_b * tiles + i_t).to(tl.int64) * 4
        row_end = tl.minimum(row + BLOCK_R, rows)
        begin, full_begin, full_end, end = tile_range(p_row, row, row_end, columns, lo, hi, HAS_LO, HAS_HI, DOCUMENTS, BLOCK_C)
        return begin, full_begin, full_end, end, b_segments, b_segments


@jit
def head_of(x, s_x, i_b, i_h, TMA: constexpr):
    """Where the rows of one head begin; a descriptor knows that itself."""
    if TMA:
        return x
    else:
        return x + i_b.to(tl.int64) * s_x[0] + i_h.to(tl.int64) * s_x[2]


@jit
def load_tile(p_x, s_t, i_b, i_h, o_t, length, WIDTH: constexpr, BLOCK_T: constexpr, BLOCK_W: constexpr, TMA: constexpr):
    """[BLOCK_T, BLOCK_W] rows from o_t on; 0 beyond the length and the width."""
    if TMA:
        return p_x.load([i_b, o_t, i_h, 0]).reshape(BLOCK_T, BLOCK_W)
    else:
        o_r = tl.arange(0, BLOCK_T)
        o_w = tl.arange(0, BLOCK_W)
        # 32 bits suffice inside a tile (the launcher sees to it), not inside a tensor
        p_tile = p_x + tl.cast(o_t, tl.int64) * s_t + (o_r[:, None] * s_t + o_w[None, :])
        if WIDTH != BLOCK_W:
            return tl.load(p_tile, mask=(o_t + o_r < length)[:, None] & (o_w < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(p_tile, mask=(o_t + o_r < length)[:, None], other=0.0)


@jit
def store_tile(p_x, b_x, s_t, o_t, length, WIDTH: constexpr, BLOCK_T: constexpr, BLOCK_W: constexpr, ADD: constexpr):
    """Writes rows from o_t on, or adds to them."""
    o_r = o_t + tl.arange(0, BLOCK_T)
    o_w = tl.arange(0, BLOCK_W)
    p_tile = p_x + o_r.to(tl.int64)[:, None] * s_t + o_w[None, :]
    m_tile = (o_r < length)[:, None] & (o_w < WIDTH)[None, :]
    if ADD:
        b_x += tl.load(p_tile, mask=m_tile, other=0.0)
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)


@jit
def load_segments(p_segments, s_segments, i_b, o_t, length, OTHER: constexpr):
    """Documents of positions; padding and what is beyond the length become OTHER."""
    p_t = p_segments + i_b.to(tl.int64) * s_segments[0] + o_t.to(tl.int64) * s_segments[1]
    b_s = tl.load(p_t, mask=o_t < length, other=-1)
    return tl.where(b_s < 0, OTHER, b_s)


@jit
def visible(o_q, o_k, b_q_segments, b_k_segments, shape, band, HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr):
    """Which pairs of a tile see each other; of queries beyond the last, which are never stored, it says nothing."""
    if DOCUMENTS:  # segments of keys beyond the last equal no query's
        m = b_q_segments == b_k_segments
        if HAS_LO:
            m = m & (o_k <= o_q - band[0])
    elif HAS_LO:
        m = o_k <= tl.minimum(o_q - band[0], shape[3] - 1)
    else:
        m = (o_k < shape[3]) & (o_q >= 0)
    if HAS_HI:
        m = m & (o_k >= o_q - band[1])
    return m


@jit
def seen(
    o_own, o_other, b_first, b_last, p_segments, s_segments, i_b, shape, band,
    OF_KEYS: constexpr, HAS_LO: constexpr, HAS_HI: constexpr, DOCUMENTS: constexpr, RUNS: constexpr,
):  # fmt: skip
    """Which pairs of a tile [own, other] see each other; own are keys or queries, the first and last are those of `walk`.

    p_segments: of the others.
    """
    if RUNS:
        return (o_other[None, :] >= b_first[:, None]) & (o_other[None, :] <= b_last[:, None])
    else:
        b_other = o_other
        if OF_KEYS:
            if DOCUMENTS:
                b_other = load_segments(p_segments, s_segments, i_b, o_other, shape[2], -2)
            m = visible(
                o_other[None, :], o_own[:, None], b_other[None, :], b_first[:, None], shape, band, HAS_LO, HAS_HI, DOCUMENTS
            )
        else:
            if DOCUMENTS:
                b_other = load_segments(p_segments, s_segments, i_b, o_other, shape[3], -1)
            m = visible(
                o_own[:, None], o_other[None, :], b_first[:, None], b_other[None, :], shape, band, HAS_LO, HAS_HI, DOCUMENTS
            )
        return m


@jit
def place(heads, group, LAST_FIRST: constexpr):
    """(tile, head of the batch, sequence, head, head // group) of a program. heads: that have programs, of one sequence.

    Grid: heads of a section x tiles x sections; programs start in this order. So `section` heads have all of their tiles of one
    position together, and what they read fits the L2 cache. The longest come first, so that none is left running alone at the end.
    """
    i_t = tl.program_id(1)
    if LAST_FIRST:
        i_t = tl.num_programs(1) - 1 - i_t
    i_bh = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    # a division of signed numbers takes twice as long, and everything waits for these
    i_b = tl.cast(tl.cast(i_bh, tl.uint32) // tl.cast(heads, tl.uint32), tl.int32)
    i_h = i_bh - i_b * heads
    return i_t, i_bh, i_b, i_h, tl.cast(tl.cast(i_h, tl.uint32) // tl.cast(group, tl.uint32), tl.int32)


@jit
def tanh(x):
    """Accurate near 0 too, where 1 - exp(-2x) cancels."""
    a = tl.abs(x)
    e = tl.exp2(a * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    y = a * a
    near = a * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    t = tl.where(a < 0.3, near, far)
    return tl.where(x < 0, -t, t)


@jit
def scores(b_s, o_q, o_k, shape, origin, numbers, slope, p_bias, s_bias, SOFTCAP: constexpr, ALIBI: constexpr, BIAS: constexpr):
    """Scores of plain products, and the derivative of the soft-cap (1 without one)."""
    b_slope = 1.0
    b_s = b_s * numbers[0]
    if SOFTCAP:
        b_t = tanh(b_s / numbers[1])
        b_slope = 1.0 - b_t * b_t
        b_s = b_t * numbers[1]
    if ALIBI:
        distance = (origin[0] - origin[1]) + origin[2] * (o_q - o_k)
        b_s = b_s - slope * tl.abs(distance).to(tl.float32)
    if BIAS:
        m_b = (o_q < shape[2]) & (o_k < shape[3])
        p_b = p_bias + (o_q.to(tl.int64) * s_bias[2] + o_k.to(tl.int64) * s_bias[3])
        b_s = b_s + tl.load(p_b, mask=m_b, other=0.0).to(tl.float32)
    return b_s, b_slope


@jit
def mix(x):
    """fmix32, as attention/dropout.py."""
    x = x ^ (x >> 16)
    x = x * tl.cast(0x85EBCA6B, tl.uint32)
    x = x ^ (x >> 13)
    x = x * tl.cast(0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@jit
def head_word(p_seed, i_b, i_h):
    """The generator's state after seed and head."""
    seed = tl.load(p_seed + i_b)
    word = mix(mix((seed & 0xFFFFFFFF).to(tl.uint32)) ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return mix(word ^ (i_h.to(tl.uint32) * tl.cast(0x9E3779B1, tl.uint32)))


@jit
def kept(word, o_q, o_k, origin, numbers):
    """What dropout leaves of a tile."""
    b_q = (tl.cast(origin[0], tl.int64) + tl.cast(origin[2], tl.int64) * o_q).to(tl.uint32)
    b_k = (tl.cast(origin[1], tl.int64) + tl.cast(origin[2], tl.int64) * o_k).to(tl.uint32)
    b_word = mix(word ^ (b_q * tl.cast(0x85EBCA77, tl.uint32)))
    b_word = mix(b_word ^ (b_k * tl.cast(0xC2B2AE3D, tl.uint32)))
    return b_word >= tl.cast(numbers[2], tl.uint32)

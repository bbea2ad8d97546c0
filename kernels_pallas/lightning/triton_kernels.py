"""`gpu_kernels.py` in Triton's own language. Imported only where Triton is installed; the formulas are in marks.py.

`layout` and `tiles` are a Layout and a Tiles of gpu_kernels.py, `shape` is a `jax_triton.Shape`. Rows are 64-bit, and
so is every offset made of one; within a chunk, offsets are 32-bit.
"""

import triton
import triton.language as tl


@triton.jit
def scan(
    rates,
    lags,
    documents,
    states,
    q,
    k,
    v,
    starts,
    o,
    end,
    layout: tl.constexpr,
    tiles: tl.constexpr,
    shape: tl.constexpr,
):
    row, segment, head, column = _place(tiles, shape)
    first, chunks = _chunks(layout, tiles, segment, layout.per_segment)
    if not shape.marked:
        seen, out, into, keep = _constant_tables(layout, tiles, tl.load(rates + head))

    at = ((row * layout.segments + segment) * shape.heads + head) * shape.keys * shape.values + column
    key_rows, columns = tl.arange(0, shape.keys) * shape.values, tl.arange(0, tiles.columns)
    state_VK = tl.load(starts + at + key_rows[None, :] + columns[:, None])
    for i in range(0, chunks):
        c = first + (chunks - 1 - i if layout.reverse else i)
        if shape.marked:
            seen, out, into, keep = _marked_tables(layout, tiles, shape, lags, documents, states, row, head, c)
        q_CK = _load(layout, tiles, shape, q, row, head, c, shape.keys, shape.keys, 0)
        k_CK = _load(layout, tiles, shape, k, row, head, c, shape.keys, shape.keys, 0)
        v_CV = _load(layout, tiles, shape, v, row, head, c, shape.values, tiles.columns, column)
        scores = (_dot(k_CK, tl.trans(q_CK)) * seen).to(q_CK.dtype)
        o_VC = _dot(state_VK.to(q_CK.dtype), tl.trans(q_CK)) * out[None, :]
        o_VC = _dot_add(tl.trans(v_CV), scores, o_VC)
        written = (v_CV * into[:, None]).to(q_CK.dtype)
        state_VK = _dot_add(tl.trans(written), k_CK, keep * state_VK)
        here, real = _tokens(layout, tiles, shape, row, head, c, shape.values, tiles.columns, column)
        if shape.marked:
            tl.store(o + here, tl.trans(o_VC).to(o.dtype.element_ty), mask=real)
        else:
            tl.store(o + here, tl.trans(o_VC).to(o.dtype.element_ty))
    if segment == (0 if layout.reverse else layout.segments - 1):
        at = (row * shape.heads + head) * shape.keys * shape.values + column
        tl.store(end + at + key_rows[None, :] + columns[:, None], state_VK)


@triton.jit
def local_states(
    rates,
    skips,
    lags,
    documents,
    states,
    k,
    v,
    local,
    layout: tl.constexpr,
    tiles: tl.constexpr,
    shape: tl.constexpr,
):
    row, step, head, column = _place(tiles, shape)
    steps: tl.constexpr = (layout.segments - 1) * layout.pieces
    piece = layout.segments * layout.pieces - 1 - step if layout.reverse else step
    first, chunks = _chunks(layout, tiles, piece, layout.per_segment // layout.pieces)
    if not shape.marked:
        _, _, into, keep = _constant_tables(layout, tiles, tl.load(rates + head))

    width: tl.constexpr = shape.keys
    block: tl.constexpr = tiles.columns
    state_KV = tl.zeros((width, block), tl.float32)
    skip = tl.load(skips + (row * steps + step) * shape.heads + head)
    for i in range(skip, chunks):
        c = first + (chunks - 1 - i if layout.reverse else i)
        if shape.marked:
            _, _, into, keep = _marked_tables(layout, tiles, shape, lags, documents, states, row, head, c)
        k_CK = _load(layout, tiles, shape, k, row, head, c, shape.keys, shape.keys, 0)
        v_CV = _load(layout, tiles, shape, v, row, head, c, shape.values, tiles.columns, column)
        written = (k_CK * into[:, None]).to(k_CK.dtype)
        state_KV = _dot_add(tl.trans(written), v_CV, keep * state_KV)
    if skip < chunks:
        at = ((row * steps + step) * shape.heads + head) * shape.keys * shape.values + column
        key_rows, columns = tl.arange(0, shape.keys) * shape.values, tl.arange(0, tiles.columns)
        tl.store(local + at + key_rows[:, None] + columns[None, :], state_KV)


@triton.jit
def joined_states(local, lives, keeps, start, joined, layout: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    steps: tl.constexpr = (layout.segments - 1) * layout.pieces
    at = tl.program_id(2) * block + tl.arange(0, block)
    state = tl.load(start + (row * heads + head) * size + at)
    # Unrolled, so that no load waits for the state.
    for p in tl.static_range(steps):
        if p % layout.pieces == 0:
            tl.store(joined + ((row * layout.segments + p // layout.pieces) * heads + head) * size + at, state)
        here = (row * steps + p) * heads + head
        live = tl.load(lives + here) + tl.zeros((block,), tl.int32) != 0
        state = tl.load(keeps + here) * state + tl.load(local + here * size + at, mask=live, other=0.0)
    tl.store(joined + ((row * layout.segments + layout.segments - 1) * heads + head) * size + at, state)


@triton.jit
def _place(tiles: tl.constexpr, shape: tl.constexpr):
    """The program's row (64 bits, and so is all that is made of it), segment, head, and first column of v."""
    blocks: tl.constexpr = shape.values // tiles.columns
    last = tl.program_id(2)
    return tl.program_id(0).to(tl.int64), tl.program_id(1), last // blocks, (last % blocks) * tiles.columns


@triton.jit
def _chunks(layout: tl.constexpr, tiles: tl.constexpr, run, per_run: tl.constexpr):
    """The first chunk of the row's `run`-th run of chunks, and how many it has."""
    total: tl.constexpr = (layout.length + tiles.chunk - 1) // tiles.chunk
    first = run * per_run
    return first, tl.minimum(per_run, total - first)


@triton.jit
def _constant_tables(layout: tl.constexpr, tiles: tl.constexpr, rate):
    """The decays [key, query], of what is read from the state and of what it takes in, where no token differs."""
    place = tl.arange(0, tiles.chunk)
    gap = place[:, None] - place[None, :] if layout.reverse else place[None, :] - place[:, None]
    seen = tl.where(gap >= 0, tl.exp(-rate * tl.maximum(gap, 0).to(tl.float32)), 0.0) * layout.scores_scale
    read = tl.exp(-rate * (place + 1).to(tl.float32))
    write = tl.exp(-rate * (tiles.chunk - 1 - place).to(tl.float32))
    out, into = (write, read) if layout.reverse else (read, write)
    return seen, out * layout.out_scale, into * layout.in_scale, tl.exp(-rate * tiles.chunk)


@triton.jit
def _marked_tables(
    layout: tl.constexpr, tiles: tl.constexpr, shape: tl.constexpr, lags, documents, states, row, head, c
):
    """The same tables of chunk c from its marks."""
    chunks: tl.constexpr = (layout.length + tiles.chunk - 1) // tiles.chunk
    place = tl.arange(0, tiles.chunk)
    lag_row = row if shape.lag_rows else row * 0
    document_row = row if shape.document_rows else row * 0
    lag_at = lags + ((lag_row * shape.heads + head) * chunks + c) * tiles.chunk
    lag, total = tl.load(lag_at + place), tl.load(lag_at + tiles.chunk - 1)
    document = tl.load(documents + (document_row * chunks + c) * tiles.chunk + place)
    state_at = states + document_row * (chunks + 1) + c
    before, after = tl.load(state_at), tl.load(state_at + 1)
    read = tl.where(document == before, tl.exp(-lag), 0.0)
    write = tl.where(document == after, tl.exp(lag - total), 0.0)
    out, into = (write, read) if layout.reverse else (read, write)
    gap = lag[:, None] - lag[None, :] if layout.reverse else lag[None, :] - lag[:, None]
    order = place[:, None] >= place[None, :] if layout.reverse else place[None, :] >= place[:, None]
    seen = order & (document[:, None] == document[None, :]) & (document[None, :] >= 0)
    seen = tl.where(seen, tl.exp(-tl.maximum(gap, 0.0)), 0.0) * layout.scores_scale
    keep = tl.where(before == after, tl.exp(-total), 0.0)
    return seen, out * layout.out_scale, into * layout.in_scale, keep


@triton.jit
def _tokens(
    layout: tl.constexpr,
    tiles: tl.constexpr,
    shape: tl.constexpr,
    row,
    head,
    c,
    width: tl.constexpr,
    columns: tl.constexpr,
    column,
):
    """Where chunk c lies in an array [B,T,H,width], `columns` of it from `column` on; and what lies within the row."""
    place = tl.arange(0, tiles.chunk)
    at = ((row * layout.length + c * tiles.chunk) * shape.heads + head) * width + column
    offsets = place[:, None] * (shape.heads * width) + tl.arange(0, columns)[None, :]
    return at + offsets, (c * tiles.chunk + place < layout.length)[:, None]


@triton.jit
def _load(
    layout: tl.constexpr,
    tiles: tl.constexpr,
    shape: tl.constexpr,
    pointer,
    row,
    head,
    c,
    width: tl.constexpr,
    columns: tl.constexpr,
    column,
):
    here, real = _tokens(layout, tiles, shape, row, head, c, width, columns, column)
    x = tl.load(pointer + here, mask=real, other=0.0) if shape.marked else tl.load(pointer + here)
    return x.to(tl.float32) if layout.exact else x


@triton.jit
def _dot(a, b):
    # Three products of TF32 halves give float32's own 1e-6, where one would give 2e-4. Other dtypes do not heed it.
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _dot_add(a, b, c):
    return tl.dot(a, b, c, input_precision="tf32x3")

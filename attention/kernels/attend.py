"""The kernels of `attend`: forward, gradient of the queries, gradient of keys and values, and the sum of split runs.

Softmax in base 2 and float32. A program owns what it writes: no atomics, the same bits in every run. Tiles follow the
plan (`plan.py`); keys and their lifetimes stand in its order, K and V forward too, while the gradient of keys reads
and writes them where they were given (`Order`). Head widths DIM (queries, keys) and VDIM (values) are padded to the
powers of two D and DV.

Gate: a pair's weight is c exp(logit), c = clip(u - tau, 0, 1). Its logit is -inf where c = 0 before the maximum is
taken, and weights are chosen by `where`, never by a product alone: 0 times inf is no number.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _dot(a, b, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _rows(X, row, stride, ok, DIM: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, D] from X [.., DIM]; where MASKED, rows that are not ok are 0."""
    column = tl.arange(0, D)
    where = X + (row[:, None] * stride + column[None, :])
    if MASKED:
        if DIM == D:
            return tl.load(where, mask=ok[:, None], other=0.0)
        return tl.load(where, mask=ok[:, None] & (column[None, :] < DIM), other=0.0)
    if DIM == D:
        return tl.load(where)
    return tl.load(where, mask=column[None, :] < DIM, other=0.0)


@triton.jit
def _write_rows(X, row, stride, value, ok, DIM: tl.constexpr, D: tl.constexpr):
    column = tl.arange(0, D)
    where = X + row[:, None] * stride + column[None, :]
    tl.store(where, value.to(X.dtype.element_ty), mask=ok[:, None] & (column[None, :] < DIM))


@triton.jit
def _meet(score, birth, death, time):
    """Scores of pairs that do not meet become -inf; the arguments broadcast."""
    return tl.where((birth <= time) & (time < death), score, float("-inf"))


@triton.jit
def _run(Runs, place):
    """The four numbers of one run: first, inner, outer, last."""
    Run = Runs + place * 4
    return tl.load(Run), tl.load(Run + 1), tl.load(Run + 2), tl.load(Run + 3)


@triton.jit
def _visit(
    q, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn, stride_vn, scale2,
    KEYS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of keys, begin..begin+KEYS-1: k, v, scores [queries, keys] in base 2, and the gate's share of each pair.

    Without a gate the share is not to be read.
    """
    here = tl.cast(begin, tl.int64)  # a plain number in the interpreter
    row = tl.arange(0, KEYS)
    ok = row < last - begin
    k = _rows(K + here * stride_kn, row, stride_kn, ok, DIM, D, MASKED)
    v = _rows(V + here * stride_vn, row, stride_vn, ok, VDIM, DV, MASKED)
    score = _dot(q, tl.trans(k), IEEE) * scale2
    if HAS_BIAS:
        score += tl.load(Bias + here + row, mask=ok, other=0.0)[None, :] * LOG2E
    if MASKED:
        birth = tl.load(Birth + here + row, mask=ok, other=NEVER)
        death = tl.load(Death + here + row, mask=ok, other=-NEVER)
        score = _meet(score, birth[None, :], death[None, :], time[:, None])
    share = score
    if HAS_GATE:
        u = tl.load(U + here + row, mask=ok, other=-float("inf"))
        share = tl.minimum(u[None, :] - tau[:, None], 1.0)
        score = tl.where(share > 0.0, score, float("-inf"))
    return k, v, score, share


@triton.jit
def _visit_forward(
    q, acc, top, total, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn, stride_vn, scale2,
    KEYS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of keys for the tile of queries: their sum so far, its greatest score, its weights."""
    _, v, score, share = _visit(
        q, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn, stride_vn, scale2,
        KEYS, DIM, D, VDIM, DV, MASKED, HAS_BIAS, HAS_GATE, IEEE,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(score, 1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - finite_top[:, None])
    fade = tl.exp2(top - finite_top)
    if HAS_GATE:
        weight = tl.where(share > 0.0, weight * share, 0.0)
    total = total * fade + tl.sum(weight, 1)
    acc = acc * fade[:, None] + _dot(weight.to(v.dtype), v, IEEE)
    return acc, new_top, total


@triton.jit(do_not_specialize=["tiles", "group", "heads", "num_queries", "generations"])
def attend_forward(
    Q, K, V, Birth, Death, Time, Runs, Bias, U, Tau, Out, Lse,
    tiles, group, heads, num_queries, generations, scale2,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_lb, stride_lg, stride_tb, stride_th, stride_rb, stride_rg, stride_rr, stride_bb, stride_bg,
    stride_ub, stride_ug, stride_ob, stride_oh, stride_on,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr,
    DV: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IEEE: tl.constexpr, TWO_LOOPS: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries and head. Tau, Lse: contiguous [B, H, Nq]."""
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # the latest tiles have the most to do: first
    row = (program // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    g = h // group
    first_query = tile * QUERIES
    query = tl.arange(0, QUERIES)
    ok = query < num_queries - first_query
    at = row * num_queries + first_query
    here = first_query.to(tl.int64)
    q = _rows(Q + b * stride_qb + h * stride_qh + here * stride_qn, query, stride_qn, ok, DIM, D, True)
    time = tl.load(Time + b * stride_tb + h * stride_th + here + query, mask=ok, other=-NEVER)
    tau = tl.zeros([QUERIES], tl.float32)
    if HAS_GATE:
        tau = tl.load(Tau + at + query, mask=ok, other=float("inf"))
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DV], tl.float32)
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    Birth += b * stride_lb + g * stride_lg
    Death += b * stride_lb + g * stride_lg
    Bias += b * stride_bb + g * stride_bg
    U += b * stride_ub + g * stride_ug
    Runs += b * stride_rb + g * stride_rg + (h % group) * stride_rr
    for generation in range(0, generations):
        first, inner, outer, last = _run(Runs, tile * generations + generation)
        if TWO_LOOPS:
            for step in range(0, outer - inner, KEYS):
                begin = inner + step
                acc, top, total = _visit_forward(
                    q, acc, top, total, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn, stride_vn,
                    scale2, KEYS, DIM, D, VDIM, DV, False, HAS_BIAS, HAS_GATE, IEEE,
                )  # fmt: skip
            unmasked = outer - inner
        else:
            unmasked = outer - outer
            inner = last
        for place in range(first, last - unmasked, KEYS):
            begin = place + tl.where(place >= inner, unmasked, 0)
            acc, top, total = _visit_forward(
                q, acc, top, total, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn, stride_vn,
                scale2, KEYS, DIM, D, VDIM, DV, True, HAS_BIAS, HAS_GATE, IEEE,
            )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)  # who met nobody: top is -inf, and so is lse
    lse = (top + tl.log2(some)) * LN2
    value = acc / some[:, None]
    _write_rows(Out + b * stride_ob + h * stride_oh + here * stride_on, query, stride_on, value, ok, VDIM, DV)
    tl.store(Lse + at + query, lse, mask=ok)


@triton.jit
def _visit_query_gradient(
    q, dout, lse2, delta, dq, dtau, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn, stride_vn, scale2,
    KEYS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of keys for the gradient of the tile of queries."""
    k, v, score, share = _visit(
        q, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn, stride_vn, scale2,
        KEYS, DIM, D, VDIM, DV, MASKED, HAS_BIAS, HAS_GATE, IEEE,
    )  # fmt: skip
    dscore = tl.exp2(score - lse2[:, None]) * (_dot(dout, tl.trans(v), IEEE) - delta[:, None])
    if HAS_GATE:
        dtau -= tl.sum(tl.where((share > 0.0) & (share < 1.0), dscore, 0.0), 1)
        dscore = tl.where(share > 0.0, dscore * share, 0.0)
    dq += _dot(dscore.to(k.dtype), k, IEEE)
    return dq, dtau


@triton.jit(do_not_specialize=["tiles", "group", "heads", "num_queries", "generations"])
def attend_query_gradient(
    Q, K, V, Birth, Death, Time, Runs, Bias, U, Tau, Dout, Lse, Delta, Dq, Dtau,
    tiles, group, heads, num_queries, generations, scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_lb, stride_lg, stride_tb, stride_th, stride_rb, stride_rg, stride_rr, stride_bb, stride_bg,
    stride_ub, stride_ug, stride_ob, stride_oh, stride_on, stride_db, stride_dh, stride_dn,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr,
    DV: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IEEE: tl.constexpr, TWO_LOOPS: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries and head, over the runs of the forward pass.

    Lse (+inf for who met nobody), Delta, Tau, Dtau: contiguous float32 [B, H, Nq].
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    row = (program // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    g = h // group
    first_query = tile * QUERIES
    query = tl.arange(0, QUERIES)
    ok = query < num_queries - first_query
    at = row * num_queries + first_query
    here = first_query.to(tl.int64)
    q = _rows(Q + b * stride_qb + h * stride_qh + here * stride_qn, query, stride_qn, ok, DIM, D, True)
    dout = _rows(Dout + b * stride_ob + h * stride_oh + here * stride_on, query, stride_on, ok, VDIM, DV, True)
    time = tl.load(Time + b * stride_tb + h * stride_th + here + query, mask=ok, other=-NEVER)
    lse2 = tl.load(Lse + at + query, mask=ok, other=float("inf")) * LOG2E
    delta = tl.load(Delta + at + query, mask=ok, other=0.0)
    tau = tl.zeros([QUERIES], tl.float32)
    if HAS_GATE:
        tau = tl.load(Tau + at + query, mask=ok, other=float("inf"))
    dtau = tl.zeros([QUERIES], tl.float32)
    dq = tl.zeros([QUERIES, D], tl.float32)
    scale2 = scale * LOG2E
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    Birth += b * stride_lb + g * stride_lg
    Death += b * stride_lb + g * stride_lg
    Bias += b * stride_bb + g * stride_bg
    U += b * stride_ub + g * stride_ug
    Runs += b * stride_rb + g * stride_rg + (h % group) * stride_rr
    for generation in range(0, generations):
        first, inner, outer, last = _run(Runs, tile * generations + generation)
        if TWO_LOOPS:
            for step in range(0, outer - inner, KEYS):
                begin = inner + step
                dq, dtau = _visit_query_gradient(
                    q, dout, lse2, delta, dq, dtau, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn,
                    stride_vn, scale2, KEYS, DIM, D, VDIM, DV, False, HAS_BIAS, HAS_GATE, IEEE,
                )  # fmt: skip
            unmasked = outer - inner
        else:
            unmasked = outer - outer
            inner = last
        for place in range(first, last - unmasked, KEYS):
            begin = place + tl.where(place >= inner, unmasked, 0)
            dq, dtau = _visit_query_gradient(
                q, dout, lse2, delta, dq, dtau, K, V, Birth, Death, Bias, U, time, tau, begin, last, stride_kn,
                stride_vn, scale2, KEYS, DIM, D, VDIM, DV, True, HAS_BIAS, HAS_GATE, IEEE,
            )  # fmt: skip
    _write_rows(Dq + b * stride_db + h * stride_dh + here * stride_dn, query, stride_dn, dq * scale, ok, DIM, D)
    if HAS_GATE:
        tl.store(Dtau + at + query, dtau, mask=ok)


@triton.jit
def _visit_key_gradient(
    k, v, dk, dv, dbias, du, Q, Dout, Time, Lse, Delta, Tau, birth, death, bias2, u, begin, last, stride_qn,
    stride_on, scale2,
    QUERIES: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of queries, begin..begin+QUERIES-1, for the gradient of the tile of keys. Scores are [keys, queries]."""
    here = tl.cast(begin, tl.int64)  # a plain number in the interpreter
    row = tl.arange(0, QUERIES)
    ok = row < last - begin
    q = _rows(Q + here * stride_qn, row, stride_qn, ok, DIM, D, MASKED)
    dout = _rows(Dout + here * stride_on, row, stride_on, ok, VDIM, DV, MASKED)
    if MASKED:
        lse2 = tl.load(Lse + here + row, mask=ok, other=float("inf")) * LOG2E
        delta = tl.load(Delta + here + row, mask=ok, other=0.0)
    else:
        lse2 = tl.load(Lse + here + row) * LOG2E
        delta = tl.load(Delta + here + row)
    score = _dot(k, tl.trans(q), IEEE) * scale2
    if HAS_BIAS:
        score += bias2[:, None]
    if MASKED:
        time = tl.load(Time + here + row, mask=ok, other=-NEVER)
        score = _meet(score, birth[:, None], death[:, None], time[None, :])
    if HAS_GATE:
        tau = tl.load(Tau + here + row, mask=ok, other=float("inf"))
        share = tl.minimum(u[:, None] - tau[None, :], 1.0)
        score = tl.where(share > 0.0, score, float("-inf"))
    weight = tl.exp2(score - lse2[None, :])
    shared = weight
    if HAS_GATE:
        shared = tl.where(share > 0.0, weight * share, 0.0)
    dv += _dot(shared.to(dout.dtype), dout, IEEE)
    dscore = weight * (_dot(v, tl.trans(dout), IEEE) - delta[None, :])
    if HAS_GATE:
        du += tl.sum(tl.where((share > 0.0) & (share < 1.0), dscore, 0.0), 1)
        dscore = tl.where(share > 0.0, dscore * share, 0.0)
    if HAS_BIAS:
        dbias += tl.sum(dscore, 1)
    dk += _dot(dscore.to(q.dtype), q, IEEE)
    return dk, dv, dbias, du


@triton.jit(do_not_specialize=["items", "tiles", "group", "kv_heads", "num_queries", "num_keys", "partials"])
def attend_key_gradient(
    Q, K, V, Birth, Death, Order, Time, Tiles, Runs, Items, Bias, U, Tau, Dout, Lse, Delta, Dk, Dv, Dbias, Du,
    PartialK, PartialV, PartialBias, PartialU,
    items, tiles, group, kv_heads, num_queries, num_keys, partials, scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_lb, stride_lg, stride_tb, stride_th, stride_cb, stride_cg, stride_rb, stride_rg, stride_rr,
    stride_ib, stride_ig, stride_bb, stride_bg, stride_ub, stride_ug, stride_ob, stride_oh, stride_on,
    stride_dkb, stride_dkg, stride_dkn, stride_dvb, stride_dvg, stride_dvn,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr,
    DV: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IEEE: tl.constexpr, TWO_LOOPS: tl.constexpr,
):  # fmt: skip
    """One program per item: a tile of keys, or one segment of its run; summed over the query heads of the group.

    Whole tiles write dk, dv, dbias, du in place; segments write partial sums, float32 [B G, partials, KEYS, ..].
    Dbias, Du: contiguous float32 [B, G, Nk].
    """
    program = tl.program_id(0)
    row = program // items
    b, g = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    row = row.to(tl.int64)
    Item = Items + b * stride_ib + g * stride_ig + (program % items) * 2
    tile, segment = tl.load(Item), tl.load(Item + 1)
    if tile >= 0:
        Tile = Tiles + b * stride_cb + g * stride_cg + tile * 4
        first_key, last_key, slot, segments = tl.load(Tile), tl.load(Tile + 1), tl.load(Tile + 2), tl.load(Tile + 3)
        key = tl.arange(0, KEYS)
        ok = key < last_key - first_key
        sorted_at = b * stride_lb + g * stride_lg + first_key
        place = tl.load(Order + sorted_at + key, mask=ok, other=0).to(tl.int64)
        k = _rows(K + b * stride_kb + g * stride_kg, place, stride_kn, ok, DIM, D, True)
        v = _rows(V + b * stride_vb + g * stride_vg, place, stride_vn, ok, VDIM, DV, True)
        birth = tl.load(Birth + sorted_at + key, mask=ok, other=NEVER)
        death = tl.load(Death + sorted_at + key, mask=ok, other=-NEVER)
        bias2 = tl.zeros([KEYS], tl.float32)
        u = tl.zeros([KEYS], tl.float32)
        if HAS_BIAS:
            bias2 = tl.load(Bias + b * stride_bb + g * stride_bg + first_key + key, mask=ok, other=0.0) * LOG2E
        if HAS_GATE:
            u = tl.load(U + b * stride_ub + g * stride_ug + first_key + key, mask=ok, other=-float("inf"))
        dk = tl.zeros([KEYS, D], tl.float32)
        dv = tl.zeros([KEYS, DV], tl.float32)
        dbias = tl.zeros([KEYS], tl.float32)
        du = tl.zeros([KEYS], tl.float32)
        scale2 = scale * LOG2E
        Runs += b * stride_rb + g * stride_rg
        for head in range(0, group):
            h = g * group + head
            at = (b * kv_heads * group + h) * num_queries
            first, inner, outer, last = _run(Runs + head * stride_rr, tile)
            Qh = Q + b * stride_qb + h * stride_qh
            Doh = Dout + b * stride_ob + h * stride_oh
            Th = Time + b * stride_tb + h * stride_th
            if TWO_LOOPS:
                unmasked = (outer - inner) // QUERIES
                begin_unmasked = inner + (segment * unmasked) // segments * QUERIES
                end_unmasked = inner + ((segment + 1) * unmasked) // segments * QUERIES
                for step in range(0, end_unmasked - begin_unmasked, QUERIES):
                    begin = begin_unmasked + step
                    dk, dv, dbias, du = _visit_key_gradient(
                        k, v, dk, dv, dbias, du, Qh, Doh, Th, Lse + at, Delta + at, Tau + at, birth, death, bias2, u,
                        begin, last, stride_qn, stride_on, scale2,
                        QUERIES, DIM, D, VDIM, DV, False, HAS_BIAS, HAS_GATE, IEEE,
                    )  # fmt: skip
                skipped = outer - inner
            else:
                skipped = outer - outer
            masked = (last - first - skipped + QUERIES - 1) // QUERIES
            start = first + (segment * masked) // segments * QUERIES
            end = first + ((segment + 1) * masked) // segments * QUERIES
            for begin in range(start, end, QUERIES):
                if TWO_LOOPS:
                    begin += tl.where(begin >= inner, skipped, 0)
                dk, dv, dbias, du = _visit_key_gradient(
                    k, v, dk, dv, dbias, du, Qh, Doh, Th, Lse + at, Delta + at, Tau + at, birth, death, bias2, u,
                    begin, last, stride_qn, stride_on, scale2,
                    QUERIES, DIM, D, VDIM, DV, True, HAS_BIAS, HAS_GATE, IEEE,
                )  # fmt: skip
        # Read again: what the loop does not need should not hold registers through it.
        first_key, last_key = tl.load(Tile, volatile=True), tl.load(Tile + 1, volatile=True)
        slot, segments = tl.load(Tile + 2, volatile=True), tl.load(Tile + 3, volatile=True)
        ok = key < last_key - first_key
        sorted_at = b * stride_lb + g * stride_lg + first_key
        if segments == 1:
            place = tl.load(Order + sorted_at + key, mask=ok, other=0, volatile=True).to(tl.int64)
            _write_rows(Dk + b * stride_dkb + g * stride_dkg, place, stride_dkn, dk * scale, ok, DIM, D)
            _write_rows(Dv + b * stride_dvb + g * stride_dvg, place, stride_dvn, dv, ok, VDIM, DV)
            if HAS_BIAS:
                tl.store(Dbias + row * num_keys + place, dbias, mask=ok)
            if HAS_GATE:
                tl.store(Du + row * num_keys + place, du, mask=ok)
        else:
            partial = (row * partials + slot + segment) * KEYS
            _write_rows(PartialK + partial * D, key, D, dk * scale, ok, D, D)
            _write_rows(PartialV + partial * DV, key, DV, dv, ok, DV, DV)
            if HAS_BIAS:
                tl.store(PartialBias + partial + key, dbias, mask=ok)
            if HAS_GATE:
                tl.store(PartialU + partial + key, du, mask=ok)


@triton.jit(do_not_specialize=["tiles", "kv_heads", "num_keys", "partials"])
def attend_sum_segments(
    Order, Tiles, PartialK, PartialV, PartialBias, PartialU, Dk, Dv, Dbias, Du,
    tiles, kv_heads, num_keys, partials,
    stride_lb, stride_lg, stride_cb, stride_cg, stride_dkb, stride_dkg, stride_dkn, stride_dvb, stride_dvg, stride_dvn,
    KEYS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys: where its run was split, the partial sums in their order."""
    program = tl.program_id(0)
    tile, row = program % tiles, (program // tiles).to(tl.int64)
    b, g = row // kv_heads, row % kv_heads
    Tile = Tiles + b * stride_cb + g * stride_cg + tile * 4
    first_key, last_key, slot, segments = tl.load(Tile), tl.load(Tile + 1), tl.load(Tile + 2), tl.load(Tile + 3)
    if segments > 1:
        key = tl.arange(0, KEYS)
        ok = key < last_key - first_key
        place = tl.load(Order + b * stride_lb + g * stride_lg + first_key + key, mask=ok, other=0).to(tl.int64)
        dk = tl.zeros([KEYS, D], tl.float32)
        dv = tl.zeros([KEYS, DV], tl.float32)
        dbias = tl.zeros([KEYS], tl.float32)
        du = tl.zeros([KEYS], tl.float32)
        for segment in range(0, segments):
            partial = (row * partials + slot + segment) * KEYS
            dk += _rows(PartialK + partial * D, key, D, ok, D, D, True)
            dv += _rows(PartialV + partial * DV, key, DV, ok, DV, DV, True)
            if HAS_BIAS:
                dbias += tl.load(PartialBias + partial + key, mask=ok, other=0.0)
            if HAS_GATE:
                du += tl.load(PartialU + partial + key, mask=ok, other=0.0)
        _write_rows(Dk + b * stride_dkb + g * stride_dkg, place, stride_dkn, dk, ok, DIM, D)
        _write_rows(Dv + b * stride_dvb + g * stride_dvg, place, stride_dvn, dv, ok, VDIM, DV)
        if HAS_BIAS:
            tl.store(Dbias + row * num_keys + place, dbias, mask=ok)
        if HAS_GATE:
            tl.store(Du + row * num_keys + place, du, mask=ok)

"""The kernels of `diagonal_scan`: inside chunks token by token and in parallel, between chunks one after another.

A program has one chunk (`scan_between`: one row) of CHANNELS channels; what they remember, [N, CHANNELS], stays in
registers. It owns what it writes: no atomics, the same bits in every run. All states are float32 and lie as
[B, chunks, n, C]; parameters as [n, C]; x, y and their gradients as [B, T, C]; resets as bytes [B, T]. N is n padded
to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def _load(X, n, channels, N: tl.constexpr, CHANNELS: tl.constexpr):
    """[N, CHANNELS] at this program's channels from X [n, C]; zeros beyond."""
    row = tl.arange(0, N)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    ok = (row[:, None] < n) & (channel[None, :] < channels)
    return tl.load(X + row[:, None] * channels + channel[None, :], mask=ok, other=0.0)


@triton.jit
def _store(X, value, n, channels, N: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.arange(0, N)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    ok = (row[:, None] < n) & (channel[None, :] < channels)
    tl.store(X + row[:, None] * channels + channel[None, :], value, mask=ok)


@triton.jit
def _place(tokens, chunks, CHUNK: tl.constexpr):
    """Of this program: example, chunk as a row of all states, first token and the one behind the last."""
    b, chunk = tl.program_id(1) // chunks, tl.program_id(1) % chunks
    begin = chunk * CHUNK
    return b.to(tl.int64), (b.to(tl.int64) * chunks + chunk), begin, tl.minimum(begin + CHUNK, tokens)


@triton.jit
def scan_ends(
    X, Reset, LogDecay, In, Ends, tokens, chunks, n, channels,
    CHUNK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """The state behind each chunk, from its own tokens alone."""
    b, state, begin, end = _place(tokens, chunks, CHUNK)
    decay = tl.exp(_load(LogDecay, n, channels, N, CHANNELS))
    taken = _load(In, n, channels, N, CHANNELS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    h = tl.zeros([N, CHANNELS], tl.float32)
    for t in range(begin, end):
        x = tl.load(X + (b * tokens + t) * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
        if HAS_RESET:
            h = tl.where(tl.load(Reset + b * tokens + t) != 0, 0.0, h)
        h = decay * h + taken * x[None, :]
    _store(Ends + state * n * channels, h, n, channels, N, CHANNELS)


@triton.jit
def scan_between(
    Added, Keep, LogDecay, First, States, Last, tokens, chunks, n, channels,
    CHUNK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From First through all chunks, h <- Keep exp(log_decay) ^ (tokens of the chunk) h + Added, to Last; States are
    the h before each. REVERSE: from the last chunk to the first."""
    b = tl.program_id(1).to(tl.int64)
    log_decay = _load(LogDecay, n, channels, N, CHANNELS)
    size = n * channels
    h = _load(First + b * size, n, channels, N, CHANNELS)
    for step in range(0, chunks):
        if REVERSE:
            chunk = chunks - 1 - step
        else:
            chunk = step
        state = b * chunks + chunk
        _store(States + state * size, h, n, channels, N, CHANNELS)
        length = tl.minimum(CHUNK, tokens - chunk * CHUNK).to(tl.float32)
        decayed = tl.load(Keep + state) * tl.exp(log_decay * length) * h
        h = decayed + _load(Added + state * size, n, channels, N, CHANNELS)
    _store(Last + b * size, h, n, channels, N, CHANNELS)


@triton.jit
def scan_outputs(
    X, Reset, LogDecay, In, Out, Starts, Y, tokens, chunks, n, channels,
    CHUNK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """The outputs of each chunk, from the state before it."""
    b, state, begin, end = _place(tokens, chunks, CHUNK)
    decay = tl.exp(_load(LogDecay, n, channels, N, CHANNELS))
    taken = _load(In, n, channels, N, CHANNELS)
    given = _load(Out, n, channels, N, CHANNELS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    h = _load(Starts + state * n * channels, n, channels, N, CHANNELS)
    for t in range(begin, end):
        at = (b * tokens + t) * channels + channel
        x = tl.load(X + at, mask=channel < channels, other=0.0).to(tl.float32)
        if HAS_RESET:
            h = tl.where(tl.load(Reset + b * tokens + t) != 0, 0.0, h)
        h = decay * h + taken * x[None, :]
        tl.store(Y + at, tl.sum(given * h, 0), mask=channel < channels)


@triton.jit
def scan_start_gradients(
    Dy, Reset, LogDecay, Out, Added, tokens, chunks, n, channels,
    CHUNK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each chunk, through its own outputs alone."""
    b, state, begin, end = _place(tokens, chunks, CHUNK)
    decay = tl.exp(_load(LogDecay, n, channels, N, CHANNELS))
    given = _load(Out, n, channels, N, CHANNELS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    g = tl.zeros([N, CHANNELS], tl.float32)
    for step in range(0, end - begin):
        t = end - 1 - step
        at = (b * tokens + t) * channels + channel
        g += given * tl.load(Dy + at, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        g *= decay
        if HAS_RESET:
            g = tl.where(tl.load(Reset + b * tokens + t) != 0, 0.0, g)
    _store(Added + state * n * channels, g, n, channels, N, CHANNELS)


@triton.jit
def scan_input_gradients(
    Dy, Reset, LogDecay, In, Out, Dends, Dx, tokens, chunks, n, channels,
    CHUNK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """The gradients of x in each chunk, from that of the state behind it."""
    b, state, begin, end = _place(tokens, chunks, CHUNK)
    decay = tl.exp(_load(LogDecay, n, channels, N, CHANNELS))
    taken = _load(In, n, channels, N, CHANNELS)
    given = _load(Out, n, channels, N, CHANNELS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    g = _load(Dends + state * n * channels, n, channels, N, CHANNELS)
    for step in range(0, end - begin):
        t = end - 1 - step
        at = (b * tokens + t) * channels + channel
        g += given * tl.load(Dy + at, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        tl.store(Dx + at, tl.sum(taken * g, 0), mask=channel < channels)
        g *= decay
        if HAS_RESET:
            g = tl.where(tl.load(Reset + b * tokens + t) != 0, 0.0, g)


@triton.jit
def scan_parameter_gradients(
    X, Dy, Reset, LogDecay, In, Out, Starts, Dends, DlogDecay, Din, Dout, tokens, chunks, n, channels,
    CHUNK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the gradients of the parameters, as states [B, chunks, n, C].

    Forward in time, with the derivatives of h by log_decay and b beside h: nothing is kept for a way back. They begin
    at 0: what earlier chunks do to this one is in the gradient of the states behind them.
    """
    b, state, begin, end = _place(tokens, chunks, CHUNK)
    decay = tl.exp(_load(LogDecay, n, channels, N, CHANNELS))
    taken = _load(In, n, channels, N, CHANNELS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    h = _load(Starts + state * n * channels, n, channels, N, CHANNELS)
    by_decay = tl.zeros([N, CHANNELS], tl.float32)
    by_in = tl.zeros([N, CHANNELS], tl.float32)
    through_decay = tl.zeros([N, CHANNELS], tl.float32)
    through_in = tl.zeros([N, CHANNELS], tl.float32)
    dout = tl.zeros([N, CHANNELS], tl.float32)
    for t in range(begin, end):
        at = (b * tokens + t) * channels + channel
        x = tl.load(X + at, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        dy = tl.load(Dy + at, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        if HAS_RESET:
            reset = tl.load(Reset + b * tokens + t) != 0
            h = tl.where(reset, 0.0, h)
            by_decay = tl.where(reset, 0.0, by_decay)
            by_in = tl.where(reset, 0.0, by_in)
        by_decay = decay * (by_decay + h)
        by_in = decay * by_in + x
        h = decay * h + taken * x
        through_decay += by_decay * dy
        through_in += by_in * dy
        dout += h * dy
    given = _load(Out, n, channels, N, CHANNELS)
    dend = _load(Dends + state * n * channels, n, channels, N, CHANNELS)
    at = state * n * channels
    _store(DlogDecay + at, given * through_decay + dend * by_decay, n, channels, N, CHANNELS)
    _store(Din + at, given * through_in + dend * by_in, n, channels, N, CHANNELS)
    _store(Dout + at, dout, n, channels, N, CHANNELS)

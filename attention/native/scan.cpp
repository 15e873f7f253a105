// `diagonal_scan` on a CPU, forward and backward: the recurrence token by token, a register of channels at once.
//
// Legend: B examples, T tokens, C channels (a multiple of 16), N numbers that a channel remembers. x, dy, y, dx are
// [B, T, C]; decay, b, c [N, C]; h0, h and what is summed over the tokens of an example [B, N, C].

#include "vectors.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t CHUNK = 64;  // tokens, whose states the backward pass holds at once

struct Parameters {
    const float *decay, *b, *c;
    int64_t T, C, N;
};

// The state of LANES channels of one example, [N][LANES].
class State {
  public:
    State(const Parameters& given, int64_t channel, const float* h0) : given(given), channel(channel), h(given.N) {
        for (int64_t n = 0; n < given.N; ++n) h[n] = load(h0 + n * given.C + channel);
    }
    void forget() { std::fill(h.begin(), h.end(), Floats{}); }

    // One token further; returns its y.
    Floats step(Floats x) {
        Floats y{};
        for (int64_t n = 0; n < given.N; ++n) {
            const int64_t place = n * given.C + channel;
            h[n] = load(given.decay + place) * h[n] + load(given.b + place) * x;
            y += load(given.c + place) * h[n];
        }
        return y;
    }

    const Parameters& given;
    const int64_t channel;
    std::vector<Floats> h;
};

// Sums over tokens: short ones in floats, the long one in doubles.
struct Sums {
    explicit Sums(int64_t number) : recent(number), total(number * LANES) {}
    void settle() {
        for (size_t n = 0; n < recent.size(); ++n) {
            for (int i = 0; i < LANES; ++i) total[n * LANES + i] += recent[n][i];
            recent[n] = Floats{};
        }
    }
    void write(float* to, int64_t step) const {
        for (size_t n = 0; n < recent.size(); ++n)
            for (int i = 0; i < LANES; ++i) to[n * step + i] = float(total[n * LANES + i]);
    }
    std::vector<Floats> recent;
    std::vector<double> total;
};

void backward(const Parameters& given, const float* x, const float* dy, const uint8_t* reset, int64_t channel,
              const float* h0, const float* dh, float* dx, float* dlog_decay, float* db, float* dc, float* dh0) {
    const int64_t N = given.N, C = given.C, T = given.T, chunks = (T + CHUNK - 1) / CHUNK;
    State state(given, channel, h0);
    std::vector<Floats> starts(chunks * N), before(CHUNK * N), g(N);
    for (int64_t t = 0; t < T; ++t) {
        if (t % CHUNK == 0) std::copy(state.h.begin(), state.h.end(), starts.begin() + t / CHUNK * N);
        if (reset && reset[t]) state.forget();
        state.step(load(x + t * C + channel));
    }
    Sums of_decay(N), of_b(N), of_c(N);
    for (int64_t n = 0; n < N; ++n) g[n] = load(dh + n * C + channel);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t begin = chunk * CHUNK, end = std::min(T, begin + CHUNK);
        std::copy_n(starts.begin() + chunk * N, N, state.h.begin());
        for (int64_t t = begin; t < end; ++t) {
            if (reset && reset[t]) state.forget();
            std::copy(state.h.begin(), state.h.end(), before.begin() + (t - begin) * N);
            state.step(load(x + t * C + channel));
        }
        for (int64_t t = end - 1; t >= begin; --t) {
            const Floats own = load(x + t * C + channel), down = load(dy + t * C + channel);
            const bool forgets = reset && reset[t];
            Floats sum{};
            for (int64_t n = 0; n < N; ++n) {
                const int64_t place = n * C + channel;
                const Floats b = load(given.b + place);
                const Floats decayed = load(given.decay + place) * before[(t - begin) * N + n];
                const Floats adjoint = g[n] + load(given.c + place) * down;
                of_c.recent[n] += down * (decayed + b * own);
                of_b.recent[n] += adjoint * own;
                of_decay.recent[n] += adjoint * decayed;
                sum += adjoint * b;
                g[n] = forgets ? Floats{} : adjoint * load(given.decay + place);
            }
            store(dx + t * C + channel, sum);
        }
        of_decay.settle(), of_b.settle(), of_c.settle();
    }
    of_decay.write(dlog_decay + channel, C), of_b.write(db + channel, C), of_c.write(dc + channel, C);
    for (int64_t n = 0; n < N; ++n) store(dh0 + n * C + channel, g[n]);
}

}  // namespace

// reset [B, T] bytes, or null.
extern "C" void scan_forward(const float* x, const float* decay, const float* b, const float* c, const float* h0,
                             const uint8_t* reset, int64_t B, int64_t T, int64_t C, int64_t N, int64_t threads, float* y,
                             float* h) {
    const Parameters given{decay, b, c, T, C, N};
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
    for (int64_t example = 0; example < B; ++example)
        for (int64_t channel = 0; channel < C; channel += LANES) {
            State state(given, channel, h0 + example * N * C);
            for (int64_t t = 0; t < T; ++t) {
                const int64_t place = (example * T + t) * C + channel;
                if (reset && reset[example * T + t]) state.forget();
                store(y + place, state.step(load(x + place)));
            }
            for (int64_t n = 0; n < N; ++n) store(h + (example * N + n) * C + channel, state.h[n]);
        }
}

extern "C" void scan_backward(const float* dy, const float* dh, const float* x, const float* decay, const float* b,
                              const float* c, const float* h0, const uint8_t* reset, int64_t B, int64_t T, int64_t C,
                              int64_t N, int64_t threads, float* dx, float* dlog_decay, float* db, float* dc,
                              float* dh0) {
    const Parameters given{decay, b, c, T, C, N};
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
    for (int64_t example = 0; example < B; ++example)
        for (int64_t channel = 0; channel < C; channel += LANES) {
            const int64_t rows = example * T * C, numbers = example * N * C;
            backward(given, x + rows, dy + rows, reset ? reset + example * T : nullptr, channel, h0 + numbers,
                     dh + numbers, dx + rows, dlog_decay + numbers, db + numbers, dc + numbers, dh0 + numbers);
        }
}

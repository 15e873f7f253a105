// The codes of keys, sums of vectors by code, and what earlier blocks hold of each code: see attention/ops/codes.py.
//
// Legend: B examples, G key heads, T tokens, N blocks of L tokens, S codes, D width of keys, V of values. Threads take
// examples, heads, and stretches of tokens or columns.

#include "vectors.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace {

constexpr int64_t COLUMNS = 32;

struct Shape {
    int64_t B, G, N, L, S, V, threads;
};

template <class Work>
void for_each(const Shape& shape, const Work& work) {
    const int64_t parts = (shape.V + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(shape.threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < shape.B * shape.G * parts; ++task) {
        const int64_t first = task % parts * COLUMNS;
        work(task / parts, first, std::min(COLUMNS, shape.V - first));
    }
}

// The number that stands beside the largest value, of equals the least; one that is no number is larger than all.
inline int32_t first_of_largest(Floats values, Ints numbers) {
    int best = 0;
    for (int i = 1; i < LANES; ++i) {
        const bool none = values[i] != values[i], none_yet = values[best] == values[best];
        const bool equal = values[i] == values[best] || (none && !none_yet);
        if (values[i] > values[best] || (none && none_yet) || (equal && numbers[i] < numbers[best])) best = i;
    }
    return numbers[best];
}

}  // namespace

// code [B, G, T]: the number of the code nearest to each key k [B, G, T, D], given the steps of k along B, G and T. The
// codebook lies turned, [G, D, S], S a multiple of 16, with half its squared norms [G, S] beside it, infinite for codes
// that are none. A product depends on its key and code alone, not on what else is asked for.
extern "C" void nearest_code(const float* k, const int64_t* steps, const float* codebook, const float* half_norm,
                             int64_t B, int64_t G, int64_t T, int64_t D, int64_t S, int64_t threads, int32_t* code) {
    constexpr int64_t STRETCH = 512;
    const int64_t stretches = (T + STRETCH - 1) / STRETCH;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < B * G * stretches; ++task) {
        const int64_t row = task / stretches, g = row % G, first = task % stretches * STRETCH;
        const float* keys = k + row / G * steps[0] + g * steps[1];
        const int64_t end = std::min(T, first + STRETCH);
        for (int64_t t = first; t < end; t += QUERIES) {
            const float* of[QUERIES];
            for (int i = 0; i < QUERIES; ++i) of[i] = keys + std::min(t + i, end - 1) * steps[2];
            Floats best[QUERIES];
            Ints which[QUERIES];
            for (int i = 0; i < QUERIES; ++i) best[i] = all(-std::numeric_limits<float>::infinity()), which[i] = count();
            for (int64_t s = 0; s < S; s += LANES) {
                // (|k|^2 - |k - C|^2) / 2, of the same order as the distances turned round
                Floats near[QUERIES] = {};
                const float* column = codebook + g * D * S + s;
                for (int64_t d = 0; d < D; ++d, column += S) {
                    const Floats codes = load(column);
                    for (int i = 0; i < QUERIES; ++i) near[i] += of[i][d] * codes;
                }
                const Ints number = count() + int32_t(s);
                for (int i = 0; i < QUERIES; ++i) {
                    near[i] -= load(half_norm + g * S + s);
                    const Ints better = (near[i] > best[i]) | ((near[i] != near[i]) & (best[i] == best[i]));
                    best[i] = better ? near[i] : best[i], which[i] = better ? number : which[i];
                }
            }
            for (int i = 0; i < QUERIES && t + i < end; ++i) code[row * T + t + i] = first_of_largest(best[i], which[i]);
        }
    }
}

// How many of the tokens have each code, count [R, S], and the sums of their vectors x [R, T, V], sums [R, S, V]; both
// are zeros before.
extern "C" void code_sums(const int32_t* code, const float* x, int64_t R, int64_t T, int64_t S, int64_t V,
                          int64_t threads, float* count, float* sums) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < R; ++row)
        for (int64_t token = row * T; token < (row + 1) * T; ++token) {
            const int64_t place = row * S + code[token];
            count[place] += 1;
            for (int64_t d = 0; d < V; ++d) sums[place * V + d] += x[token * V + d];
        }
}

// code [B, G, N, L], v [.., V]; goes_on, whole [B, N]; count, old, new [B, G, N, S], mean [.., V]. Of the first block
// count and mean are given.
extern "C" void code_prefix_forward(const Shape* given, const int32_t* code, const float* v, const float* goes_on,
                                    const float* whole, float* count, float* mean, float* old_share, float* new_share) {
    const Shape& shape = *given;
    for_each(shape, [&](int64_t row, int64_t first, int64_t width) {
        std::vector<float> sums(shape.S * width), numbers(shape.S), counted(shape.S);
        std::copy_n(count + row * shape.N * shape.S, shape.S, counted.begin());
        for (int64_t n = 0; n + 1 < shape.N; ++n) {
            const int64_t block = row * shape.N + n, flag = row / shape.G * shape.N + n;
            std::fill(sums.begin(), sums.end(), 0.0f), std::fill(numbers.begin(), numbers.end(), 0.0f);
            for (int64_t l = 0; l < shape.L; ++l) {
                const int64_t token = block * shape.L + l;
                const float* from = v + token * shape.V + first;
                float* to = sums.data() + code[token] * width;
                for (int64_t d = 0; d < width; ++d) to[d] += from[d];
                numbers[code[token]] += 1;
            }
            for (int64_t s = 0; s < shape.S; ++s) {
                const float total = counted[s] + numbers[s] * whole[flag];
                const float share = goes_on[flag + 1] / std::max(total, 1.0f);
                const float kept = counted[s] * share, added = whole[flag] * share;
                const int64_t here = block * shape.S + s;
                const float* from = mean + here * shape.V + first;
                float* to = mean + (here + shape.S) * shape.V + first;
                for (int64_t d = 0; d < width; ++d) to[d] = from[d] * kept + sums[s * width + d] * added;
                counted[s] = total * goes_on[flag + 1];
                if (first == 0) old_share[here] = kept, new_share[here] = added, count[here + shape.S] = counted[s];
            }
        }
    });
}

// dv [B, G, N, L, V] from dmean [B, G, N, S, V]; the gradient of the first block's mean, [B, G, S, V], in `total`.
extern "C" void code_prefix_backward(const Shape* given, const int32_t* code, const float* old_share,
                                     const float* new_share, const float* dmean, float* dv, float* total) {
    const Shape& shape = *given;
    for_each(shape, [&](int64_t row, int64_t first, int64_t width) {
        float* sum = total + row * shape.S * shape.V + first;
        for (int64_t n = shape.N - 1; n >= 0; --n) {
            const int64_t block = row * shape.N + n;
            const bool last = n == shape.N - 1;
            for (int64_t l = 0; l < shape.L; ++l) {
                const int64_t token = block * shape.L + l, s = code[token];
                const float share = last ? 0.0f : new_share[block * shape.S + s];
                float* to = dv + token * shape.V + first;
                for (int64_t d = 0; d < width; ++d) to[d] = last ? 0.0f : share * sum[s * shape.V + d];
            }
            for (int64_t s = 0; s < shape.S; ++s) {
                const int64_t here = block * shape.S + s;
                const float share = last ? 0.0f : old_share[here];
                const float* from = dmean + here * shape.V + first;
                float* to = sum + s * shape.V;
                for (int64_t d = 0; d < width; ++d) to[d] = from[d] + (last ? 0.0f : share * to[d]);
            }
        }
    });
}

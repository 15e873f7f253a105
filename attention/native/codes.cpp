// What earlier blocks hold of each code, as count and mean value, and the way back: see `code_prefix`.
//
// Legend: B examples, G key heads, N blocks of L tokens, S codes, V width of values. Threads take examples, heads and
// stretches of columns.

#include <algorithm>
#include <cstdint>
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

}  // namespace

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

// Vectors of floats as wide as the processor's registers, and what the kernels do with them.
//
// Operations are those of GCC and Clang on vector types, so each processor gets its own instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, KEYS = 12, QUERIES = 8;  // floats of a register; rows of a product computed at once
#elif defined(__AVX__)
constexpr int LANES = 8, KEYS = 6, QUERIES = 4;
#else
constexpr int LANES = 4, KEYS = 8, QUERIES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

static inline Floats all(float x) { return Floats{} + x; }

static inline Ints all(int32_t x) { return Ints{} + x; }

static inline Floats larger(Floats x, Floats y) { return x > y ? x : y; }

static inline float sum(Floats x) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

// 0, 1, 2, ..
static inline Ints count() {
    Ints x;
    for (int lane = 0; lane < LANES; ++lane) x[lane] = lane;
    return x;
}

// 2^x for x <= 127, 0 below -126; to 2 units in the last place. With x = n + f, |f| <= 1/2: the exponent n,
// and for 2^f the polynomial of degree 6 that is 1 at 0 and has the least relative error (2e-9) in between.
static inline Floats power_of_2(Floats x) {
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: beside it a float has no room for a fraction
    Floats at_least = larger(x, all(-127.0f));
    at_least = x == x ? at_least : x;
    const Floats n = (at_least + shift) - shift, f = at_least - n;
    Floats y = all(1.53533590e-4f);
    y = y * f + 1.33988750e-3f;
    y = y * f + 9.61843692e-3f;
    y = y * f + 5.55033237e-2f;
    y = y * f + 2.40226477e-1f;
    y = y * f + 6.93147182e-1f;
    y = y * f + 1.0f;
    const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < all(-126.0f) ? Floats{} : y * scale;
}

// `attend` on a CPU, forward and backward: tiles of queries against the keys that they meet, in float32.
//
// A tile lists its living keys in the order of their birth and walks them in blocks that stay in the nearest cache.
// Logits lie with the queries side by side, [key][query]: so rows of keys and values are read where they are, in any
// order, and everything between the products is done for a register of queries at once.
//
// Legend: B examples, H query heads, G key heads, r = H / G, Nq queries, Nk keys, D and V widths of keys and values
// (multiples of 16); m queries of a tile, w keys of a block.

#include "vectors.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>

namespace {

constexpr int TILE = 64;     // queries
constexpr int BLOCK = 128;   // keys
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr float NOBODY = -std::numeric_limits<float>::infinity();
constexpr float LARGEST_EXPONENT = 96;  // of pairs of share 0, which any finite weight serves

}  // namespace

extern "C" {

// A tensor [B, heads, n, ...]: where it begins, and steps in elements from one to the next along each axis; the last
// axis lies dense. data = null: not given.
struct Tensor {
    void* data;
    int64_t example, head, item;
};

struct Given {
    int64_t B, H, G, Nq, Nk, D, V;
    int64_t wanted;  // the first columns of k, a multiple of 16, want a gradient
    int64_t chunks, threads;
    Tensor start, stop;  // [B, G, r, Nk]: the queries that meet a key are start <= i < stop
    Tensor q, k, v, bias, u, tau, out, lse;
    // Of the backward pass alone.
    Tensor dout, dlse, dq, dk, dv, dbias, du, dtau;
};
}

namespace {

struct Call : Given {
    float scale;
};

template <class T = float>
T* at(const Tensor& x, int64_t example, int64_t head, int64_t item = 0) {
    return static_cast<T*>(x.data) + example * x.example + head * x.head + item * x.item;
}

// c[i] = sum over k of a[i][k] b[k], or added to what is there; KEYS rows of `width` columns, a multiple of LANES.
template <int WIDE, bool ADD>
inline void rows_strip(int depth, const float* const* a, const float* b, int64_t step, float* const* c, int column) {
    Floats sums[KEYS][WIDE];
    for (int i = 0; i < KEYS; ++i)
        for (int j = 0; j < WIDE; ++j) sums[i][j] = ADD ? load(c[i] + column + j * LANES) : Floats{};
    const float* row = b + column;
    for (int k = 0; k < depth; ++k, row += step) {
        Floats wide[WIDE];
        for (int j = 0; j < WIDE; ++j) wide[j] = load(row + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < KEYS; ++i)
            for (int j = 0; j < WIDE; ++j) sums[i][j] += a[i][k] * wide[j];
    }
    for (int i = 0; i < KEYS; ++i)
        for (int j = 0; j < WIDE; ++j) store(c[i] + column + j * LANES, sums[i][j]);
}

template <bool ADD>
inline void rows_times(int depth, const float* const* a, const float* b, int64_t step, float* const* c, int width) {
    int column = 0;
    for (; column + 2 * LANES <= width; column += 2 * LANES) rows_strip<2, ADD>(depth, a, b, step, c, column);
    for (; column < width; column += LANES) rows_strip<1, ADD>(depth, a, b, step, c, column);
}

// c[i] += sum over k of a[k][i] b[k]: QUERIES rows of the output, `step` apart, from columns of a.
template <int WIDE>
inline void columns_strip(int depth, const float* a, const float* const* b, float* c, int64_t step, int column) {
    Floats sums[QUERIES][WIDE];
    for (int i = 0; i < QUERIES; ++i)
        for (int j = 0; j < WIDE; ++j) sums[i][j] = load(c + i * step + column + j * LANES);
    for (int k = 0; k < depth; ++k, a += TILE) {
        Floats wide[WIDE];
        for (int j = 0; j < WIDE; ++j) wide[j] = load(b[k] + column + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < QUERIES; ++i)
            for (int j = 0; j < WIDE; ++j) sums[i][j] += a[i] * wide[j];
    }
    for (int i = 0; i < QUERIES; ++i)
        for (int j = 0; j < WIDE; ++j) store(c + i * step + column + j * LANES, sums[i][j]);
}

inline void columns_times(int depth, const float* a, const float* const* b, float* c, int rows, int width) {
    for (int first = 0; first < rows; first += QUERIES) {
        int column = 0;
        float* mine = c + first * width;
        for (; column + 2 * LANES <= width; column += 2 * LANES)
            columns_strip<2>(depth, a + first, b, mine, width, column);
        for (; column < width; column += LANES) columns_strip<1>(depth, a + first, b, mine, width, column);
    }
}

// The keys that the tiles of one list of lifetimes visit, tile after tile.
class Walk {
  public:
    // order: the keys that somebody meets, by start; start, stop [Nk].
    Walk(const std::vector<int32_t>& order, const int32_t* start, const int32_t* stop)
        : order(order), start(start), stop(stop) {}

    // Move on to the queries lo <= i < hi, behind those of the last call.
    const std::vector<int32_t>& move(int64_t lo, int64_t hi) {
        size_t kept = 0;
        for (int32_t key : living)
            if (stop[key] > lo) living[kept++] = key;
        living.resize(kept);
        for (; next < order.size() && start[order[next]] < hi; ++next)
            if (stop[order[next]] > lo) living.push_back(order[next]);
        return living;
    }

  private:
    const std::vector<int32_t>& order;
    const int32_t *start, *stop;
    std::vector<int32_t> living;
    size_t next = 0;
};

// The keys that somebody meets, by start, and where it is the same by number.
std::vector<int32_t> by_start(const int32_t* start, const int32_t* stop, int64_t number, int64_t queries) {
    std::vector<int32_t> first(queries + 1, 0);
    int64_t met = 0;
    for (int64_t key = 0; key < number; ++key)
        if (start[key] < stop[key]) ++first[start[key] + 1], ++met;
    for (int64_t query = 0; query < queries; ++query) first[query + 1] += first[query];
    std::vector<int32_t> order(met);
    for (int64_t key = 0; key < number; ++key)
        if (start[key] < stop[key]) order[first[start[key]]++] = int32_t(key);
    return order;
}

// All lists of lifetimes that differ, each sorted once.
struct Orders {
    explicit Orders(const Call& call) : call(call) {
        examples = call.start.example || call.stop.example ? call.B : 1;
        heads = call.start.head || call.stop.head ? call.G : 1;
        group = call.start.item || call.stop.item ? call.H / call.G : 1;
        lists.resize(examples * heads * group);
#pragma omp parallel for num_threads(call.threads)
        for (int64_t i = 0; i < int64_t(lists.size()); ++i) {
            const int64_t b = i / (heads * group), g = i / group % heads, r = i % group;
            lists[i] = by_start(start(b, g, r), stop(b, g, r), call.Nk, call.Nq);
        }
    }
    const int32_t* start(int64_t b, int64_t g, int64_t r) const {
        return at<int32_t>(call.start, b, g) + r * call.start.item;
    }
    const int32_t* stop(int64_t b, int64_t g, int64_t r) const {
        return at<int32_t>(call.stop, b, g) + r * call.stop.item;
    }
    Walk walk(int64_t b, int64_t g, int64_t r) const {
        const int64_t list = (b % examples * heads + g % heads) * group + r % group;
        return Walk(lists[list], start(b, g, r), stop(b, g, r));
    }
    const Call& call;
    int64_t examples, heads, group;
    std::vector<std::vector<int32_t>> lists;
};

// Which queries of a tile a block of keys meets, and with what bias and share.
struct Pairs {
    // Of the queries lo.., the keys at `list`.
    void read(const Call& call, const int32_t* list, int number, int64_t b, int64_t g, const int32_t* start,
              const int32_t* stop, int64_t lo, int queries) {
        const float* of_bias = call.bias.data ? at(call.bias, b, g) : nullptr;
        const float* of_u = call.u.data ? at(call.u, b, g) : nullptr;
        const float most = std::numeric_limits<float>::max();
        for (int w = 0; w < number; ++w) {
            const int32_t key = list[w];
            first[w] = int32_t(std::max<int64_t>(start[key] - lo, -1));
            last[w] = int32_t(std::min<int64_t>(stop[key] - lo, TILE));
            whole[w] = first[w] <= 0 && last[w] >= queries;
            bias[w] = of_bias ? of_bias[key * call.bias.item] * LOG2_E : 0.0f;
            const float score = of_u ? of_u[key * call.u.item] : 0.0f;  // where tau is -inf the share is 1, whatever u
            u[w] = score > most ? most : (score < -most ? -most : score);
        }
    }
    Ints met(int w, int lane) const {
        const Ints query = count() + lane;
        return (query >= all(first[w])) & (query < all(last[w]));
    }
    int32_t first[BLOCK], last[BLOCK];
    bool whole[BLOCK];
    float bias[BLOCK], u[BLOCK];
};

// clip(u - tau, 0, 1), no number where that is none.
inline Floats share_of(float u, Floats tau) {
    const Floats above = u - tau;
    return above >= all(1.0f) ? all(1.0f) : (above <= Floats{} ? Floats{} : above);
}

// Rows of `from` [count, width], times `factor`, as [TILE][width] and turned, [width][TILE]; zeros behind the last.
void turn(const Tensor& from, int64_t b, int64_t h, int64_t lo, int queries, int width, float factor, float* rows,
          float factor_turned, float* turned) {
    for (int m = 0; m < TILE; ++m) {
        if (m >= queries) {
            for (int d = 0; d < width; ++d) turned[d * TILE + m] = 0.0f;
            if (rows) std::fill_n(rows + m * width, width, 0.0f);
            continue;
        }
        const float* row = at(from, b, h, lo + m);
        for (int d = 0; d < width; ++d) turned[d * TILE + m] = row[d] * factor_turned;
        if (rows)
            for (int d = 0; d < width; ++d) rows[m * width + d] = row[d] * factor;
    }
}

struct Buffer {
    explicit Buffer(size_t number) : data(static_cast<float*>(std::aligned_alloc(64, (number * 4 + 63) / 64 * 64))) {
        std::fill_n(data, number, 0.0f);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator float*() const { return data; }
    float* data;
};

// Row pointers of the keys at `list`, filled up to a multiple of KEYS with the last.
int point(const Tensor& x, int64_t b, int64_t g, const int32_t* list, int number, const float** rows) {
    const float* base = at(x, b, g);
    for (int w = 0; w < number; ++w) rows[w] = base + list[w] * x.item;
    int filled = number;
    for (; filled % KEYS; ++filled) rows[filled] = rows[number - 1];
    return filled;
}

// to[w] = x[w] times what was turned, for the rows of x at `list`, of `depth` columns; `rows` points to them behind it.
void products(const Tensor& x, int64_t b, int64_t g, const int32_t* list, int number, int64_t depth, const float* turned,
              const float** rows, float* const* to, int wide) {
    const int filled = point(x, b, g, list, number, rows);
    for (int w = 0; w < filled; w += KEYS) rows_times<false>(int(depth), rows + w, turned, TILE, to + w, wide);
}

struct Forward {
    explicit Forward(const Call& call)
        : call(call), turned(call.D * TILE), logits((BLOCK + KEYS) * TILE), average(TILE * call.V) {
        for (int w = 0; w < BLOCK + KEYS; ++w) logit_rows[w] = logits + w * TILE;
    }

    void tile(int64_t b, int64_t h, int64_t lo, const std::vector<int32_t>& list, const int32_t* start,
              const int32_t* stop) {
        const int64_t g = h / (call.H / call.G);
        const int queries = int(std::min<int64_t>(TILE, call.Nq - lo));
        turn(call.q, b, h, lo, queries, call.D, 0, nullptr, call.scale * LOG2_E, turned);
        for (int m = 0; m < TILE; ++m) {
            top[m] = NOBODY, total[m] = 0.0f;
            tau[m] = call.tau.data && m < queries ? *at(call.tau, b, h, lo + m) : 0.0f;
        }
        std::fill_n(average.data, TILE * call.V, 0.0f);
        const int wide = (queries + LANES - 1) / LANES * LANES, high = (queries + QUERIES - 1) / QUERIES * QUERIES;
        for (size_t begin = 0; begin < list.size(); begin += BLOCK) {
            const int number = int(std::min<size_t>(BLOCK, list.size() - begin));
            const int32_t* mine = list.data() + begin;
            products(call.k, b, g, mine, number, call.D, turned, rows, logit_rows, wide);
            pairs.read(call, mine, number, b, g, start, stop, lo, queries);
            if (call.u.data)
                weigh<true>(number, wide);
            else
                weigh<false>(number, wide);
            point(call.v, b, g, mine, number, rows);
            columns_times(number, logits, rows, average, high, call.V);
        }
        for (int m = 0; m < queries; ++m) {
            const bool empty = total[m] == 0.0f;
            *at(call.lse, b, h, lo + m) = empty ? NOBODY : (std::log2(total[m]) + top[m]) * LN_2;
            const float factor = empty ? 0.0f : 1.0f / total[m];
            float* to = at(call.out, b, h, lo + m);
            for (int d = 0; d < call.V; ++d) to[d] = empty ? 0.0f : average[m * call.V + d] * factor;
        }
    }

    // Logits of a block -> weights, beside the sums so far.
    template <bool GATED>
    void weigh(int number, int wide) {
        bool moved = false;
        for (int lane = 0; lane < wide; lane += LANES) {
            const Floats of_tau = load(tau + lane), before = load(top + lane);
            Floats highest = before;
            for (int w = 0; w < number; ++w) {
                float* place = logits + w * TILE + lane;
                Floats logit = load(place) + pairs.bias[w];
                if (!pairs.whole[w]) logit = pairs.met(w, lane) ? logit : all(NOBODY);
                if (GATED) logit = pairs.u[w] - of_tau > Floats{} ? logit : all(NOBODY);
                store(place, logit);
                highest = logit > highest ? logit : highest;
            }
            const Floats finite = highest == all(NOBODY) ? Floats{} : highest;
            const Floats shrink = power_of_2(before - finite);
            Floats sum = load(total + lane) * shrink;
            for (int w = 0; w < number; ++w) {
                float* place = logits + w * TILE + lane;
                Floats weight = power_of_2(load(place) - finite);
                if (GATED) {
                    weight *= share_of(pairs.u[w], of_tau);
                    if (!pairs.whole[w]) weight = pairs.met(w, lane) ? weight : Floats{};
                }
                sum += weight;
                store(place, weight);
            }
            store(top + lane, highest), store(total + lane, sum), store(factor + lane, shrink);
            for (int i = 0; i < LANES; ++i) moved |= highest[i] != before[i];
        }
        if (moved)
            for (int m = 0; m < wide; ++m)
                for (int d = 0; d < call.V; ++d) average[m * call.V + d] *= factor[m];
    }

    const Call& call;
    Buffer turned, logits, average;
    alignas(64) float top[TILE], total[TILE], tau[TILE], factor[TILE];
    const float* rows[BLOCK + KEYS];
    float* logit_rows[BLOCK + KEYS];
    Pairs pairs;
};

// Gradients of keys that belong to chunks of queries, beside those of other chunks. What a chunk adds to a key that
// came alive in it goes to its place at once; to one from an earlier chunk into a row apart, until all chunks are done:
// so every sum has one order, whoever computes it.
struct Apart {
    std::vector<int32_t> keys;  // of the rows
    std::vector<float> dk, dv, dbias, du;
};

// Zeros for a key, right before they are added to: so they do not travel to memory and back.
void begin_sums(const Call& call, int64_t b, int64_t g, int64_t key) {
    std::fill_n(at(call.dk, b, g, key), call.wanted, 0.0f), std::fill_n(at(call.dv, b, g, key), call.V, 0.0f);
    if (call.dbias.data) *at(call.dbias, b, g, key) = 0.0f;
    if (call.du.data) *at(call.du, b, g, key) = 0.0f;
}

struct Backward {
    explicit Backward(const Call& call)
        : call(call), q_turned(call.D * TILE), q_rows(call.D * TILE), dout_turned(call.V * TILE),
          dout_rows(call.V * TILE), weights((BLOCK + KEYS) * TILE), dlogits((BLOCK + KEYS) * TILE),
          dq(TILE * call.D), nowhere(std::max(call.D, call.V)), row_of(call.Nk, -1) {
        for (int w = 0; w < BLOCK + KEYS; ++w)
            weight_rows[w] = weights + w * TILE, dlogit_rows[w] = dlogits + w * TILE;
    }

    // The queries from..to-1 of all heads of a group.
    // begun [Nk]: whose sums are zeros or more by now.
    void chunk(const Orders& orders, int64_t b, int64_t g, int64_t from, int64_t to, Apart& apart, char* begun) {
        const int64_t group = call.H / call.G;
        for (int64_t key = 0; from > 0 && key < call.Nk; ++key) {
            bool before = false, later = false;
            for (int64_t r = 0; r < orders.group; ++r) {
                const int32_t start = orders.start(b, g, r)[key], stop = orders.stop(b, g, r)[key];
                before |= start < std::min<int64_t>(stop, from), later |= stop > std::max<int64_t>(start, from);
            }
            if (before && later) {
                row_of[key] = int32_t(apart.keys.size());
                apart.keys.push_back(int32_t(key));
            }
        }
        const size_t rows_apart = apart.keys.size();
        apart.dk.resize(rows_apart * call.wanted), apart.dv.resize(rows_apart * call.V);
        apart.dbias.resize(call.dbias.data ? rows_apart : 0), apart.du.resize(call.du.data ? rows_apart : 0);
        for (int64_t r = 0; r < group; ++r) {
            Walk walk = orders.walk(b, g, r);
            const int32_t *start = orders.start(b, g, r), *stop = orders.stop(b, g, r);
            for (int64_t lo = from; lo < to; lo += TILE)
                tile(b, g * group + r, lo, walk.move(lo, lo + TILE), start, stop, apart, begun);
        }
        for (int32_t key : apart.keys) row_of[key] = -1;
    }

  private:
    void tile(int64_t b, int64_t h, int64_t lo, const std::vector<int32_t>& list, const int32_t* start,
              const int32_t* stop, Apart& apart, char* begun) {
        const int64_t g = h / (call.H / call.G);
        const int queries = int(std::min<int64_t>(TILE, call.Nq - lo));
        turn(call.q, b, h, lo, queries, call.D, call.scale, q_rows, call.scale * LOG2_E, q_turned);
        turn(call.dout, b, h, lo, queries, call.V, 1, dout_rows, 1, dout_turned);
        for (int m = 0; m < TILE; ++m) {
            const bool here = m < queries;
            const float mine = here ? *at(call.lse, b, h, lo + m) : NOBODY;
            // Who met nobody has weights exp(-inf), and no gradient even where that of its lse is not finite.
            lse[m] = mine == NOBODY ? std::numeric_limits<float>::infinity() : mine * LOG2_E;
            delta[m] = mine == NOBODY ? 0.0f : delta_of(b, h, lo + m);
            tau[m] = call.tau.data && here ? *at(call.tau, b, h, lo + m) : 0.0f;
            dtau[m] = 0.0f;
        }
        std::fill_n(dq.data, TILE * call.D, 0.0f);
        const int wide = (queries + LANES - 1) / LANES * LANES, high = (queries + QUERIES - 1) / QUERIES * QUERIES;
        for (size_t begin = 0; begin < list.size(); begin += BLOCK) {
            const int number = int(std::min<size_t>(BLOCK, list.size() - begin));
            const int32_t* mine = list.data() + begin;
            for (int w = 0; w < number; ++w)  // its own chunk is the only one that comes here
                if (row_of[mine[w]] < 0 && !begun[mine[w]]) begin_sums(call, b, g, mine[w]), begun[mine[w]] = 1;
            products(call.v, b, g, mine, number, call.V, dout_turned, rows, dlogit_rows, wide);
            products(call.k, b, g, mine, number, call.D, q_turned, rows, weight_rows, wide);
            pairs.read(call, mine, number, b, g, start, stop, lo, queries);
            if (call.u.data)
                differentiate<true>(number, wide);
            else
                differentiate<false>(number, wide);
            columns_times(number, dlogits, rows, dq, high, call.D);
            place(call.dv, b, g, mine, number, apart.dv, call.V);
            for (int w = 0; w < number; w += KEYS)
                rows_times<true>(queries, weight_rows + w, dout_rows, call.V, places + w, int(call.V));
            place(call.dk, b, g, mine, number, apart.dk, call.wanted);
            for (int w = 0; w < number; w += KEYS)
                rows_times<true>(queries, dlogit_rows + w, q_rows, call.D, places + w, int(call.wanted));
            add(call.dbias, b, g, mine, number, apart.dbias, of_bias);
            add(call.du, b, g, mine, number, apart.du, of_u);
        }
        for (int m = 0; m < queries; ++m) {
            float* to = at(call.dq, b, h, lo + m);
            for (int d = 0; d < call.D; ++d) to[d] = dq[m * call.D + d] * call.scale;
            if (call.dtau.data) *at(call.dtau, b, h, lo + m) = dtau[m];
        }
    }

    // sum(out * dout) - dlse.
    float delta_of(int64_t b, int64_t h, int64_t query) const {
        const float *out = at(call.out, b, h, query), *dout = at(call.dout, b, h, query);
        Floats total{};
        for (int64_t d = 0; d < call.V; d += LANES) total += load(out + d) * load(dout + d);
        return sum(total) - (call.dlse.data ? *at(call.dlse, b, h, query) : 0.0f);
    }

    // Logits and products dout v -> weights and gradients of the logits.
    template <bool GATED>
    void differentiate(int number, int wide) {
        for (int w = 0; w < number; ++w) {
            Floats all_logits{}, all_shares{};
            for (int lane = 0; lane < wide; lane += LANES) {
                float *of_weight = weights + w * TILE + lane, *of_logit = dlogits + w * TILE + lane;
                Floats exponent = load(of_weight) + pairs.bias[w] - load(lse + lane);
                if (GATED) exponent = exponent > all(LARGEST_EXPONENT) ? all(LARGEST_EXPONENT) : exponent;
                Floats weight = power_of_2(exponent);
                if (!pairs.whole[w]) weight = pairs.met(w, lane) ? weight : Floats{};
                const Floats dweight = load(of_logit) - load(delta + lane);
                if (GATED) {
                    const Floats share = share_of(pairs.u[w], load(tau + lane));
                    const Ints between = (share > Floats{}) & (share < all(1.0f));
                    const Floats inside = between ? weight * dweight : Floats{};
                    store(dtau + lane, load(dtau + lane) - inside);
                    all_shares += inside;
                    weight *= share;
                }
                const Floats dlogit = weight * dweight;
                store(of_weight, weight), store(of_logit, dlogit);
                all_logits += dlogit;
            }
            if (call.dbias.data) of_bias[w] = sum(all_logits);
            if (GATED) of_u[w] = sum(all_shares);
        }
    }

    // Where the gradients of the keys at `list` are summed: in their places, or in rows apart, `width` wide.
    void place(const Tensor& to, int64_t b, int64_t g, const int32_t* list, int number, std::vector<float>& apart,
               int64_t width) {
        float* base = at(to, b, g);
        for (int w = 0; w < number; ++w) {
            const int32_t row = row_of[list[w]];
            places[w] = row < 0 ? base + list[w] * to.item : apart.data() + row * width;
        }
        for (int w = number; w % KEYS; ++w) places[w] = nowhere;
    }

    void add(const Tensor& to, int64_t b, int64_t g, const int32_t* list, int number, std::vector<float>& apart,
             const float* more) {
        if (!to.data) return;
        place(to, b, g, list, number, apart, 1);
        for (int w = 0; w < number; ++w) *places[w] += more[w];
    }

    const Call& call;
    Buffer q_turned, q_rows, dout_turned, dout_rows, weights, dlogits, dq, nowhere;
    alignas(64) float lse[TILE], delta[TILE], tau[TILE], dtau[TILE];
    const float* rows[BLOCK + KEYS];
    float *weight_rows[BLOCK + KEYS], *dlogit_rows[BLOCK + KEYS], *places[BLOCK + KEYS];
    float of_bias[BLOCK], of_u[BLOCK];
    std::vector<int32_t> row_of;  // of each key its row apart, -1: none
    Pairs pairs;
};

// Rows apart -> the places of their keys.
void join(const Apart& apart, const std::vector<float>& rows, const Tensor& to, int64_t b, int64_t g, int64_t width) {
    if (!to.data) return;
    for (size_t i = 0; i < apart.keys.size(); ++i) {
        float* place = at(to, b, g) + apart.keys[i] * to.item;
        for (int64_t d = 0; d < width; ++d) place[d] += rows[i * width + d];
    }
}

// The first query of a chunk, a whole number of tiles.
int64_t bound(const Call& call, int64_t chunk) {
    const int64_t tiles = (call.Nq + TILE - 1) / TILE;
    return std::min(call.Nq, tiles * chunk / call.chunks * TILE);
}

}  // namespace

extern "C" void attend_forward(const Given* given, float scale) {
    const Call call{*given, scale};
    const Orders orders(call);
    const int64_t group = call.H / call.G;
#pragma omp parallel num_threads(call.threads)
    {
        Forward forward(call);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call.B * call.H * call.chunks; ++task) {
            const int64_t chunk = call.chunks - 1 - task / (call.B * call.H);  // the last ones may meet most
            const int64_t b = task / call.H % call.B, h = task % call.H;
            Walk walk = orders.walk(b, h / group, h % group);
            const int32_t *start = orders.start(b, h / group, h % group), *stop = orders.stop(b, h / group, h % group);
            for (int64_t lo = bound(call, chunk); lo < bound(call, chunk + 1); lo += TILE)
                forward.tile(b, h, lo, walk.move(lo, lo + TILE), start, stop);
        }
    }
}

extern "C" void attend_backward(const Given* given, float scale) {
    const Call call{*given, scale};
    const Orders orders(call);
    const int64_t heads = call.B * call.G;
    std::vector<Apart> apart(heads * call.chunks);
    std::vector<char> begun(heads * call.Nk, 0);
#pragma omp parallel num_threads(call.threads)
    {
        Backward backward(call);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * call.chunks; ++task) {
            const int64_t chunk = call.chunks - 1 - task / heads, head = task % heads;
            backward.chunk(orders, head / call.G, head % call.G, bound(call, chunk), bound(call, chunk + 1),
                           apart[head * call.chunks + chunk], begun.data() + head * call.Nk);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t b = head / call.G, g = head % call.G;
            for (int64_t key = 0; key < call.Nk; ++key)  // whom nobody met
                if (!begun[head * call.Nk + key]) begin_sums(call, b, g, key);
            for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
                const Apart& mine = apart[head * call.chunks + chunk];
                join(mine, mine.dk, call.dk, b, g, call.wanted), join(mine, mine.dv, call.dv, b, g, call.V);
                join(mine, mine.dbias, call.dbias, b, g, 1), join(mine, mine.du, call.du, b, g, 1);
            }
        }
    }
}

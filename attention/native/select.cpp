// Selections that follow the tokens one by one: the best of every prefix, and the threshold of SPARSEK.
//
// Each list of scores is one sequence, so threads take lists. Legend: R lists, N tokens.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <queue>
#include <vector>

namespace {

constexpr int64_t FOREVER = std::numeric_limits<int32_t>::max();
constexpr double NONE = -std::numeric_limits<double>::infinity();

struct Scored {
    double score;
    int64_t token;
};

struct Worse {  // of equal scores the older token is the worse
    bool operator()(const Scored& x, const Scored& y) const {
        return x.score < y.score || (x.score == y.score && x.token < y.token);
    }
};

struct Better {
    bool operator()(const Scored& x, const Scored& y) const { return Worse()(y, x); }
};

using FromWorst = std::priority_queue<Scored, std::vector<Scored>, Better>;
using FromBest = std::priority_queue<Scored, std::vector<Scored>, Worse>;

// The tokens that compete for `keep` in all, of one document after the other, and their tau.
class Threshold {
  public:
    Threshold(int64_t keep, int64_t number) : keep(keep), state(number, OUT), score(number) {}

    void new_document() {
        inside = full = FromWorst(), outside = FromBest();
        count = many_inside = many_full = 0, sum = 0, tau = NONE;
    }

    // One comes, and `leaver` goes unless it is negative. Returns tau.
    double step(int64_t token, double value, int64_t leaver) {
        score[token] = value;
        if (tau == NONE || value >= tau + 1)
            move(token, FULL);
        else
            move(token, value > tau ? INSIDE : OUT);
        ++count;
        if (leaver >= 0) move(leaver, GONE), --count;
        return tau = count > keep ? raised() : NONE;
    }

  private:
    enum State : char { OUT, INSIDE, FULL, GONE };  // c = 0, 0 < c < 1, c = 1; no candidate

    void move(int64_t token, State to) {
        if (state[token] == INSIDE) --many_inside, sum -= score[token];
        if (state[token] == FULL) --many_full;
        state[token] = to;
        if (to == OUT) outside.push({score[token], token});
        if (to == INSIDE) ++many_inside, sum += score[token], inside.push({score[token], token});
        if (to == FULL) ++many_full, full.push({score[token], token});
    }

    // The first of a queue that is still in its state; +-infinity if there is none.
    template <class Queue>
    double first(Queue& queue, State of, double none) {
        while (!queue.empty() && state[queue.top().token] != of) queue.pop();
        return queue.empty() ? none : queue.top().score;
    }

    // The shares sum to keep or more at the old tau: the tau, from there upwards, at which it is keep.
    double raised() {
        const double none = std::numeric_limits<double>::infinity();
        for (;;) {
            const double leaves = first(inside, INSIDE, none), enters = first(full, FULL, none) - 1;
            if (many_inside == 1) sum = leaves;  // no rounding may hide that the shares of the others are keep
            if (many_inside == 0 && many_full <= keep)  // any tau between gives the same shares
                return (enters + first(outside, OUT, NONE)) / 2;
            const double wanted = many_inside ? double((sum + (many_full - keep)) / many_inside) : none;
            if (wanted < leaves && wanted <= enters) return wanted;
            if (leaves <= enters)
                move(inside.top().token, OUT);
            else
                move(full.top().token, INSIDE);
        }
    }

    const int64_t keep;
    std::vector<State> state;
    std::vector<double> score;
    FromWorst inside, full;
    FromBest outside;
    int64_t count = 0, many_inside = 0, many_full = 0;
    long double sum = 0;
    double tau = NONE;
};

}  // namespace

// As `streaming_top_k`, with `time` = FOREVER for padding; began: when the token's document did. All [R, N].
extern "C" void streaming_top_k(const double* score, const int64_t* time, const int64_t* began, int64_t rows,
                                int64_t number, int64_t keep, int64_t include_first, int64_t threads, int64_t* death) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t begin = row * number;
        FromWorst best;
        int64_t document = -1;
        for (int64_t i = begin; i < begin + number; ++i) {
            death[i] = FOREVER;
            if (time[i] == FOREVER) continue;
            if (began[i] != document) best = FromWorst(), document = began[i];
            if (include_first && time[i] == began[i]) continue;
            const Scored mine{score[i], i};
            if (int64_t(best.size()) == keep - include_first) {
                if (Worse()(mine, best.top())) {
                    death[i] = time[i];
                    continue;
                }
                death[best.top().token] = time[i];
                best.pop();
            }
            best.push(mine);
        }
    }
}

// tau [R, N] of scores [R, N] whose token j is a candidate from j until left_j, or its document's end.
extern "C" void sparsek_thresholds(const double* score, const int64_t* left, const int64_t* document, int64_t rows,
                                   int64_t number, int64_t keep, int64_t threads, double* tau) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t begin = row * number;
        std::vector<int64_t> leaver(number, -1);
        for (int64_t token = 0; token < number; ++token)
            if (left[begin + token] < number) leaver[left[begin + token]] = token;
        Threshold threshold(keep, number);
        for (int64_t token = 0; token < number; ++token) {
            const int64_t i = begin + token;
            if (token > 0 && document[i] != document[i - 1]) threshold.new_document();
            if (leaver[token] == token)  // outranked at once: all stays as it is
                tau[i] = token > 0 && document[i] == document[i - 1] ? tau[i - 1] : NONE;
            else
                tau[i] = threshold.step(token, score[i], leaver[token]);
        }
    }
}

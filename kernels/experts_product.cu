// Products with the weights of the chosen experts, for the (token, expert) pairs of choose_experts:
// relu(up(norm(x))) ** 2 into bf16, or down(inner) into fp32.
//
// The first half may begin with that of the shared expert, which needs no choice: a block goes through
// its share of it while the experts are still being chosen.
#include "tile_stream.cuh"

struct Arguments {
    const bf16* x;          // up: [tokens, depth], down: [pairs, depth]; rows x_stride apart
    const bf16* norm;       // up: [depth]
    const bf16* weights;    // [experts, width, depth], strides apart
    void* out;              // [pairs, width]
    const bf16* shared_up;  // [shared width, depth], rows shared_stride apart
    bf16* dense;            // [tokens, shared width], rows dense_stride apart
    const int* items;       // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    long long x_stride, tokens, depth, width, expert_stride, row_stride;
    long long shared_width, shared_stride, dense_stride, items_held, eps, team, shared_team;
};

__device__ __forceinline__ bf16 activated(float x) {
    return (bf16)narrow(relu_squared(widen((bf16)narrow(x))));
}

// The shared expert's rows, for 8 * S tokens.
template <int S>
__device__ __forceinline__ void shared_rows(const Arguments& a, uint4* shared, Gathered<S>* gathered) {
    const Team team((int)a.shared_team);
    const int depth = (int)a.depth, g = threadIdx.x % 32 / 4, total = (int)a.shared_width;
    const int steps = team.steps(depth);
    const float eps = __int_as_float((int)a.eps);
    const auto column = [&](int step) { return team.column(step); };
    Ring ring(shared);
    Walk ahead(team, total, total);
    Tile coming = {0, 0};
    Lines lines = {nullptr, nullptr};
    int step = steps;
    const auto more = [&] {
        if (step >= steps) {
            coming = ahead.next();
            const bf16* const first = a.shared_up + coming.row * a.shared_stride;
            lines.low = g < coming.height ? first + g * a.shared_stride : nullptr;
            lines.high = g + 8 < coming.height ? first + (g + 8) * a.shared_stride : nullptr;
            step = 0;
        }
        ring.issue(lines, column(step), coming.height && step < steps, depth);
        step++;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) more();
    const bf16* x[S];
#pragma unroll
    for (int n = 0; n < S; n++)
        x[n] = n * 8 + g < a.tokens ? a.x + (n * 8 + g) * a.x_stride : nullptr;
    Walk walk(team, total, total);
    int turn = 0;
    for (Tile tile = walk.next(); tile.height; tile = walk.next(), turn ^= 1) {
        float sum[S][4] = {};
        Normed<S> normed(a.norm);
        multiply(sum, ring, x, 0, steps, depth, normed, column, more);
        gathered[turn].put(sum);
        gathered[turn].put_squares(normed.squares);
        team.meet();
        for (int i = team.thread(); i < S * 8 * TILE; i += team.threads()) {
            const int row = i % TILE, token = i / TILE;
            if (token >= a.tokens || row >= tile.height) continue;
            const float factor = gathered[turn].factor(team, token, depth, eps);
            a.dense[token * a.dense_stride + tile.row + row] =
                activated(gathered[turn].at(team, row, token) * factor);
        }
    }
    wait_for_group<0>();
    __syncthreads();  // `gathered` and the ring are the experts' now
}

// grid = (blocks that share the rows of the shared expert, then those of all items); shared: the ring
// S: groups of 8 tokens of the shared expert, none for 0
template <int N, bool UP, int S>
__device__ __forceinline__ void product(const Arguments& a) {
    constexpr int MOST_GROUPS = N > S ? N : S;
    __shared__ Gathered<MOST_GROUPS> memory[2];
    extern __shared__ uint4 shared[];
    const int depth = (int)a.depth, lane = threadIdx.x % 32, g = lane / 4;
    const float eps = __int_as_float((int)a.eps);
    // x is older than the choice: the kernel that made it has ended before the one in between began.
    if constexpr (S > 0) shared_rows<S>(a, shared, reinterpret_cast<Gathered<S>*>(memory));
    Gathered<N>* const gathered = reinterpret_cast<Gathered<N>*>(memory);
    wait_for_inputs();
    let_next_start();
    const Team team((int)a.team);
    const int width = (int)a.width, steps = team.steps(depth);
    const auto column = [&](int step) { return team.column(step); };
    wait_for_inputs();
    let_next_start();
    const int total = a.counts[0] * width;

    Ring ring(shared);
    Walk ahead(team, total, width);
    Tile coming = {0, 0};
    Lines lines = {nullptr, nullptr};
    int step = steps;
    const auto more = [&] {
        if (step >= steps) {
            coming = ahead.next();
            if (coming.height) {
                const long long expert = a.items[coming.row / width];
                const bf16* const first =
                    a.weights + expert * a.expert_stride + coming.row % width * a.row_stride;
                lines.low = g < coming.height ? first + g * a.row_stride : nullptr;
                lines.high = g + 8 < coming.height ? first + (g + 8) * a.row_stride : nullptr;
            }
            step = 0;
        }
        ring.issue(lines, column(step), coming.height && step < steps, depth);
        step++;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) more();

    Walk walk(team, total, width);
    int turn = 0;
    for (Tile tile = walk.next(); tile.height; tile = walk.next(), turn ^= 1) {
        const int item = tile.row / width, place = tile.row % width;
        const long long first = a.items[a.items_held + item];
        const int count = a.items[2 * a.items_held + item];
        const bf16* x[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const long long pair = first + n * 8 + g;
            x[n] = n * 8 + g < count ? a.x + (UP ? a.pair_token[pair] : pair) * a.x_stride : nullptr;
        }
        float sum[N][4] = {};
        if constexpr (UP) {
            Normed<N> normed(a.norm);
            multiply(sum, ring, x, 0, steps, depth, normed, column, more);
            gathered[turn].put_squares(normed.squares);
        } else {
            Plain plain;
            multiply(sum, ring, x, 0, steps, depth, plain, column, more);
        }
        gathered[turn].put(sum);
        team.meet();
        for (int i = team.thread(); i < N * 8 * TILE; i += team.threads()) {
            const int row = i % TILE, pair = i / TILE;
            if (pair >= count || row >= tile.height) continue;
            const float value = gathered[turn].at(team, row, pair);
            const long long to = (first + pair) * a.width + place + row;
            if constexpr (UP) {
                const float factor = gathered[turn].factor(team, pair, depth, eps);
                static_cast<bf16*>(a.out)[to] = activated(value * factor);
            } else
                static_cast<float*>(a.out)[to] = value;
        }
    }
}

#define ENTRY(name, N, UP, S, BLOCKS)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Arguments a) { \
        product<N, UP, S>(a);                                                               \
    }
ENTRY(up_8_shared_8, 1, true, 1, 3)
ENTRY(up_8_shared_16, 1, true, 2, 2)
ENTRY(up_8_shared_32, 1, true, 4, 2)
ENTRY(up_8, 1, true, 0, 3)
ENTRY(up_16, 2, true, 0, 2)
ENTRY(down_8, 1, false, 0, 3)
ENTRY(down_16, 2, false, 0, 2)

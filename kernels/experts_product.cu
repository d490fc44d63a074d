// Products with the weights of the chosen experts, for the (token, expert) pairs of choose_experts:
// relu(up(norm(x))) ** 2 into bf16, or down(inner) into fp32.
#include "tile_stream.cuh"

struct Arguments {
    const bf16* x;        // up: [tokens, depth], down: [pairs, depth]; rows x_stride apart
    const bf16* norm;     // up: [depth]
    const bf16* weights;  // [experts, width, depth], strides apart
    void* out;            // [pairs, width]
    const int* items;   // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    long long x_stride, depth, width, expert_stride, row_stride, items_held, eps, team;
};

// grid = (blocks that share the rows of all items); shared: the ring
template <int N, bool UP>
__device__ __forceinline__ void product(const Arguments& a) {
    __shared__ Gathered<N> gathered[2];
    extern __shared__ uint4 shared[];
    const int depth = (int)a.depth, lane = threadIdx.x % 32, g = lane / 4;
    const float eps = __int_as_float((int)a.eps);
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
                static_cast<bf16*>(a.out)[to] =
                    (bf16)narrow(relu_squared(widen((bf16)narrow(value * factor))));
            } else
                static_cast<float*>(a.out)[to] = value;
        }
    }
}

#define ENTRY(name, N, UP, BLOCKS)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Arguments a) { \
        product<N, UP>(a);                                                                  \
    }
ENTRY(up_8, 1, true, 3)
ENTRY(up_16, 2, true, 2)
ENTRY(down_8, 1, false, 3)
ENTRY(down_16, 2, false, 2)

// relu(up(norm(x))) ** 2 of the chosen experts, for the pairs of an item of choose_experts.
#include "tile_stream.cuh"

struct Arguments {
    const bf16* x;      // [tokens, depth], rows x_stride apart
    const bf16* norm;   // [depth]
    const bf16* up;     // [experts, width, depth], strides apart
    bf16* inner;        // [pairs, width]
    const int* items;   // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    long long x_stride, depth, width, expert_stride, row_stride, items_held, eps;
};

// grid = (multiprocessors), which share the rows of all items; shared: the ring
template <int N>
__device__ __forceinline__ void up(const Arguments& a) {
    __shared__ Gathered<N> gathered[2];
    extern __shared__ uint4 shared[];
    const int depth = (int)a.depth, lane = threadIdx.x % 32, g = lane / 4;
    const float eps = __int_as_float((int)a.eps);
    int begin, end;
    share_of((depth + STEP - 1) / STEP, begin, end);
    wait_for_inputs();
    let_next_start();
    const long long total = a.counts[0] * a.width;

    Ring ring(shared);
    Walk ahead(total, a.width);
    Tile coming = {0, 0};
    Lines lines = {nullptr, nullptr};
    int step = end;
    const auto more = [&] {
        if (step >= end) {
            coming = ahead.next();
            if (coming.height) {
                const long long expert = a.items[coming.row / a.width];
                const bf16* const first =
                    a.up + expert * a.expert_stride + coming.row % a.width * a.row_stride;
                lines.low = g < coming.height ? first + g * a.row_stride : nullptr;
                lines.high = g + 8 < coming.height ? first + (g + 8) * a.row_stride : nullptr;
            }
            step = begin;
        }
        ring.issue(lines, step, coming.height && step < end, depth);
        step++;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) more();

    Walk walk(total, a.width);
    int turn = 0;
    for (Tile tile = walk.next(); tile.height; tile = walk.next(), turn ^= 1) {
        const long long item = tile.row / a.width, place = tile.row % a.width;
        const long long first = a.items[a.items_held + item];
        const int count = a.items[2 * a.items_held + item];
        const bf16* x[N];
#pragma unroll
        for (int n = 0; n < N; n++)
            x[n] = n * 8 + g < count ? a.x + a.pair_token[first + n * 8 + g] * a.x_stride : nullptr;
        float sum[N][4] = {};
        Normed<N> normed(a.norm);
        multiply(sum, ring, x, begin, end, depth, normed, more);
        gathered[turn].put(sum);
        gathered[turn].put_squares(normed.squares);
        __syncthreads();
        for (int i = threadIdx.x; i < N * 8 * TILE; i += THREADS) {
            const int row = i % TILE, pair = i / TILE;
            if (pair >= count || row >= tile.height) continue;
            const float value = gathered[turn].at(row, pair) * gathered[turn].factor(pair, depth, eps);
            a.inner[(first + pair) * a.width + place + row] =
                (bf16)narrow(relu_squared(widen((bf16)narrow(value))));
        }
    }
}

#define ENTRY(name, N)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(const Arguments a) { \
        up<N>(a);                                                                      \
    }
ENTRY(up_8, 1)
ENTRY(up_16, 2)

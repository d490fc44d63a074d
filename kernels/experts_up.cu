// relu(up(norm(x))) ** 2 of the chosen experts, for the pairs of an item of choose_experts.
#include "tile_product.cuh"

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

// grid = (tiles of width, items); shared: the ring
template <int N>
__device__ __forceinline__ void up(const Arguments& a) {
    __shared__ Gathered<N> gathered;
    extern __shared__ uint4 ring[];
    wait_for_inputs();
    let_next_start();
    if (blockIdx.y >= a.counts[0]) return;
    const int item = blockIdx.y, lane = threadIdx.x % 32, depth = (int)a.depth;
    const long long expert = a.items[item], first = a.items[a.items_held + item];
    const int count = a.items[2 * a.items_held + item];
    int begin, end;
    share_of(threadIdx.x / 32, (depth + STEP - 1) / STEP, begin, end);
    const Lines lines = lines_of(a.up + expert * a.expert_stride, a.row_stride, a.width,
                                 (long long)blockIdx.x * TILE);
    const Ring weights(ring);
    weights.start(lines, begin, end, depth);
    const bf16* x[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int pair = n * 8 + lane / 4;
        x[n] = pair < count ? a.x + a.pair_token[first + pair] * a.x_stride : nullptr;
    }
    float sum[N][4] = {};
    Normed<N> normed(a.norm);
    weights.run(sum, lines, x, begin, end, depth, normed);
    gathered.put(sum);
    gathered.put_squares(normed.squares);
    __syncthreads();
    gathered.make_factors(depth, __int_as_float((int)a.eps));
    __syncthreads();
    for (int i = threadIdx.x; i < N * 8 * TILE; i += THREADS) {
        const int row = i % TILE, pair = i / TILE;
        const long long place = (long long)blockIdx.x * TILE + row;
        if (pair >= count || place >= a.width) continue;
        const float value = gathered.at(row, pair) * gathered.factors[pair];
        a.inner[(first + pair) * a.width + place] =
            (bf16)narrow(relu_squared(widen((bf16)narrow(value))));
    }
}

#define ENTRY(name, N)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, N == 1 ? 3 : 2)              \
        name(const Arguments a) {                                                      \
        up<N>(a);                                                                     \
    }
ENTRY(up_8, 1)
ENTRY(up_16, 2)

// x += sum over a token's experts of weight * down(inner), and down(inner) of the shared expert.
//
// A block owns 16 channels of the result for all tokens and goes through every item of
// choose_experts: each weight is read once, and nothing is added up through memory. Its warps take
// equal shares of all steps, whatever expert these belong to.
#include "tile_product.cuh"

struct Arguments {
    bf16* x;                   // [tokens, hidden], rows x_stride apart
    const bf16* inner;         // [pairs, width]
    const bf16* down;          // [experts, hidden, width], strides apart
    const bf16* shared_inner;  // [tokens, shared width]
    const bf16* shared_down;   // [hidden, shared width], rows shared_stride apart
    const int* items;          // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    const float* pair_weight;
    long long x_stride, tokens, hidden, width, expert_stride, row_stride;
    long long shared_width, shared_stride, items_held;
};

// grid = (tiles of hidden); shared: the ring, then sums [WARPS, tokens, TILE] fp32
template <int N>
__device__ __forceinline__ void down(const Arguments& a) {
    extern __shared__ uint4 ring[];
    float* const sums = reinterpret_cast<float*>(ring + RING);
    const Ring weights(ring);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = (int)a.tokens;
    const long long row = (long long)blockIdx.x * TILE;
    const int routed_steps = ((int)a.width + STEP - 1) / STEP;
    const int shared_steps = ((int)a.shared_width + STEP - 1) / STEP;
    // Written by the kernel before the one before, so there already; not what L1 has of it.
    const int items = fresh(a.counts);
    const int routed = items * routed_steps;
    const int total = routed + (tokens + 8 * N - 1) / (8 * N) * shared_steps;
    float* const own = sums + warp * tokens * TILE;
    for (int i = lane; i < tokens * TILE; i += 32) own[i] = 0.f;
    __syncwarp();

    int position = (int)((long long)total * warp / WARPS);
    const int last = (int)((long long)total * (warp + 1) / WARPS);
    bool waited = false;
    while (position < last) {
        const bool is_routed = position < routed;
        const int steps = is_routed ? routed_steps : shared_steps;
        const int item = (is_routed ? position : position - routed) / steps;
        const int begin = (is_routed ? position : position - routed) % steps;
        const int end = min(steps, begin + last - position);
        const int depth = (int)(is_routed ? a.width : a.shared_width);
        long long first = item * 8 * N;
        int count = min(8 * N, tokens - (int)first);
        const bf16* weight = a.shared_down;
        long long stride = a.shared_stride;
        if (is_routed) {
            first = fresh(a.items + a.items_held + item);
            count = fresh(a.items + 2 * a.items_held + item);
            weight = a.down + fresh(a.items + item) * a.expert_stride;
            stride = a.row_stride;
        }
        const Lines lines = lines_of(weight, stride, a.hidden, row);
        weights.start(lines, begin, end, depth);
        if (!waited) {
            wait_for_inputs();
            let_next_start();
            waited = true;
        }
        const bf16* const source = is_routed ? a.inner : a.shared_inner;
        const bf16* x[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int pair = n * 8 + lane / 4;
            x[n] = pair < count ? source + (first + pair) * depth : nullptr;
        }
        float sum[N][4] = {};
        Plain plain;
        weights.run(sum, lines, x, begin, end, depth, plain);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int pair = n * 8 + lane % 4 * 2 + i % 2;
                if (pair >= count) continue;
                const long long place = first + pair;
                const int token = is_routed ? a.pair_token[place] : (int)place;
                const float weight = is_routed ? a.pair_weight[place] : 1.f;
                own[token * TILE + lane / 4 + i / 2 * 8] += sum[n][i] * weight;
            }
        __syncwarp();
        position += end - begin;
    }
    if (!waited) wait_for_inputs();
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * TILE; i += THREADS) {
        const int token = i / TILE;
        if (row + i % TILE >= a.hidden) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w * tokens * TILE + i];
        bf16* const out = a.x + token * a.x_stride + row + i % TILE;
        *out = (bf16)narrow(widen(*out) + sum);
    }
}

#define ENTRY(name, N)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, N == 1 ? 3 : 2)              \
        name(const Arguments a) {                                                      \
        down<N>(a);                                                                     \
    }
ENTRY(down_8, 1)
ENTRY(down_16, 2)

// The experts of every token, and their lists: see choose.cuh.
#include "choose.cuh"

typedef Choice Arguments;

constexpr int THREADS = MOST;

// grid = (tokens / warps); shared: what all blocks have written, for the one that comes last, which would
// wait for memory again and again: bits [experts, words], choices and their shares [tokens, top_k]
extern "C" __global__ void __launch_bounds__(THREADS) choose(const Arguments a) {
    __shared__ bool is_last;
    __shared__ int pairs_before[MOST + 32];
    extern __shared__ unsigned written[];
    wait_for_inputs();
    let_next_start();
    const int token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (token < a.tokens) choose_for<false>(a, token, a.bits, a.places, a.shares);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicInc(a.arrived, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const int words = (int)a.experts * (((int)a.tokens + 31) / 32), picks = (int)(a.tokens * a.top_k);
    int* const picked = reinterpret_cast<int*>(written + words);
    float* const shares = reinterpret_cast<float*>(picked + picks);
#pragma unroll 4
    for (int i = threadIdx.x; i < words; i += THREADS) written[i] = __ldcg(a.bits + i);
#pragma unroll 4
    for (int i = threadIdx.x; i < picks; i += THREADS)
        picked[i] = __ldcg(a.places + i), shares[i] = __ldcg(a.shares + i);
    for (int i = threadIdx.x; i < words; i += THREADS) a.bits[i] = 0;
    __syncthreads();
    make_lists(a, written, picked, shares, pairs_before, nullptr, true);
}

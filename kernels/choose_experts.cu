// The experts of every token, and their lists: see choose.cuh.
#include "choose.cuh"

typedef Choice Arguments;

constexpr int THREADS = MOST;

// grid = (tokens / warps)
extern "C" __global__ void __launch_bounds__(THREADS) choose(const Arguments a) {
    __shared__ bool is_last;
    __shared__ int pairs_before[MOST + 32];
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
    make_lists(a, a.bits, a.places, a.shares, pairs_before, nullptr, true);
    __syncthreads();
    const int words = (int)a.experts * (((int)a.tokens + 31) / 32);
    for (int i = threadIdx.x; i < words; i += THREADS) a.bits[i] = 0;
}

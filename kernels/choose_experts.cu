// The experts of every token, and their lists: see choose.cuh.
#include "choose.cuh"

typedef Choice Arguments;

constexpr int THREADS = MOST;

// grid = (tokens / warps)
extern "C" __global__ void __launch_bounds__(THREADS) choose(const Arguments a) {
    __shared__ bool is_last;
    __shared__ unsigned own_bits[MOST];
    const bool alone = gridDim.x == 1;  // a block that needs no memory to speak with others
    unsigned* const bits = alone ? own_bits : a.bits;
    own_bits[threadIdx.x] = 0;
    wait_for_inputs();
    let_next_start();
    __syncthreads();
    const int token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (token < a.tokens) choose_for(a, token, bits);
    if (!alone) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicInc(a.arrived, gridDim.x - 1) == gridDim.x - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
    }
    __syncthreads();
    make_lists(a, bits);
    if (alone) return;
    __syncthreads();
    const int words = (int)a.experts * (((int)a.tokens + 31) / 32);
    for (int i = threadIdx.x; i < words; i += THREADS) a.bits[i] = 0;
}

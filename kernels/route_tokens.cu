// The router of a layer of experts, and the choice by the block that is done last with its logits.
#include "choose.cuh"
#include "skinny.cuh"

struct Arguments {
    Products router;
    Choice choice;  // of at most 32 tokens, MOST_PICKS in all
};

constexpr int MOST_PICKS = 512;

struct Choose {
    const Choice& choice;

    __device__ __forceinline__ void operator()(const Tile& tile) const {
        __shared__ bool is_last;
        __shared__ unsigned bits[MOST];
        __shared__ int picks[MOST_PICKS];
        __shared__ float shares[MOST_PICKS];
        const unsigned experts = (unsigned)choice.experts, rows = tile.height;
        bits[threadIdx.x] = 0;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicAdd(choice.arrived, rows) + rows == experts;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int token = threadIdx.x / 32; token < choice.tokens; token += WARPS)
            choose_for(choice, token, bits, picks, shares);
        __syncthreads();
        make_lists(choice, bits, picks, shares);
        if (threadIdx.x == 0) *choice.arrived = 0;
    }
};

#define ENTRY(name, N)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(const Arguments a) { \
        multiply_all<N, WHOLE>(a.router, Choose{a.choice});                            \
    }
ENTRY(route_8, 1)
ENTRY(route_16, 2)
ENTRY(route_32, 4)

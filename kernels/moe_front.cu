// What a layer of experts begins with: the router and the first half of the shared expert, and, by the
// block that ends the router's last tile, the choice of the experts while the others go on.
#include "choose.cuh"
#include "skinny.cuh"

struct Arguments {
    Products products;  // the router's rows first
    Choice choice;      // of at most 32 tokens
};

struct Choose {
    const Choice& choice;

    __device__ __forceinline__ void operator()(const Tile& tile, const Team&) const {
        __shared__ bool is_last;
        __shared__ unsigned bits[MOST];
        const int experts = (int)choice.experts;
        if (tile.row >= experts) return;
        const unsigned rows = min(tile.row + tile.height, experts) - tile.row;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicAdd(choice.arrived, rows) + rows == (unsigned)experts;
        bits[threadIdx.x] = 0;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int token = threadIdx.x / 32; token < choice.tokens; token += WARPS)
            choose_for(choice, token, bits);
        __syncthreads();
        make_lists(choice, bits);
        if (threadIdx.x == 0) *choice.arrived = 0;
    }
};

#define ENTRY(name, N, BLOCKS)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Arguments a) { \
        multiply_all<N, WHOLE>(a.products, Choose{a.choice});                               \
    }
ENTRY(front_8, 1, 2)
ENTRY(front_16, 2, 2)
ENTRY(front_32, 4, 2)

// The most likely token of each row of logits, the lowest among equals; -1 where any is not finite.
// The pass that ends here was made from a table, which is moved on to the pass over those tokens.
#include "ptx.cuh"

typedef unsigned long long u64;

struct Arguments {
    const float* logits;     // [R, size], rows stride apart, which 16 bytes divide
    long long* picked;       // [R]
    long long* latest;       // [S]: by slot
    const long long* slots;  // [R]
    long long* table;        // [5, R]: slots, starts, entries, counts, ids; or null
    u64* best;               // [R, blocks], scratch
    unsigned* arrived;       // [R], zero before and after
    long long size, stride, slots_held;
};

constexpr int THREADS = 256;
constexpr int AHEAD = 4;  // loads of a thread that are under way at once
constexpr u64 BROKEN = ~0ull;

// Orders like the logits, and among equals the lower index is larger.
__device__ __forceinline__ u64 key_of(float value, int index) {
    if (!(fabsf(value) <= 3.402823466e38f)) return BROKEN;
    const unsigned bits = __float_as_uint(value);
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (0xfffffffeu - (unsigned)index);
}

// The best of four logits from `index` on, of which those behind `size` are padding.
__device__ __forceinline__ u64 best_of(const float4& quad, int index, int size) {
    const float values[4] = {quad.x, quad.y, quad.z, quad.w};
    u64 best = 0;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (index + j < size) best = max(best, key_of(values[j], index + j));
    return best;
}

__device__ __forceinline__ u64 block_max(u64 best) {
    __shared__ u64 warps[THREADS / 32];
    for (int step = 16; step; step /= 2) best = max(best, __shfl_xor_sync(~0u, best, step));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++) best = max(best, warps[i]);
    __syncthreads();
    return best;
}

__device__ __forceinline__ void move_on(long long* column, int rows) {
    const long long count = column[3 * rows];
    column[rows] += count;
    column[2 * rows] += count;
    column[4 * rows] = -1;
}

// grid = (blocks, R)
extern "C" __global__ void __launch_bounds__(THREADS) pick(const Arguments a) {
    __shared__ bool is_last;
    wait_for_inputs();
    let_next_start();
    const long long row = blockIdx.y, slot = a.slots[row];
    if (a.table && blockIdx.x == 0 && threadIdx.x == 0) move_on(a.table + row, gridDim.y);
    const float* const logits = a.logits + row * a.stride;
    const int size = (int)a.size, step = (int)gridDim.x * THREADS * 4;
    u64 best = 0;
    for (int i = ((int)blockIdx.x * THREADS + threadIdx.x) * 4; i < size; i += AHEAD * step) {
        float4 quads[AHEAD] = {};
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (i + k * step < size) quads[k] = *(const float4*)(logits + i + k * step);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) best = max(best, best_of(quads[k], i + k * step, size));
    }
    best = block_max(best);
    if (threadIdx.x == 0) {
        a.best[row * gridDim.x + blockIdx.x] = best;
        __threadfence();
        is_last = atomicInc(&a.arrived[row], gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    best = 0;
    for (int i = threadIdx.x; i < gridDim.x; i += THREADS)
        best = max(best, *(volatile u64*)&a.best[row * gridDim.x + i]);
    best = block_max(best);
    if (threadIdx.x) return;
    const long long token = best == BROKEN ? -1ll : (long long)(0xfffffffeu - (unsigned)best);
    a.picked[row] = token;
    if (slot >= 0 && slot < a.slots_held) a.latest[slot] = token;
}

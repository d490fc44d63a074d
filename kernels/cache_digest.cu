// 64-bit digests of what slots hold: the wrapping sum of a hash of each element's index and bits.
// The order of a wrapping sum does not matter, so blocks may add theirs with atomics.
#include "hash.cuh"

struct Attention {
    u64* out;           // [La, R, blocks]
    const void* keys;   // [La, S, M, width]
    const void* values;
    const long long* rows;
    const long long* lengths;
    long long slots, positions, width, block, bytes;  // bytes: of one element, 2 or 4
};

struct Recurrent {
    u64* out;            // [Lm, R], zero before
    const void* window;  // [Lm, S, window_width]
    const void* state;   // [Lm, S, state_width]
    const long long* rows;
    long long slots, window_width, state_width, window_bytes, state_bytes;
};

constexpr int THREADS = 256;

// The sum over elements [first, last) of `base`; valid in thread 0.
template <typename Bits>
__device__ __forceinline__ u64 digest(const void* base, long long first, long long last, int part) {
    u64 sum = 0;
    for (long long i = first + threadIdx.x; i < last; i += THREADS)
        sum += hash(static_cast<const Bits*>(base)[i], (u64)i * 4 + part);
    return sum;
}

__device__ __forceinline__ u64 digest(const char* base, long long bytes, long long first,
                                      long long last, int part) {
    return bytes == 2 ? digest<unsigned short>(base, first, last, part)
                      : digest<unsigned>(base, first, last, part);
}

// The sum over a block's threads; valid in thread 0.
__device__ __forceinline__ u64 block_sum(u64 sum) {
    __shared__ u64 warps[THREADS / 32];
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int i = 1; i < THREADS / 32; i++) sum += threadIdx.x ? 0 : warps[i];
    return sum;
}

// grid = (digest blocks, R, La)
extern "C" __global__ void __launch_bounds__(THREADS) attention_digest(const Attention a) {
    const long long slot = a.rows[blockIdx.y], begin = blockIdx.x * a.block, layer = blockIdx.z;
    const long long length = min(a.lengths[blockIdx.y], a.positions);
    u64 sum = 0;
    if (slot >= 0 && slot < a.slots && begin < length) {
        const long long elements = min(a.block, length - begin) * a.width;
        const long long offset =
            ((layer * a.slots + slot) * a.positions + begin) * a.width * a.bytes;
        sum = digest(static_cast<const char*>(a.keys) + offset, a.bytes, 0, elements, 0) +
              digest(static_cast<const char*>(a.values) + offset, a.bytes, 0, elements, 1);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        a.out[(layer * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// grid = (shares of a slot, R, Lm)
extern "C" __global__ void __launch_bounds__(THREADS) recurrent_digest(const Recurrent a) {
    const long long slot = a.rows[blockIdx.y], layer = blockIdx.z;
    u64 sum = 0;
    if (slot >= 0 && slot < a.slots) {
        const long long row = layer * a.slots + slot;
        const auto share = [&](const void* base, long long width, long long bytes, int part) {
            const long long each = (width + gridDim.x - 1) / gridDim.x;
            const long long first = blockIdx.x * each;
            return digest(static_cast<const char*>(base) + row * width * bytes, bytes, first,
                          min(first + each, width), part);
        };
        sum = share(a.window, a.window_width, a.window_bytes, 2) +
              share(a.state, a.state_width, a.state_bytes, 3);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) atomicAdd(a.out + layer * gridDim.y + blockIdx.y, sum);
}

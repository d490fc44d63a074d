// The exponential race: argmax of w_i / E_i, E_i = -ln U_i. Ties go to the lowest index.
#pragma once

constexpr int RACE_THREADS = 256, RACE_CHUNK = 1024;

// A score as its bits: doubles that are not negative order like the integers of their bits.
struct Winner {
    u64 score;
    long long index;
};

__device__ __forceinline__ Winner better(const Winner& a, const Winner& b) {
    return b.score > a.score || (b.score == a.score && b.index < a.index) ? b : a;
}

__device__ __forceinline__ Winner nobody() { return {0, 0x7fffffffffffffffll}; }

__device__ __forceinline__ Winner runner(double weight, u64 key, long long index) {
    if (!(weight > 0)) return {0, index};
    return {(u64)__double_as_longlong(weight / -log(uniform(key, index))), index};
}

// The best of a block's threads; valid in thread 0. All threads must call it.
__device__ __forceinline__ Winner block_best(Winner best) {
    __shared__ Winner warps[RACE_THREADS / 32];
    for (int step = 16; step; step /= 2)
        best = better(best, {__shfl_down_sync(~0u, best.score, step),
                             __shfl_down_sync(~0u, best.index, step)});
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < RACE_THREADS / 32; i++) best = better(best, warps[i]);
    __syncthreads();  // the next call writes `warps` again
    return best;
}

// The best of indices [first, last), `weight(i)` each; valid in thread 0.
template <typename Weight>
__device__ __forceinline__ Winner race(long long first, long long last, u64 key, Weight weight) {
    Winner best = nobody();
    for (long long i = first + threadIdx.x; i < last; i += RACE_THREADS)
        best = better(best, runner(weight(i), key, i));
    return block_best(best);
}

// The best of what the blocks of one row found; valid in thread 0.
__device__ __forceinline__ Winner best_of(const Winner* found, long long number) {
    Winner best = nobody();
    for (long long i = threadIdx.x; i < number; i += RACE_THREADS) best = better(best, found[i]);
    return block_best(best);
}

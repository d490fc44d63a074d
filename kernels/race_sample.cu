// Draw one index a row with probability proportional to its weight.
#include "hash.cuh"
#include "race.cuh"

struct Arguments {
    long long* out;       // [R]
    Winner* found;        // [R, chunks], scratch
    const void* weights;  // [R, V]
    const long long* seeds;
    const long long* positions;
    long long size, chunks, stream;
};

// grid = (chunks of RACE_CHUNK indices, R). With one chunk a row this is all there is to do.
template <typename Weight>
__device__ __forceinline__ void heats(const Arguments& a) {
    const long long row = blockIdx.y, first = (long long)blockIdx.x * RACE_CHUNK;
    const Weight* const weights = static_cast<const Weight*>(a.weights) + row * a.size;
    const u64 key = random_key(a.seeds[row], a.positions[row], (int)a.stream);
    const Winner best = race(first, min(first + RACE_CHUNK, a.size), key,
                             [&](long long i) { return (double)weights[i]; });
    if (threadIdx.x) return;
    if (a.chunks == 1)
        a.out[row] = best.index;
    else
        a.found[row * a.chunks + blockIdx.x] = best;
}

extern "C" __global__ void __launch_bounds__(RACE_THREADS) heats_f32(const Arguments a) {
    heats<float>(a);
}
extern "C" __global__ void __launch_bounds__(RACE_THREADS) heats_f64(const Arguments a) {
    heats<double>(a);
}

// grid = (R)
extern "C" __global__ void __launch_bounds__(RACE_THREADS) finish(const Arguments a) {
    const Winner best = best_of(a.found + blockIdx.x * a.chunks, a.chunks);
    if (threadIdx.x == 0) a.out[blockIdx.x] = best.index;
}

// Lossless speculative sampling (arXiv 2211.17192, algorithm 1), ragged over rows.
#include "hash.cuh"
#include "race.cuh"

struct Arguments {
    long long* accepted;   // [R]
    long long* following;  // [R]
    Winner* found;         // [R, chunks], scratch
    const void* target;    // [R, X + 1, V]
    const void* draft;     // [R, X, V]
    const long long* ids;  // [R, X]
    const long long* counts;
    const long long* seeds;
    const long long* positions;
    long long width, size, chunks;
};

// The length of the accepted prefix of a row. All threads must call it.
template <typename P>
__device__ __forceinline__ long long accepted_prefix(const Arguments& a, long long row) {
    __shared__ int first_rejected;
    const int count = (int)max(0ll, min(a.counts[row], a.width));
    if (threadIdx.x == 0) first_rejected = count;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += RACE_THREADS) {
        const long long id = a.ids[row * a.width + i];
        bool kept = id >= 0 && id < a.size;
        if (kept) {
            const double p = static_cast<const P*>(a.target)[(row * (a.width + 1) + i) * a.size + id];
            const double q = static_cast<const P*>(a.draft)[(row * a.width + i) * a.size + id];
            const u64 key = random_key(a.seeds[row], (u64)a.positions[row] + i, 1);
            kept = uniform(key, 0) * q < p;
        }
        if (!kept) atomicMin(&first_rejected, i);
    }
    __syncthreads();
    return first_rejected;
}

// What the id after the accepted ones is drawn from.
template <typename P>
struct After {
    const P* target;
    const P* draft;  // null where nothing was rejected
    u64 key;

    __device__ After(const Arguments& a, long long row, long long accepted)
        : target(static_cast<const P*>(a.target) + (row * (a.width + 1) + accepted) * a.size),
          draft(accepted < min(a.counts[row], a.width)
                    ? static_cast<const P*>(a.draft) + (row * a.width + accepted) * a.size
                    : nullptr),
          key(random_key(a.seeds[row], (u64)(a.positions[row] + accepted), 2)) {}

    __device__ double operator()(long long i) const {
        return draft ? (double)target[i] - (double)draft[i] : (double)target[i];
    }
};

// grid = (chunks of RACE_CHUNK ids, R)
template <typename P>
__device__ __forceinline__ void heats(const Arguments& a) {
    const long long row = blockIdx.y, first = (long long)blockIdx.x * RACE_CHUNK;
    const long long accepted = accepted_prefix<P>(a, row);
    const After<P> after(a, row, accepted);
    const Winner best = race(first, min(first + RACE_CHUNK, a.size), after.key, after);
    if (threadIdx.x) return;
    a.found[row * a.chunks + blockIdx.x] = best;
    if (blockIdx.x == 0) a.accepted[row] = accepted;
}

// grid = (R)
template <typename P>
__device__ __forceinline__ void finish(const Arguments& a) {
    __shared__ bool empty;
    const long long row = blockIdx.x;
    After<P> after(a, row, a.accepted[row]);
    Winner best = best_of(a.found + row * a.chunks, a.chunks);
    if (threadIdx.x == 0) empty = best.score == 0 && after.draft;
    __syncthreads();
    if (empty) {  // p == q up to rounding leaves no residual: then p itself is the right one
        after.draft = nullptr;
        best = race(0, a.size, after.key, after);
    }
    if (threadIdx.x == 0) a.following[row] = best.index;
}

#define ENTRY(name, function, P)                                                         \
    extern "C" __global__ void __launch_bounds__(RACE_THREADS) name(const Arguments a) { \
        function<P>(a);                                                                  \
    }
ENTRY(heats_f32, heats, float)
ENTRY(heats_f64, heats, double)
ENTRY(finish_f32, finish, float)
ENTRY(finish_f64, finish, double)

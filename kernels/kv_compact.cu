// Move accepted positions together: start + kept[i] moves to start + i, in place.
//
// kept increases and kept[i] >= i, so target i is never read by a later position j > i
// (kept[j] > i). A block takes POSITIONS of them at a time: all are read, then all are written.

struct Arguments {
    void* keys;    // [L, S, M, units]
    void* values;  // likewise
    const long long* rows;
    const long long* starts;
    const long long* kept;  // [R, X], -1 where nothing is kept
    long long slots, positions, units, width;
};

constexpr int COLUMNS = 32, LINES = 8, HELD = 8;
constexpr int POSITIONS = LINES * HELD;

// blockDim = (COLUMNS, LINES); grid = (blocks of units, R, 2 * L): keys at even, values at odd z
template <typename Unit>
__device__ __forceinline__ void compact(const Arguments& a) {
    const long long slot = a.rows[blockIdx.y], start = a.starts[blockIdx.y];
    if (slot < 0 || slot >= a.slots || start < 0) return;
    const long long unit = (long long)blockIdx.x * COLUMNS + threadIdx.x, layer = blockIdx.z / 2;
    Unit* const cache = static_cast<Unit*>(blockIdx.z % 2 ? a.values : a.keys) +
                        ((layer * a.slots + slot) * a.positions + start) * a.units + unit;
    const long long* const kept = a.kept + blockIdx.y * a.width;
    for (long long begin = 0; begin < a.width; begin += POSITIONS) {
        Unit held[HELD];
        bool moves[HELD];
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const long long i = begin + k * LINES + threadIdx.y;
            const long long from = i < a.width ? kept[i] : -1;
            moves[k] = unit < a.units && from > i && start + from < a.positions;
            if (moves[k]) held[k] = cache[from * a.units];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (moves[k]) cache[(begin + k * LINES + threadIdx.y) * a.units] = held[k];
    }
}

#define ENTRY(name, Unit)                                                           \
    extern "C" __global__ void __launch_bounds__(COLUMNS * LINES) name(const Arguments a) { \
        compact<Unit>(a);                                                           \
    }
ENTRY(compact_16, uint4)
ENTRY(compact_4, unsigned)
ENTRY(compact_2, unsigned short)

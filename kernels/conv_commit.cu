// Shift the first counts[r] journalled inputs into the convolution windows, in place.
//
// A thread owns one 16-byte (or narrower) column of channels. Position t takes what stood at
// t + count of window ++ inputs, so reading ahead of writing needs no second buffer.

struct Arguments {
    void* window;        // [L, S, K - 1, units]
    const void* inputs;  // [L, S', J, units]
    const long long* rows;
    const long long* sources;
    const long long* counts;
    long long slots, journal_rows, entries, taps, units;
};

constexpr int HELD = 4;  // taps read before any of them is written

// grid = (blocks of units, R, L)
template <typename Unit>
__device__ __forceinline__ void shift(const Arguments& a) {
    const long long unit = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long slot = a.rows[blockIdx.y], source = a.sources[blockIdx.y];
    const long long count = min(a.counts[blockIdx.y], a.entries);
    if (unit >= a.units || count <= 0) return;
    if (slot < 0 || slot >= a.slots || source < 0 || source >= a.journal_rows) return;
    const long long layer = blockIdx.z;
    Unit* const window =
        static_cast<Unit*>(a.window) + (layer * a.slots + slot) * a.taps * a.units + unit;
    const Unit* const inputs = static_cast<const Unit*>(a.inputs) +
                               (layer * a.journal_rows + source) * a.entries * a.units + unit;
    for (long long begin = 0; begin < a.taps; begin += HELD) {
        Unit held[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const long long from = begin + i + count;
            if (begin + i < a.taps)
                held[i] = from < a.taps ? window[from * a.units] : inputs[(from - a.taps) * a.units];
        }
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (begin + i < a.taps) window[(begin + i) * a.units] = held[i];
    }
}

#define ENTRY(name, Unit) \
    extern "C" __global__ void __launch_bounds__(128) name(const Arguments a) { shift<Unit>(a); }
ENTRY(shift_16, uint4)
ENTRY(shift_4, unsigned)
ENTRY(shift_2, unsigned short)

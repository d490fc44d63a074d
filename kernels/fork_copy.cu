// Copy one slot to several others: keys and values up to a length, windows and states whole.
//
// The four parts are laid end to end as chunks of units; a block reads one chunk of one layer once
// and writes it to every target.

struct Part {
    void* base;               // [layers, S, slot_units]
    long long slot_units;     // of one slot of one layer
    long long copied_units;   // of these, from the start
    long long chunks;         // a layer, of CHUNK units
    long long layers;
};

struct Arguments {
    Part parts[4];
    const long long* targets;
    long long number, slots, source;
};

constexpr int THREADS = 256, HELD = 4, CHUNK = THREADS * HELD;

// grid = (chunks of all parts and layers)
template <typename Unit>
__device__ __forceinline__ void copy(const Arguments& a) {
    long long chunk = blockIdx.x;
    int which = 0;
    while (which < 3 && chunk >= a.parts[which].chunks * a.parts[which].layers) {
        chunk -= a.parts[which].chunks * a.parts[which].layers;
        which++;
    }
    const Part part = a.parts[which];
    const long long layer = chunk / part.chunks;
    const long long first = (chunk - layer * part.chunks) * CHUNK + threadIdx.x;
    Unit* const slots = static_cast<Unit*>(part.base) + layer * a.slots * part.slot_units + first;
    const Unit* const source = slots + a.source * part.slot_units;
    Unit held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (first + i * THREADS < part.copied_units) held[i] = source[i * THREADS];
    for (long long t = 0; t < a.number; t++) {
        const long long slot = a.targets[t];
        if (slot < 0 || slot >= a.slots || slot == a.source) continue;
        Unit* const target = slots + slot * part.slot_units;
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (first + i * THREADS < part.copied_units) target[i * THREADS] = held[i];
    }
}

#define ENTRY(name, Unit) \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const Arguments a) { copy<Unit>(a); }
ENTRY(copy_16, uint4)
ENTRY(copy_4, unsigned)
ENTRY(copy_2, unsigned short)

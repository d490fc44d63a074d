// Copy one journal entry a row to entry 0 of the target's row, for all parts of a journal.

constexpr int PARTS = 3;

struct Arguments {
    void* targets[PARTS];         // each [L, S, J, units of that part]
    const void* journals[PARTS];  // each [L, S', J', units of that part]
    long long units[PARTS];       // 0 where there is no such part
    const long long* rows;
    const long long* sources;
    const long long* entries;
    long long target_rows, target_entries, journal_rows, journal_entries;
};

// grid = (blocks of the units of all parts, R, L)
template <typename Unit>
__device__ __forceinline__ void keep(const Arguments& a) {
    long long unit = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long layer = blockIdx.z;
    const long long row = a.rows[blockIdx.y], source = a.sources[blockIdx.y];
    const long long entry = a.entries[blockIdx.y];
    if (row < 0 || row >= a.target_rows || source < 0 || source >= a.journal_rows || entry < 0 ||
        entry >= a.journal_entries)
        return;
    const long long to = (layer * a.target_rows + row) * a.target_entries;
    const long long from = (layer * a.journal_rows + source) * a.journal_entries + entry;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const long long units = a.units[part];
        if (unit >= 0 && unit < units)
            static_cast<Unit*>(a.targets[part])[to * units + unit] =
                static_cast<const Unit*>(a.journals[part])[from * units + unit];
        unit -= units;
    }
}

#define ENTRY(name, Unit) \
    extern "C" __global__ void __launch_bounds__(128) name(const Arguments a) { keep<Unit>(a); }
ENTRY(keep_16, uint4)
ENTRY(keep_4, unsigned)
ENTRY(keep_2, unsigned short)

// Copy one journal entry a row to entry 0 of the target's row.

struct Arguments {
    void* target;         // [L, S, J, units]
    const void* journal;  // [L, S', J', units]
    const long long* rows;
    const long long* sources;
    const long long* entries;
    long long target_rows, target_entries, journal_rows, journal_entries, units;
};

// grid = (blocks of units, R, L)
template <typename Unit>
__device__ __forceinline__ void keep(const Arguments& a) {
    const long long unit = (long long)blockIdx.x * blockDim.x + threadIdx.x, layer = blockIdx.z;
    const long long row = a.rows[blockIdx.y], source = a.sources[blockIdx.y];
    const long long entry = a.entries[blockIdx.y];
    if (unit >= a.units || row < 0 || row >= a.target_rows || source < 0 ||
        source >= a.journal_rows || entry < 0 || entry >= a.journal_entries)
        return;
    static_cast<Unit*>(a.target)[(layer * a.target_rows + row) * a.target_entries * a.units + unit] =
        static_cast<const Unit*>(
            a.journal)[((layer * a.journal_rows + source) * a.journal_entries + entry) * a.units + unit];
}

#define ENTRY(name, Unit) \
    extern "C" __global__ void __launch_bounds__(128) name(const Arguments a) { keep<Unit>(a); }
ENTRY(keep_16, uint4)
ENTRY(keep_4, unsigned)
ENTRY(keep_2, unsigned short)

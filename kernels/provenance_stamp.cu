// Record the writer of positions [start, start + count) of each row.

struct Arguments {
    signed char* provenance;  // [S, M]
    const long long* rows;
    const long long* starts;
    const long long* counts;
    const long long* writers;
    long long slots, positions;
};

// grid = (blocks that share a row's positions, R)
extern "C" __global__ void __launch_bounds__(128) stamp(const Arguments a) {
    const long long slot = a.rows[blockIdx.y], start = a.starts[blockIdx.y];
    if (slot < 0 || slot >= a.slots) return;
    const long long end = min(start + a.counts[blockIdx.y], a.positions);
    const signed char writer = (signed char)a.writers[blockIdx.y];
    signed char* const row = a.provenance + slot * a.positions;
    const long long first = max(start, 0ll) + (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long at = first; at < end; at += (long long)gridDim.x * blockDim.x) row[at] = writer;
}

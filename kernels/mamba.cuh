// One Mamba-2 layer between its projections, for the tokens of a pass: convolution, scan, gate.
//
//     y_t = exp(c_t) C_t h + sum_{j <= t} exp(c_t - c_j) dt_j (C_t . B_j) x_j + D x_t,
// c the running sum of A dt over the journal's entries and the new tokens, h the committed state,
// which is read and not written (Mamba-2, arXiv 2405.21060, in its quadratic form: a pass is short).
// Convolved values are rounded to the journal's dtype before they are used, so that a commit, which
// replays the journal, continues from the very numbers that this pass has seen.
#pragma once
#include "activations.cuh"
#include "lanes.cuh"
#include "numbers.cuh"
#include "ptx.cuh"

struct Arguments {
    const bf16* projected;  // [R * T, gate H P | x H P | B G N | C G N | dt H], rows stride apart
    const void* state;      // [S, H, P, N] of this layer
    const bf16* window;     // [S, TAPS - 1, C]
    bf16* inputs;           // [S', J, C]
    bf16* scanned;          // [S', J, H P + G N]
    float* dt;              // [S', J, H]
    const bf16* conv;       // [C, TAPS]
    const bf16* conv_bias;  // [C], or null
    const bf16* dt_bias;    // [H]
    const float* decay;     // [H]
    const bf16* skip;       // [H]
    bf16* out;              // [R * T, H P]: y silu(gate)
    float* squares;         // [R * T, H]: of a head's outputs
    const long long* slots;
    const long long* sources;
    const long long* entries;  // [R]: journal entries before the new tokens
    const long long* counts;   // [R]: new tokens
    long long stride, length, slots_held, sources_held, entries_held, heads, groups, min_step;
    long long heads_a_block;
};

__device__ __forceinline__ float4 load_four(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}

__device__ __forceinline__ float4 load_four(const bf16* from) { return four(from); }

// The sum of a value over the lanes up to and with each.
__device__ __forceinline__ float sum_through(float x) {
    const int lane = threadIdx.x % 32;
    for (int distance = 1; distance < 32; distance *= 2) {
        const float before = __shfl_up_sync(~0u, x, distance);
        if (lane >= distance) x += before;
    }
    return x;
}

// A row of the pass: where its state and its journal are.
struct Row {
    long long slot, source;
    int old, count;
    bool usable;

    __device__ __forceinline__ Row(const Arguments& a, int row)
        : slot(a.slots[row]), source(a.sources[row]), old((int)a.entries[row]),
          count((int)min(a.counts[row], a.length)) {
        usable = slot >= 0 && slot < a.slots_held && source >= 0 && source < a.sources_held &&
                 old >= 0 && count > 0 && old + count <= a.entries_held;
    }
};

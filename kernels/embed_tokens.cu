// The embeddings of a pass's tokens; an id below zero stands for the token that was last picked for
// the slot, which the host need not have seen.
#include "numbers.cuh"
#include "ptx.cuh"

struct Arguments {
    bf16* hidden;             // [R * T, width]
    const bf16* embeddings;   // [vocabulary, width], rows stride apart
    const long long* ids;     // [R, T]
    const long long* latest;  // [S]
    const long long* slots;   // [R]
    long long stride, width, length, vocabulary, slots_held;
};

// grid = (R * T)
extern "C" __global__ void __launch_bounds__(256) embed(const Arguments a) {
    wait_for_inputs();
    let_next_start();
    const long long token = blockIdx.x, slot = a.slots[token / a.length];
    long long id = a.ids[token];
    if (id < 0 && slot >= 0 && slot < a.slots_held) id = a.latest[slot];
    if (id < 0 || id >= a.vocabulary) id = 0;
    const uint4* const from = reinterpret_cast<const uint4*>(a.embeddings + id * a.stride);
    uint4* const to = reinterpret_cast<uint4*>(a.hidden + token * a.width);
    for (int i = threadIdx.x; i < a.width / 8; i += 256) to[i] = from[i];
}

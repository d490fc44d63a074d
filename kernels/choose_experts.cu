// Top-k experts of each token, and the work lists by expert that the experts' kernels read.
//
// A warp chooses for a token, and a block makes the lists. They do not depend on the order in which
// threads run: a bit per (expert, token) is set, and a token's place among those of its expert is the
// number of bits before its own.
#include "ptx.cuh"

typedef unsigned long long u64;

struct Arguments {
    const float* logits;    // [tokens, experts]
    const float* bias;      // [experts], added for the choice alone
    const long long* rows;  // [R]: tokens that count of each row's `length`; the others choose none
    int* items;             // [3, items held]: expert, first pair, pairs
    int* counts;            // [2]: items, distinct experts
    int* pair_token;        // [tokens * top_k], by expert, then by token
    float* pair_weight;
    int* places;            // [tokens, top_k]: pair of each choice, below zero for none
    float* shares;          // [tokens, top_k]: weights
    unsigned* bits;         // [experts, words of 32 tokens], zero before and after
    unsigned* arrived;      // [1], likewise
    long long length, tokens, experts, top_k, item_tokens, items_held, normalise, scale;
};

constexpr int EACH = 8, MOST = 256;  // at most 256 experts: 8 a lane

// Orders like the floats; zero for what is no number.
__device__ __forceinline__ unsigned ordered(float x) {
    if (x != x) return 0;
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What is counted of an expert, packed: pairs, items and presence, and the sums up to and with it.
struct Counted {
    u64 value;
    __device__ __forceinline__ Counted(int pairs, int items, int present)
        : value((u64)pairs | (u64)items << 24 | (u64)present << 48) {}
    __device__ __forceinline__ int pairs() const { return (int)(value & 0xffffff); }
    __device__ __forceinline__ int items() const { return (int)(value >> 24 & 0xffffff); }
    __device__ __forceinline__ int present() const { return (int)(value >> 48); }
};

// The experts of one token, by one warp.
__device__ __forceinline__ void choose_for(const Arguments& a, int token, unsigned* bits) {
    const int experts = (int)a.experts, top_k = (int)a.top_k, lane = threadIdx.x % 32;
    const int words = ((int)a.tokens + 31) / 32;
    if (token % (int)a.length >= a.rows[token / (int)a.length]) {
        if (lane < top_k) a.places[token * top_k + lane] = -1;
        return;
    }
    const float scale = __int_as_float((int)a.scale);
    float score[EACH];
    unsigned key[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int expert = i * 32 + lane;
        const bool there = expert < experts;
        const float logit = there ? a.logits[(long long)token * experts + expert] : 0.f;
        score[i] = 1.f / (1.f + expf(-logit));
        key[i] = there ? ordered(score[i] + a.bias[expert]) : 0;
    }
    float total = 0.f, own = 0.f;
    for (int j = 0; j < top_k; j++) {
        unsigned best = key[0];
        int at = lane;
#pragma unroll
        for (int i = 1; i < EACH; i++)
            if (key[i] > best) best = key[i], at = i * 32 + lane;
        const unsigned whole = __reduce_max_sync(~0u, best);
        at = (int)__reduce_min_sync(~0u, best == whole ? (unsigned)at : ~0u);
        at = min(at, experts - 1);  // where nothing was a number
        float value = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (i * 32 + lane == at) value = score[i], key[i] = 0;
        value = __shfl_sync(~0u, value, at % 32);
        total += value;
        if (lane == j) {
            own = value;
            a.places[token * top_k + j] = at;
            atomicOr(&bits[at * words + token / 32], 1u << token % 32);
        }
    }
    if (lane < top_k)
        a.shares[token * top_k + lane] = (a.normalise ? own / (total + 1e-20f) : own) * scale;
}

// The lists, by a block of MOST threads, from the bits of all tokens.
__device__ __forceinline__ void make_lists(const Arguments& a, const unsigned* bits) {
    __shared__ int pairs_before[MOST];
    __shared__ u64 warps[MOST / 32];
    const int tokens = (int)a.tokens, experts = (int)a.experts, top_k = (int)a.top_k;
    const int words = (tokens + 31) / 32, thread = threadIdx.x, lane = thread % 32;
    const volatile unsigned* const set = bits;
    int mine = 0;
    if (thread < experts)
        for (int word = 0; word < words; word++) mine += __popc(set[thread * words + word]);
    const int items = (mine + (int)a.item_tokens - 1) / (int)a.item_tokens;
    u64 sum = Counted(mine, items, mine > 0).value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const u64 before = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += before;
    }
    if (lane == 31) warps[thread / 32] = sum;
    __syncthreads();
    for (int warp = 0; warp < thread / 32; warp++) sum += warps[warp];
    Counted through(0, 0, 0);
    through.value = sum;
    pairs_before[thread] = through.pairs() - mine;
    for (int i = 0; i < items; i++) {
        const long long item = through.items() - items + i;
        if (item >= a.items_held) break;
        a.items[item] = thread;
        a.items[a.items_held + item] = pairs_before[thread] + i * (int)a.item_tokens;
        a.items[2 * a.items_held + item] = min((int)a.item_tokens, mine - i * (int)a.item_tokens);
    }
    if (thread == MOST - 1) {
        a.counts[0] = min(through.items(), (int)a.items_held);
        a.counts[1] = through.present();
    }
    __syncthreads();
    for (int i = thread; i < tokens * top_k; i += MOST) {
        const int token = i / top_k, expert = ((const volatile int*)a.places)[i];
        if (expert < 0) continue;
        int place = pairs_before[expert];
        for (int word = 0; word < token / 32; word++) place += __popc(set[expert * words + word]);
        place += __popc(set[expert * words + token / 32] & ((1u << token % 32) - 1));
        a.places[i] = place;
        a.pair_token[place] = token;
        a.pair_weight[place] = ((const volatile float*)a.shares)[i];
    }
}

constexpr int THREADS = MOST;

// grid = (tokens / warps)
extern "C" __global__ void __launch_bounds__(THREADS) choose(const Arguments a) {
    __shared__ bool is_last;
    __shared__ unsigned own_bits[MOST];
    const bool alone = gridDim.x == 1;  // a block that needs no memory to speak with others
    unsigned* const bits = alone ? own_bits : a.bits;
    own_bits[threadIdx.x] = 0;
    wait_for_inputs();
    let_next_start();
    __syncthreads();
    const int token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (token < a.tokens) choose_for(a, token, bits);
    if (!alone) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicInc(a.arrived, gridDim.x - 1) == gridDim.x - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
    }
    __syncthreads();
    make_lists(a, bits);
    if (alone) return;
    __syncthreads();
    const int words = (int)a.experts * (((int)a.tokens + 31) / 32);
    for (int i = threadIdx.x; i < words; i += THREADS) a.bits[i] = 0;
}

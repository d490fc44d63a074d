// Top-k experts of each token, and the work lists by expert that the experts' kernels read.
//
// A warp chooses for a token, and a block makes the lists. They do not depend on the order in which
// threads run: a bit per (expert, token) is set, and a token's place among those of its expert is the
// number of bits before its own.
#pragma once
#include "lanes.cuh"
#include "ptx.cuh"

typedef unsigned long long u64;

// What is chosen from, and for whom.
struct Choice {
    float* logits;          // [tokens, experts]
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

constexpr int MOST = 256;  // experts

// Orders like the floats; zero for what is no number.
__device__ __forceinline__ unsigned ordered(float x) {
    if (x != x) return 0;
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A logit that no block has written yet: a value that no product has.
constexpr unsigned BLANK = ~0u;

__device__ __forceinline__ void write_logit(float* to, float logit) {
    *(volatile float*)to = logit == logit ? logit : __uint_as_float(0x7fffffffu);
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

// The experts of one token, by one warp. `picks` and `shares` are [tokens, top_k].
// WAITS: for logits that other blocks of the same launch still write
template <bool WAITS>
__device__ __forceinline__ void choose_for(const Choice& a, int token, unsigned* bits, int* picks,
                                           float* shares) {
    constexpr int EACH = MOST / 32;  // experts of a lane
    const int length = (int)a.length, row = token / length;
    const int experts = (int)a.experts, top_k = (int)a.top_k, lane = threadIdx.x % 32;
    const int words = ((int)a.tokens + 31) / 32;
    if (token - row * length >= a.rows[row]) {
        if (lane < top_k) picks[token * top_k + lane] = -1;
        return;
    }
    float score[EACH];
    unsigned key[EACH], blank;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        key[i] = __float_as_uint(a.bias[min(i * 32 + lane, experts - 1)]);
    do {
        blank = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            score[i] = fresh(a.logits + token * experts + min(i * 32 + lane, experts - 1));
#pragma unroll
        for (int i = 0; i < EACH; i++) blank |= __float_as_uint(score[i]) == BLANK;
    } while (WAITS && __reduce_max_sync(~0u, blank));
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        score[i] = __fdividef(1.f, 1.f + __expf(-score[i]));
        key[i] = i * 32 + lane < experts ? ordered(score[i] + __uint_as_float(key[i])) : 0;
    }
    int pick = 0;
#pragma unroll 1
    for (int j = 0; j < top_k; j++) {
        unsigned best = key[0];
        int at = lane;
#pragma unroll
        for (int i = 1; i < EACH; i++)
            if (key[i] > best) best = key[i], at = i * 32 + lane;
        const unsigned whole = __reduce_max_sync(~0u, best);
        at = (int)__reduce_min_sync(~0u, best == whole ? (unsigned)at : ~0u);
        at = min(at, experts - 1);  // where nothing was a number
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (i * 32 + lane == at) key[i] = 0;
        if (lane == j) pick = at;
    }
    float own = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const float value = __shfl_sync(~0u, score[i], pick % 32);
        if (pick / 32 == i && lane < top_k) own = value;
    }
    const float total = over_warp(own);
    if (lane >= top_k) return;
    picks[token * top_k + lane] = pick;
    shares[token * top_k + lane] =
        (a.normalise ? own / (total + 1e-20f) : own) * __int_as_float((int)a.scale);
    atomicOr(&bits[pick * words + token / 32], 1u << token % 32);
}

// What of the lists a block keeps for itself, of at most MOST pairs and 32 tokens.
struct Lists {
    int count;                  // of items
    unsigned items[MOST];       // expert, pairs << 8, first pair << 16
    unsigned char token[MOST];  // of a pair
};

// The lists where there is one token, by the warp that has chosen: its experts in ascending order.
__device__ __forceinline__ void list_one(const Choice& a, const int* picks, const float* shares,
                                         Lists* own, bool writes) {
    const int top_k = (int)a.top_k, lane = threadIdx.x % 32;
    __syncwarp();
    const int count = picks[0] < 0 ? 0 : top_k, held = (int)a.items_held;
    if (lane == 0) own->count = count;
    if (writes && lane < 2) a.counts[lane] = count;
    if (writes && lane < top_k) a.places[lane] = -1;
    if (lane >= count) return;
    int place = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) place += picks[i] < picks[lane];
    own->items[place] = picks[lane] | 1 << 8 | place << 16;
    own->token[place] = 0;
    if (!writes) return;
    a.items[place] = picks[lane], a.items[held + place] = place, a.items[2 * held + place] = 1;
    a.pair_token[place] = 0, a.places[lane] = place;
    a.pair_weight[place] = a.shares[lane] = shares[lane];
}

// The lists, by a block of MOST threads or a warp more, from the bits of all tokens: those that the block
// keeps, unless there are none, and those of `a`, if it writes them. pairs_before: [MOST + 32], scratch
__device__ __forceinline__ void make_lists(const Choice& a, const unsigned* bits, const int* picks,
                                           const float* shares, int* pairs_before, Lists* own,
                                           bool writes) {
    __shared__ u64 warps[MOST / 32 + 1];
    const int tokens = (int)a.tokens, experts = (int)a.experts, top_k = (int)a.top_k;
    const int words = (tokens + 31) / 32, thread = threadIdx.x, lane = thread % 32;
    const volatile unsigned* const set = bits;
    int mine = 0;
    if (thread < experts)
#pragma unroll 1
        for (int word = 0; word < words; word++) mine += __popc(set[thread * words + word]);
    const int items = (mine + (int)a.item_tokens - 1) / (int)a.item_tokens;
    u64 sum = Counted(mine, items, mine > 0).value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const u64 before = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += before;
    }
    if (lane == 31) warps[thread / 32] = sum;
    __syncthreads();
    const int warps_before = thread < MOST ? thread / 32 : 0;  // behind the experts nothing counts
#pragma unroll 1
    for (int warp = 0; warp < warps_before; warp++) sum += warps[warp];
    Counted through(0, 0, 0);
    through.value = sum;
    pairs_before[thread] = through.pairs() - mine;
#pragma unroll 1
    for (int i = 0; i < items; i++) {
        const int item = through.items() - items + i, held = (int)a.items_held;
        const int first = pairs_before[thread] + i * (int)a.item_tokens;
        const int pairs = min((int)a.item_tokens, mine - i * (int)a.item_tokens);
        if (item >= held) break;
        if (own) own->items[item] = thread | pairs << 8 | first << 16;
        if (writes) {
            a.items[item] = thread;
            a.items[held + item] = first, a.items[2 * held + item] = pairs;
        }
    }
    if (thread == MOST - 1) {
        const int count = min(through.items(), (int)a.items_held);
        if (own) own->count = count;
        if (writes) a.counts[0] = count, a.counts[1] = through.present();
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < tokens * top_k; i += blockDim.x) {
        const int token = i / top_k, expert = ((const volatile int*)picks)[i];
        const float share = ((const volatile float*)shares)[i];
        if (expert < 0) {
            if (writes) a.places[i] = -1;
            continue;
        }
        int place = pairs_before[expert];
#pragma unroll 1
        for (int word = 0; word < token / 32; word++) place += __popc(set[expert * words + word]);
        place += __popc(set[expert * words + token / 32] & ((1u << token % 32) - 1));
        if (own) own->token[place] = (unsigned char)token;
        if (!writes) continue;
        a.places[i] = place;
        a.pair_token[place] = token;
        a.pair_weight[place] = a.shares[i] = share;
    }
}

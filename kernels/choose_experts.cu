// Top-k experts of each token, and the work lists by expert that experts_up and experts_down read.
//
// One block. The lists do not depend on the order in which threads run: a bit per (expert, token) is
// set, and a token's place among those of its expert is the number of bits before its own.

#include "ptx.cuh"

struct Arguments {
    const float* logits;  // [tokens, experts]
    const float* bias;    // [experts], added for the choice alone
    const long long* rows;  // [R]: tokens that count of each row's `length`; the others choose none
    int* items;           // [3, items held]: expert, first pair, pairs
    int* counts;          // [2]: items, distinct experts
    int* pair_token;      // [tokens * top_k], by expert, then by token
    float* pair_weight;
    long long length, tokens, experts, top_k, item_tokens, items_held, normalise, scale;
};

constexpr int THREADS = 1024, EACH = 8, MOST = 256;  // at most 256 experts: 8 a lane

// One step of an inclusive sum over MOST values. All threads must call it.
__device__ __forceinline__ void add_at_distance(int* values, int distance) {
    const int thread = threadIdx.x;
    const int before = thread >= distance && thread < MOST ? values[thread - distance] : 0;
    __syncthreads();
    if (thread < MOST) values[thread] += before;
    __syncthreads();
}

// shared: chosen [tokens * top_k], weights likewise, bits [experts, words]
extern "C" __global__ void __launch_bounds__(THREADS) choose(const Arguments a) {
    extern __shared__ int given[];
    __shared__ int pairs[MOST], tiles[MOST], present[MOST];
    const int tokens = (int)a.tokens, experts = (int)a.experts, top_k = (int)a.top_k;
    const int words = (tokens + 31) / 32, thread = threadIdx.x, lane = thread % 32;
    int* const chosen = given;
    float* const weights = reinterpret_cast<float*>(given + tokens * top_k);
    unsigned* const bits = reinterpret_cast<unsigned*>(given + 2 * tokens * top_k);
    for (int i = thread; i < experts * words; i += THREADS) bits[i] = 0;
    wait_for_inputs();
    let_next_start();
    __syncthreads();

    const float scale = __int_as_float((int)a.scale);
    for (int token = thread / 32; token < tokens; token += THREADS / 32) {
        if (token % (int)a.length >= a.rows[token / (int)a.length]) {
            if (lane < top_k) chosen[token * top_k + lane] = -1;
            continue;
        }
        float score[EACH], choice[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int expert = i * 32 + lane;
            score[i] = choice[i] = -1.f / 0.f;
            if (expert < experts) {
                score[i] = 1.f / (1.f + expf(-a.logits[(long long)token * experts + expert]));
                const float with = score[i] + a.bias[expert];
                if (with == with) choice[i] = with;
            }
        }
        float total = 0.f, own = 0.f;
        for (int j = 0; j < top_k; j++) {
            float best = choice[0];
            int at = lane;
#pragma unroll
            for (int i = 1; i < EACH; i++)
                if (choice[i] > best) best = choice[i], at = i * 32 + lane;
            for (int step = 16; step; step /= 2) {
                const float other = __shfl_xor_sync(~0u, best, step);
                const int place = __shfl_xor_sync(~0u, at, step);
                if (other > best || (other == best && place < at)) best = other, at = place;
            }
            at = min(at, experts - 1);  // where nothing was a number
            float value = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (i * 32 + lane == at) value = score[i], choice[i] = -1.f / 0.f;
            value = __shfl_sync(~0u, value, at % 32);
            total += value;
            if (lane == j) {
                own = value;
                chosen[token * top_k + j] = at;
                atomicOr(&bits[at * words + token / 32], 1u << token % 32);
            }
        }
        if (lane < top_k)
            weights[token * top_k + lane] = (a.normalise ? own / (total + 1e-20f) : own) * scale;
    }
    __syncthreads();

    int mine = 0;
    if (thread < MOST) {
        if (thread < experts)
            for (int word = 0; word < words; word++) mine += __popc(bits[thread * words + word]);
        pairs[thread] = mine;
        tiles[thread] = (mine + (int)a.item_tokens - 1) / (int)a.item_tokens;
        present[thread] = mine > 0;
    }
    __syncthreads();
    for (int distance = 1; distance < MOST; distance *= 2) {
        add_at_distance(pairs, distance);
        add_at_distance(tiles, distance);
        add_at_distance(present, distance);
    }
    if (thread < experts) {
        const int own = (mine + (int)a.item_tokens - 1) / (int)a.item_tokens;
        for (int i = 0; i < own; i++) {
            const long long item = tiles[thread] - own + i;
            if (item >= a.items_held) break;
            a.items[item] = thread;
            a.items[a.items_held + item] = pairs[thread] - mine + i * (int)a.item_tokens;
            a.items[2 * a.items_held + item] = min((int)a.item_tokens, mine - i * (int)a.item_tokens);
        }
    }
    if (thread == 0) {
        a.counts[0] = min(tiles[MOST - 1], (int)a.items_held);
        a.counts[1] = present[MOST - 1];
    }
    for (int i = thread; i < tokens * top_k; i += THREADS) {
        const int token = i / top_k, expert = chosen[i];
        if (expert < 0) continue;
        int place = expert ? pairs[expert - 1] : 0;
        for (int word = 0; word < token / 32; word++) place += __popc(bits[expert * words + word]);
        place += __popc(bits[expert * words + token / 32] & ((1u << token % 32) - 1));
        a.pair_token[place] = token;
        a.pair_weight[place] = weights[i];
    }
}

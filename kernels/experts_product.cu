// Products with the weights of the chosen experts, for their (token, expert) pairs: relu(up(norm(x))) ** 2
// into bf16, or down(inner) into fp32.
//
// The first half may begin with the router's product, by a few blocks, and that of the shared expert,
// which needs no choice: the other blocks go through their share of it meanwhile. Then every block
// chooses for itself, which takes less time than to wait for one that does it for all. Blocks start in
// the order of their numbers, so those that all others wait for are always there.
#include "choose.cuh"
#include "tile_stream.cuh"

struct Arguments {
    const bf16* x;          // up: [tokens, depth], down: [pairs, depth]; rows x_stride apart
    const bf16* norm;       // up: [depth]
    const bf16* weights;    // [experts, width, depth], strides apart
    void* out;              // [pairs, width]
    const bf16* router;     // [experts, depth], rows router_stride apart
    const bf16* shared_up;  // [shared width, depth], rows shared_stride apart
    bf16* dense;            // [tokens, shared width], rows dense_stride apart
    const int* items;       // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    long long x_stride, tokens, depth, width, expert_stride, row_stride;
    long long router_stride, shared_width, shared_stride, dense_stride, items_held, eps, team;
    long long router_blocks, router_team;  // the first blocks, that compute the logits
    long long shared_blocks, shared_team;  // those that take part in the shared expert
    Choice choice;  // that fills the lists above, of at most MOST pairs; with a shared expert. Its
                    // logits are blank before and after
};

constexpr int LATE = 8;  // rows of the shared expert that others go through while a block computes logits

__device__ __forceinline__ bf16 activated(float x) {
    return (bf16)narrow(relu_squared(widen((bf16)narrow(x))));
}

// Wait for the logits and choose, into lists of this block's own. The last block, which has the least to
// do before, writes those of all before the next kernel may start; that may read them before it waits.
// Returns how many blocks have read the logits before, to thread 0.
__device__ __forceinline__ unsigned choose_here(const Choice& choice, void* scratch, Lists* own) {
    unsigned* const bits = static_cast<unsigned*>(scratch);
    int* const picks = reinterpret_cast<int*>(bits + MOST);
    int* const pairs_before = picks + MOST;
    float* const shares = reinterpret_cast<float*>(pairs_before + MOST);
    const bool writes = blockIdx.x == gridDim.x - 1;
    bits[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 1
    for (int token = threadIdx.x / 32; token < choice.tokens; token += WARPS)
        choose_for<true>(choice, token, bits, picks, shares);
    __syncthreads();
    const unsigned before = threadIdx.x ? 0 : atomicInc(choice.arrived, gridDim.x - 1);
    if (choice.tokens == 1 && !writes)
        list_one(choice, picks, own);
    else
        make_lists(choice, bits, picks, shares, pairs_before, own, writes);
    if (writes) __threadfence();
    __syncthreads();
    if (writes) let_next_start();
    return before;
}

// Logits that all blocks have read, by one warp.
__device__ __forceinline__ void make_blank(const Choice& choice) {
    for (int i = threadIdx.x; i < choice.tokens * choice.experts; i += 32)
        choice.logits[i] = __uint_as_float(BLANK);
}

// What is multiplied together: the rows of all items' experts, or those of the router or the shared
// expert, which are one item of all tokens.
// OWN: whether the items are in this block's own lists; without lists one of the others is meant
template <bool OWN>
struct View {
    const bf16* weights;
    void* out;         // rows out_stride apart
    const Lists* own;  // or null
    int expert_stride, row_stride, out_stride, units, width, blocks, early, done, team;
    bool is_router;

    __device__ __forceinline__ int expert(const Arguments& a, int item) const {
        if (OWN) return own ? own->items[item] & 0xff : 0;
        return a.items[item];
    }
    __device__ __forceinline__ int first(const Arguments& a, int item) const {
        if (OWN) return own ? own->items[item] >> 16 : 0;
        return a.items[a.items_held + item];
    }
    __device__ __forceinline__ int pairs(const Arguments& a, int item) const {
        if (OWN) return own ? own->items[item] >> 8 & 0xff : (int)a.tokens;
        return a.items[2 * a.items_held + item];
    }
    __device__ __forceinline__ int token(const Arguments& a, int pair) const {
        if (OWN) return own ? own->token[pair] : pair;
        return a.pair_token[pair];
    }
};

template <int N, bool UP, int SLOTS, bool OWN>
__device__ __forceinline__ void multiply_all(const Arguments& a, const View<OWN>& view,
                                             uint4* shared, Gathered<N>* gathered) {
    const Team team(view.team);
    const int depth = (int)a.depth, g = threadIdx.x % 32 / 4, steps = team.steps(depth);
    const float eps = __int_as_float((int)a.eps);
    const auto column = [&](int step) { return team.column(step); };
    Ring<SLOTS> ring(shared);
    Walk ahead(team, view.units, view.width, view.blocks, view.early, view.done);
    Tile coming = {0, 0, 0};
    Lines lines = {nullptr, nullptr};
    int next = steps;
    const auto following = [&]() -> Batch {
        next += STEPS<N>;
        if (next >= steps) {
            coming = ahead.next();
            if (coming.height) {
                const bf16* const first = view.weights +
                                          (long long)view.expert(a, coming.unit) * view.expert_stride +
                                          (long long)coming.row * view.row_stride;
                lines.low = g < coming.height ? first + g * view.row_stride : nullptr;
                lines.high = g + 8 < coming.height ? first + (g + 8) * view.row_stride : nullptr;
            }
            next = 0;
        }
        return {lines, next, coming.height ? steps : next, depth};
    };
    ring.template fill<N>(column, following);
    wait_for_inputs();
    if (!OWN || blockIdx.x != gridDim.x - 1) let_next_start();  // that one still has lists to write

    Walk walk(team, view.units, view.width, view.blocks, view.early, view.done);
    int turn = 0;
    for (Tile tile = walk.next(); tile.height; tile = walk.next(), turn ^= 1) {
        const int first = view.first(a, tile.unit), pairs = view.pairs(a, tile.unit);
        const bf16* x[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int pair = first + n * 8 + g;
            const bool is_there = n * 8 + g < pairs;
            const int row = UP && is_there ? view.token(a, pair) : pair;
            x[n] = is_there ? a.x + row * a.x_stride : nullptr;
        }
        float sum[N][4] = {};
        if constexpr (UP) {
            Normed<N> normed(a.norm);
            multiply(sum, ring, x, 0, steps, depth, normed, column, following);
            gathered[turn].put_squares(normed.squares);
        } else {
            Plain plain;
            multiply(sum, ring, x, 0, steps, depth, plain, column, following);
        }
        gathered[turn].put(sum);
        team.meet();
#pragma unroll 1
        for (int i = team.thread(); i < N * 8 * TILE; i += team.threads()) {
            const int row = i % TILE, pair = i / TILE;
            if (pair >= pairs || row >= tile.height) continue;
            const float value = gathered[turn].at(team, row, pair);
            const long long to = (long long)(first + pair) * view.out_stride + tile.row + row;
            if constexpr (UP) {
                const float normed = value * gathered[turn].factor(team, pair, depth, eps);
                if (OWN && view.is_router)
                    write_logit(static_cast<float*>(view.out) + to, normed);
                else
                    static_cast<bf16*>(view.out)[to] = activated(normed);
            } else
                static_cast<float*>(view.out)[to] = value;
        }
    }
}

// grid = (blocks that share the rows of router, shared expert and all items); shared: the ring
// S: groups of 8 tokens of the shared expert, none for 0
enum Part { ROUTER, SHARED, EXPERTS };

template <int N, bool UP, int S, int SLOTS>
__device__ __forceinline__ void product(const Arguments& a) {
    constexpr int MOST_GROUPS = N > S ? N : S;
    __shared__ Gathered<MOST_GROUPS> memory[2];
    extern __shared__ uint4 shared[];
    if constexpr (S == 0) {
        const View<false> experts = {a.weights,         a.out,        nullptr,     (int)a.expert_stride,
                                     (int)a.row_stride, (int)a.width, a.counts[0], (int)a.width,
                                     (int)gridDim.x,    0,            0,           (int)a.team,
                                     false};
        multiply_all<N, UP, SLOTS>(a, experts, shared, memory);
    } else {
        __shared__ Lists own;
        const int routing = (int)a.router_blocks, sharing = (int)a.shared_blocks;
        const int first = blockIdx.x < routing ? ROUTER : SHARED;
        unsigned before = 0;
        const auto view_of = [&](int part) -> View<true> {
            if (part != first) {
                wait_for_group<0>();
                __syncthreads();  // `memory` and the ring are this part's now
            }
            if (part == EXPERTS) before = choose_here(a.choice, memory, &own);
            const int width = (int)(part == ROUTER ? a.choice.experts
                                    : part == SHARED ? a.shared_width : a.width);
            const int blocks = part == ROUTER ? routing : part == SHARED ? sharing : (int)gridDim.x;
            const int early = part == ROUTER ? 0 : part == SHARED ? routing : sharing;
            return {part == ROUTER   ? a.router
                    : part == SHARED ? a.shared_up
                                     : a.weights,
                    part == ROUTER   ? (void*)a.choice.logits
                    : part == SHARED ? a.dense
                                     : a.out,
                    part == EXPERTS ? &own : nullptr,
                    (int)a.expert_stride,
                    (int)(part == ROUTER ? a.router_stride : part == SHARED ? a.shared_stride : a.row_stride),
                    (int)(part == SHARED ? a.dense_stride : width),
                    part == EXPERTS ? own.count : 1,
                    width,
                    blocks,
                    early < blocks ? early : 0,
                    part == SHARED ? LATE : (int)a.shared_width / sharing,
                    (int)(part == ROUTER ? a.router_team : part == SHARED ? a.shared_team : a.team),
                    part == ROUTER};
        };
        if constexpr (S == N) {
#pragma unroll 1
            for (int part = first; part <= EXPERTS; part++)
                multiply_all<N, UP, SLOTS>(a, view_of(part), shared, memory);
        } else {
#pragma unroll 1
            for (int part = first; part < EXPERTS; part++)
                multiply_all<S, UP, SLOTS>(a, view_of(part), shared, reinterpret_cast<Gathered<S>*>(memory));
            multiply_all<N, UP, SLOTS>(a, view_of(EXPERTS), shared, reinterpret_cast<Gathered<N>*>(memory));
        }
        if (threadIdx.x < 32 && __shfl_sync(~0u, before, 0) == gridDim.x - 1) make_blank(a.choice);
    }
}

#define ENTRY(name, N, UP, S, BLOCKS)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Arguments a) { \
        product<N, UP, S, BLOCKS == 3 ? STAGES : 2 * STAGES>(a);                            \
    }
ENTRY(up_8_shared_8, 1, true, 1, 3)
ENTRY(up_8_shared_16, 1, true, 2, 2)
ENTRY(up_8_shared_32, 1, true, 4, 2)
ENTRY(up_8, 1, true, 0, 3)
ENTRY(up_16, 2, true, 0, 2)
ENTRY(down_8, 1, false, 0, 3)
ENTRY(down_16, 2, false, 0, 2)

// Products with the weights of the chosen experts, for their (token, expert) pairs: relu(up(norm(x))) ** 2
// into bf16, or down(inner) into fp32.
//
// The first half may begin with that of the shared expert, which needs no choice: a block goes through
// its share of it while the router still computes its logits. Then every block chooses for itself, which
// takes less time than to wait for one that does it for all.
#include "choose.cuh"
#include "tile_stream.cuh"

struct Arguments {
    const bf16* x;          // up: [tokens, depth], down: [pairs, depth]; rows x_stride apart
    const bf16* norm;       // up: [depth]
    const bf16* weights;    // [experts, width, depth], strides apart
    void* out;              // [pairs, width]
    const bf16* shared_up;  // [shared width, depth], rows shared_stride apart
    bf16* dense;            // [tokens, shared width], rows dense_stride apart
    const int* items;       // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    long long x_stride, tokens, depth, width, expert_stride, row_stride;
    long long shared_width, shared_stride, dense_stride, items_held, eps, team;
    long long shared_team, shared_blocks;  // of the blocks that take part in the shared expert
    Choice choice;  // that fills the lists above, of at most MOST pairs; with a shared expert
};

__device__ __forceinline__ bf16 activated(float x) {
    return (bf16)narrow(relu_squared(widen((bf16)narrow(x))));
}

// Wait for the logits and choose, into lists of this block's own. The last block, which has the least to
// do before, writes those of all before the next kernel may start; that may read them before it waits.
__device__ __forceinline__ void choose_here(const Choice& choice, void* scratch, Lists* own) {
    unsigned* const bits = static_cast<unsigned*>(scratch);
    int* const picks = reinterpret_cast<int*>(bits + MOST);
    int* const pairs_before = picks + MOST;
    float* const shares = reinterpret_cast<float*>(pairs_before + MOST);
    const bool writes = blockIdx.x == gridDim.x - 1;
    bits[threadIdx.x] = 0;
    wait_for_inputs();
    if (!writes) let_next_start();
    __syncthreads();
#pragma unroll 1
    for (int token = threadIdx.x / 32; token < choice.tokens; token += WARPS)
        choose_for(choice, token, bits, picks, shares);
    __syncthreads();
    if (choice.tokens == 1 && !writes)
        list_one(choice, picks, own);
    else
        make_lists(choice, bits, picks, shares, pairs_before, own, writes);
    if (writes) __threadfence();
    __syncthreads();
    if (writes) let_next_start();
}

// What is multiplied together: the rows of all items' experts, or those of the shared expert, which is
// one item of all tokens.
// OWN: whether the items are in this block's own lists, and otherwise the shared expert is meant
template <bool OWN>
struct View {
    const bf16* weights;
    void* out;         // rows out_stride apart
    const Lists* own;  // or null
    int expert_stride, row_stride, out_stride, units, width, blocks, early, done, team;

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
            if constexpr (UP)
                static_cast<bf16*>(view.out)[to] =
                    activated(value * gathered[turn].factor(team, pair, depth, eps));
            else
                static_cast<float*>(view.out)[to] = value;
        }
    }
}

// grid = (blocks that share the rows of the shared expert, then those of all items); shared: the ring
// S: groups of 8 tokens of the shared expert, none for 0
template <int N, bool UP, int S, int SLOTS>
__device__ __forceinline__ void product(const Arguments& a) {
    constexpr int MOST_GROUPS = N > S ? N : S;
    __shared__ Gathered<MOST_GROUPS> memory[2];
    extern __shared__ uint4 shared[];
    // The experts of `units` items; the first `early` blocks have done `done` rows before.
    const auto experts = [&](const Lists* own, int units, int early, int done) -> View<S != 0> {
        return {a.weights,    a.out, own,          (int)a.expert_stride, (int)a.row_stride, (int)a.width,
                units,        (int)a.width,        (int)gridDim.x,       early,             done,
                (int)a.team};
    };
    if constexpr (S == 0) {
        wait_for_inputs();
        let_next_start();
        multiply_all<N, UP, SLOTS>(a, experts(nullptr, a.counts[0], 0, 0), shared, memory);
    } else {
        // x is older than the router's logits: the kernel that made it has ended before theirs began.
        __shared__ Lists own;
        const int rows = (int)a.shared_width, blocks = (int)a.shared_blocks;
        View<true> view = {a.shared_up, a.dense, nullptr, 0,      (int)a.shared_stride, (int)a.dense_stride,
                           1,           rows,    blocks,  0,      0,
                           (int)a.shared_team};
        const auto take_experts = [&] {
            wait_for_group<0>();
            __syncthreads();  // `memory` and the ring are the experts' now
            choose_here(a.choice, memory, &own);
            view = experts(&own, own.count, blocks < gridDim.x ? blocks : 0, rows / blocks);
        };
        if constexpr (S == N) {
#pragma unroll 1
            for (int part = 0; part < 2; part++) {
                if (part) take_experts();
                multiply_all<N, UP, SLOTS>(a, view, shared, memory);
            }
        } else {
            multiply_all<S, UP, SLOTS>(a, view, shared, reinterpret_cast<Gathered<S>*>(memory));
            take_experts();
            multiply_all<N, UP, SLOTS>(a, view, shared, reinterpret_cast<Gathered<N>*>(memory));
        }
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

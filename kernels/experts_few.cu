// The first half of the experts for few tokens: the choice of experts, relu(up(norm(x))) ** 2 of those
// that are chosen, and that of the shared expert.
//
// The first blocks begin with the router's product, and all with the shared expert, which needs no choice.
// Then every block chooses for itself, which takes less time than to wait for one that does it for all; a
// warp beside those that multiply does so while these are busy. Blocks start in the order of their
// numbers, so those that all others wait for are always there.
#include "choose.cuh"
#include "tile_stream.cuh"

struct Arguments {
    const bf16* x;          // [tokens, depth], rows x_stride apart
    const bf16* norm;       // [depth]
    const bf16* weights;    // [experts, width, depth], strides apart
    bf16* out;              // [pairs, width]
    const bf16* router;     // [experts, depth], rows router_stride apart
    const bf16* shared_up;  // [shared width, depth], rows shared_stride apart
    bf16* dense;            // [tokens, shared width], rows dense_stride apart
    long long x_stride, tokens, depth, width, expert_stride, row_stride;
    long long router_stride, shared_width, shared_stride, dense_stride, eps;
    long long team, inverse_teams, inverse_width;  // of the experts; inverses as floats
    long long shared_team, share, rest;            // of the shared expert
    long long router_blocks, router_team;          // the first blocks; log2 of the warps of a token
    Choice choice;  // of at most MOST pairs, items of 8; its logits are blank before and after
};

constexpr int CHOOSER = WARPS;  // the warp of a block that does not multiply but choose

// The choice of a block, and what it takes.
struct Choosing {
    unsigned bits[MOST];
    int picks[MOST], pairs_before[MOST + 32];
    float shares[MOST];
    Lists own;
};

// Wait for the logits and choose, into lists of this block's own: the chooser for the first token while
// all others multiply, and all for the others. The last block writes the lists of all, and the next
// kernel may start, which may read them before it waits. Returns how many blocks have read the logits
// before, to thread 0.
__device__ __forceinline__ unsigned choose_here(const Choice& choice, Choosing& here) {
    const int warp = threadIdx.x / 32;
    const bool writes = blockIdx.x == gridDim.x - 1, is_one = choice.tokens == 1;
#pragma unroll 1
    for (int token = warp == CHOOSER ? 0 : warp + 1; token < choice.tokens; token += WARPS + 1)
        choose_for<true>(choice, token, here.bits, here.picks, here.shares);
    if (warp == CHOOSER && is_one) {
        list_one(choice, here.picks, here.shares, &here.own, writes);
        if (writes) __threadfence();
    }
    wait_for_group<0>();
    __syncthreads();  // what has been multiplied with is the experts' now
    const unsigned before = threadIdx.x ? 0 : atomicInc(choice.arrived, gridDim.x - 1);
    if (!is_one) {
        make_lists(choice, here.bits, here.picks, here.shares, here.pairs_before, &here.own, writes);
        if (writes) __threadfence();
        __syncthreads();
    }
    if (writes) let_next_start();
    return before;
}

// Logits that all blocks have read, by one warp.
__device__ __forceinline__ void make_blank(const Choice& choice) {
    for (int i = threadIdx.x; i < choice.tokens * choice.experts; i += 32)
        choice.logits[i] = __uint_as_float(BLANK);
}

// The logits of a block's experts. All of them together are less than a tile for every block, and all
// others wait for them: few ways to memory for a token, whose columns are shared by a team of warps.
__device__ __forceinline__ void route(const Arguments& a) {
    __shared__ float dots[WARPS], squares[WARPS];
    const Team team((int)a.router_team);
    const int own = threadIdx.x / 32, pieces = (int)a.depth / 8;
    const float eps = __int_as_float((int)a.eps);
#pragma unroll 1
    for (int expert = blockIdx.x; expert < a.choice.experts; expert += a.router_blocks)
#pragma unroll 1
        for (int token = team.number; token < a.tokens; token += WARPS >> team.log) {
            const uint4* const x = reinterpret_cast<const uint4*>(a.x + token * a.x_stride);
            const uint4* const weights = reinterpret_cast<const uint4*>(a.router + expert * a.router_stride);
            const uint4* const norm = reinterpret_cast<const uint4*>(a.norm);
            float dot = 0.f, square = 0.f;
#pragma unroll 1
            for (int first = team.thread(); first < pieces; first += 2 * team.threads()) {
                uint4 all[2][3];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int piece = first + i * team.threads();
                    const bool inside = piece < pieces;
                    all[i][0] = inside ? x[piece] : make_uint4(0, 0, 0, 0);
                    all[i][1] = inside ? norm[piece] : make_uint4(0, 0, 0, 0);
                    all[i][2] = inside ? weights[piece] : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float u[8], v[8], w[8];
                    unpack(all[i][0], u), unpack(all[i][1], v), unpack(all[i][2], w);
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        square = fmaf(u[k], u[k], square), dot = fmaf(u[k] * v[k], w[k], dot);
                }
            }
            dots[own] = over_warp(dot), squares[own] = over_warp(square);
            team.meet();
            if (team.thread() == 0) {
                dot = square = 0.f;
#pragma unroll 1
                for (int w = own; w < own + team.size; w++) dot += dots[w], square += squares[w];
                write_logit(a.choice.logits + token * a.choice.experts + expert,
                            dot * rsqrtf(__fdividef(square, (int)a.depth) + eps));
            }
            team.meet();
        }
}

// What is multiplied together: the rows of all items' experts, or those of the shared expert, which is
// one item of all tokens.
struct View {
    const bf16* weights;
    bf16* out;         // rows out_stride apart
    const Lists* own;  // the block's, none for the shared expert
    int expert_stride, row_stride, out_stride, width;
    Team team;
    Walk walk;

    __device__ __forceinline__ int expert(int item) const { return own ? own->items[item] & 0xff : 0; }
    __device__ __forceinline__ int first(int item) const { return own ? own->items[item] >> 16 : 0; }
    __device__ __forceinline__ int pairs(const Arguments& a, int item) const {
        return own ? own->items[item] >> 8 & 0xff : (int)a.tokens;
    }
    __device__ __forceinline__ int token(int pair) const { return own ? own->token[pair] : pair; }
};

__device__ __forceinline__ View experts(const Arguments& a, const Lists& own) {
    const Team team((int)a.team);
    const int width = (int)a.width, rows = own.count * width, teams = team.all();
    const int share = quotient(rows, teams, __int_as_float((int)a.inverse_teams));
    const Walk walk(team, share, rows - share * teams, width, __int_as_float((int)a.inverse_width));
    return {a.weights, a.out, &own, (int)a.expert_stride, (int)a.row_stride, width, width, team, walk};
}

__device__ __forceinline__ View shared_expert(const Arguments& a) {
    const Team team((int)a.shared_team);
    const int rows = (int)a.shared_width;
    return {a.shared_up, a.dense, nullptr, 0, (int)a.shared_stride, (int)a.dense_stride, rows, team,
            Walk(team, (int)a.share, (int)a.rest, rows)};
}

template <int N>
__device__ __forceinline__ void multiply_all(const Arguments& a, const View& view, uint4* shared,
                                             Gathered<N>* gathered) {
    const Team team = view.team;
    const int depth = (int)a.depth, g = threadIdx.x % 32 / 4, batches = team.batches<N>(depth);
    const float eps = __int_as_float((int)a.eps);
    const auto column = [&](int batch) { return team.column<N>(batch); };
    Ring<STAGES> ring(shared);
    Walk walk = view.walk, ahead = walk;
    Tile coming = {0, 0, 0};
    const bf16 *low = nullptr, *high = nullptr;
    int next = batches;
    const auto following = [&]() -> Batch {
        if (++next >= batches) {
            coming = ahead.next();
            if (coming.height) {
                const bf16* const first = view.weights +
                                          (long long)view.expert(coming.unit) * view.expert_stride +
                                          (long long)coming.row * view.row_stride;
                low = first + (long long)min(g, coming.height - 1) * view.row_stride;
                high = first + (long long)min(g + 8, coming.height - 1) * view.row_stride;
            }
            next = 0;
        }
        const int k = column(next);
        return {low + k, high + k, coming.height ? depth - k : 0};
    };
    ring.template fill<N>(following);
    wait_for_inputs();
    if (blockIdx.x != gridDim.x - 1) let_next_start();  // that one still has lists to write

    int turn = 0;
    for (Tile tile = walk.next(); tile.height; tile = walk.next(), turn ^= 1) {
        const int first = view.first(tile.unit), pairs = view.pairs(a, tile.unit);
        const bf16* x[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int pair = first + n * 8 + g;
            const bool is_there = n * 8 + g < pairs;
            const int row = is_there ? view.token(pair) : pair;
            x[n] = is_there ? a.x + row * a.x_stride : nullptr;
        }
        float sum[N][4] = {};
        Normed<N> normed(a.norm);
        multiply(sum, ring, x, 0, batches, depth, normed, column, following);
        gathered[turn].put_squares(normed);
        gathered[turn].put(sum);
        team.meet();
#pragma unroll 1
        for (int i = team.thread(); i < N * 8 * TILE; i += team.threads()) {
            const int row = i % TILE, pair = i / TILE;
            if (pair >= pairs || row >= tile.height) continue;
            const float value = gathered[turn].at(team, row, pair);
            const float factor = gathered[turn].factor(team, pair, depth, eps);
            view.out[(long long)(first + pair) * view.out_stride + tile.row + row] =
                activated(value * factor);
        }
    }
}

// grid = (blocks that share the rows of the shared expert, then those of all items); shared: the ring
// S: groups of 8 tokens of the shared expert
template <int S>
__device__ __forceinline__ void up(const Arguments& a) {
    __shared__ Gathered<S> memory[2];
    __shared__ Choosing here;
    extern __shared__ uint4 shared[];
    const bool multiplies = threadIdx.x < THREADS;
    if (threadIdx.x < MOST) here.bits[threadIdx.x] = 0;
    if (blockIdx.x < a.router_blocks && multiplies) {
        wait_for_inputs();
        route(a);
    }
    __syncthreads();
    unsigned before = 0;
    View view = shared_expert(a);
    if constexpr (S == 1) {
#pragma unroll 1
        for (int part = 0; part < 2; part++) {
            if (part) {
                before = choose_here(a.choice, here);
                view = experts(a, here.own);
            }
            if (multiplies) multiply_all<S>(a, view, shared, memory);
        }
    } else {
        if (multiplies) multiply_all<S>(a, view, shared, memory);
        before = choose_here(a.choice, here);
        view = experts(a, here.own);
        if (multiplies) multiply_all<1>(a, view, shared, reinterpret_cast<Gathered<1>*>(memory));
    }
    if (threadIdx.x < 32 && __shfl_sync(~0u, before, 0) == gridDim.x - 1) make_blank(a.choice);
}

#define ENTRY(name, S)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS + 32, 2) name(const Arguments a) {     \
        up<S>(a);                                                                               \
    }
ENTRY(up_8, 1)
ENTRY(up_16, 2)
ENTRY(up_32, 4)

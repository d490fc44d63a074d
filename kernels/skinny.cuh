// x W^T for few tokens and up to three matrices W at once, after a norm of x if there is one.
#pragma once
#include "tile_stream.cuh"

constexpr int PARTS = 3;
enum Kind { STORE, STORE_F32, RELU2, ADD };
// Of x: none; over all columns; over groups of columns, one for each warp; over any groups, whose sums
// of squares are given.
enum Norm { NONE, WHOLE, WARPWISE, GIVEN };

struct Products {
    const bf16* x;      // [tokens, depth], rows x_stride apart
    const bf16* norm;   // [depth]
    const float* sums;  // [tokens, groups, summands] of squares
    const bf16* weight[PARTS];
    void* out[PARTS];
    long long weight_stride[PARTS], rows[PARTS], out_stride[PARTS], kind[PARTS];
    long long x_stride, tokens, depth, groups, summands, eps, team, share, rest;
};

// Tokens times the norm's weight and the factor of their group of columns.
template <int N>
struct Grouped {
    static constexpr bool AHEAD = false, HAS_NORM = true;

    const bf16* norm;
    const float* factors;  // [N * 8, groups]
    int groups, width;     // columns of a group

    __device__ __forceinline__ uint4 operator()(int n, const uint4& v, const uint4& weight,
                                                int k) const {
        // Behind the last column v is zero and any factor will do.
        const int group = min(k / width, groups - 1);
        const float factor = factors[(n * 8 + threadIdx.x % 32 / 4) * groups + group];
        float x[8], w[8];
        unpack(v, x);
        unpack(weight, w);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = x[i] * factor * w[i];
        return pack(x);
    }
};

// Which matrix a row of all of them belongs to; `row` becomes its row in there.
__device__ __forceinline__ int part_of(const Products& a, int& row) {
    const int first = (int)a.rows[0], second = (int)a.rows[1];
    if (row < first) return 0;
    row -= first;
    if (row < second) return 1;
    row -= second;
    return 2;
}

__device__ __forceinline__ const bf16* line_of(const Products& a, const Tile& tile, int row) {
    int place = tile.row + min(row, tile.height - 1);
    const int part = part_of(a, place);
    return a.weight[part] + place * a.weight_stride[part];
}

__device__ __forceinline__ void write(const Products& a, int token, int row, float value) {
    const int part = part_of(a, row);
    const long long place = token * a.out_stride[part] + row;
    bf16* const out = static_cast<bf16*>(a.out[part]);
    switch (a.kind[part]) {
        case STORE: out[place] = (bf16)narrow(value); break;
        case STORE_F32: static_cast<float*>(a.out[part])[place] = value; break;
        case RELU2: out[place] = activated(value); break;
        case ADD: out[place] = (bf16)narrow(widen(out[place]) + value); break;
    }
}

// grid = (blocks that share the rows of all matrices)
// EARLY: tokens are asked for one batch of columns ahead, which takes registers
// shared: the ring, then factors [N * 8, groups] where sums are given
template <int N, Norm NORM, bool EARLY>
__device__ __forceinline__ void multiply_all(const Products& a) {
    __shared__ Gathered<N> gathered[2];
    extern __shared__ uint4 shared[];
    float* const factors = reinterpret_cast<float*>(shared + Ring<STAGES>::PIECES);
    const int depth = (int)a.depth, lane = threadIdx.x % 32, g = lane / 4;
    const float eps = __int_as_float((int)a.eps);
    const Team team((int)a.team);
    // With a group for each warp the columns of a warp are those of its group.
    const int batches = NORM == WARPWISE ? depth / (WARPS * SPAN<N>) : team.batches<N>(depth);
    const auto column = [&](int batch) {
        return NORM == WARPWISE ? own_column((team.warp * batches + batch) * SPAN<N>)
                                : team.column<N>(batch);
    };

    Ring<STAGES> ring(shared);
    Walk walk(team, (int)a.share, (int)a.rest, 1 << 30), ahead = walk;
    Tile coming = {0, 0, 0};
    const bf16 *low = nullptr, *high = nullptr;
    int next = batches;
    const auto following = [&]() -> Batch {
        if (++next >= batches) {
            coming = ahead.next();
            if (coming.height) low = line_of(a, coming, g), high = line_of(a, coming, g + 8);
            next = 0;
        }
        const int k = column(next);
        return {low + k, high + k, coming.height ? depth - k : 0};
    };
    ring.template fill<N>(following);
    wait_for_inputs();
    let_next_start();

    if constexpr (NORM == GIVEN) {
        const int groups = (int)a.groups, summands = (int)a.summands;
        for (int i = threadIdx.x; i < N * 8 * groups; i += THREADS) {
            const long long token = min((long long)(i / groups), a.tokens - 1);
            const float* const own = a.sums + (token * groups + i % groups) * summands;
            float squares = 0.f;
            for (int j = 0; j < summands; j++) squares += own[j];
            factors[i] = rsqrtf(squares * groups / depth + eps);
        }
        __syncthreads();
    }
    const bf16* x[N];
#pragma unroll
    for (int n = 0; n < N; n++)
        x[n] = n * 8 + g < a.tokens ? a.x + (n * 8 + g) * a.x_stride : nullptr;

    int turn = 0;
    for (Tile tile = walk.next(); tile.height; tile = walk.next(), turn ^= 1) {
        float sum[N][4] = {};
        if constexpr (NORM == NONE) {
            Plain plain;
            multiply(sum, ring, x, 0, batches, depth, plain, column, following);
        } else if constexpr (NORM == GIVEN) {
            Grouped<N> grouped{a.norm, factors, (int)a.groups, depth / (int)a.groups};
            multiply(sum, ring, x, 0, batches, depth, grouped, column, following);
        } else {
            Normed<N, EARLY> normed(a.norm);
            multiply(sum, ring, x, 0, batches, depth, normed, column, following);
            if constexpr (NORM == WHOLE) gathered[turn].put_squares(normed);
            if constexpr (NORM == WARPWISE) {
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const float square = normed.square(n), columns = batches * SPAN<N>;
                    const float factor = rsqrtf(__fdividef(square, columns) + eps);
                    const float first = __shfl_sync(~0u, factor, normed.holder(lane % 4 * 2));
                    const float second = __shfl_sync(~0u, factor, normed.holder(lane % 4 * 2 + 1));
                    sum[n][0] *= first, sum[n][1] *= second, sum[n][2] *= first, sum[n][3] *= second;
                }
            }
        }
        gathered[turn].put(sum);
        team.meet();
#pragma unroll 1
        for (int i = team.thread(); i < N * 8 * TILE; i += team.threads()) {
            const int row = i % TILE, token = i / TILE;
            if (token >= a.tokens || row >= tile.height) continue;
            const float factor = NORM == WHOLE ? gathered[turn].factor(team, token, depth, eps) : 1.f;
            write(a, token, tile.row + row, gathered[turn].at(team, row, token) * factor);
        }
    }
}

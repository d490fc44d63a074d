// Products of weights with few tokens: a stream of weights through each multiprocessor.
//
// A warp multiplies a tile of up to 16 rows of weights with up to 8 * N tokens. Lane 4 g + t holds 16
// bytes of rows g and g + 8, and 16 bytes of token g: the eight columns that one lane holds make the
// columns of two mma in another order, the same for weights and tokens, so nothing is shuffled.
//
// As many blocks as run at the same time share all rows. One, two, four or all of a block's eight warps
// form a team, which owns an equal share of the rows and goes through it tile by tile, its warps taking
// turns at the columns; the copies of coming steps are always under way, in the shared memory of the
// lane that will multiply them, and begin before the kernel before this one has ended.
#pragma once
#include "numbers.cuh"
#include "ptx.cuh"

constexpr int TILE = 16;   // rows of weights
constexpr int STEP = 32;   // columns of two mma
constexpr int STAGES = 4;  // steps of weights under way, for each warp
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

// Rows g and g + 8 of a tile; null where there is no such row.
struct Lines {
    const bf16 *low, *high;
};

// Rows [row, row + height) that are multiplied at once.
struct Tile {
    int row, height;
};

// The warps that multiply a tile together: `size` of them, of which this one is number `warp`.
struct Team {
    int size, number, warp;

    __device__ __forceinline__ explicit Team(int size)
        : size(size), number((int)threadIdx.x / 32 / size), warp((int)threadIdx.x / 32 % size) {}

    // Among the threads of the team.
    __device__ __forceinline__ int thread() const { return warp * 32 + threadIdx.x % 32; }
    __device__ __forceinline__ int threads() const { return 32 * size; }

    __device__ __forceinline__ void meet() const {
        if (size == 1)
            __syncwarp();
        else
            ::meet(1 + number, 32 * size);
    }

    // The steps of this warp: every size-th, so that a team reads one stretch of memory.
    __device__ __forceinline__ int steps(int depth) const {
        return ((depth + STEP - 1) / STEP - warp + size - 1) / size;
    }

    // The first of this lane's columns in a step of its warp.
    __device__ __forceinline__ int column(int step) const {
        return (step * size + warp) * STEP + (int)threadIdx.x % 4 * 8;
    }
};

// The tiles of a team's share of all rows, as equal as can be; none goes over a multiple of `unit`.
struct Walk {
    int row, last, unit;

    __device__ __forceinline__ Walk(const Team& team, int total, int unit) : unit(unit) {
        const int teams = gridDim.x * (WARPS / team.size);
        const int mine = blockIdx.x * (WARPS / team.size) + team.number;
        row = (int)((long long)total * mine / teams);
        last = (int)((long long)total * (mine + 1) / teams);
    }

    __device__ __forceinline__ Tile next() {
        if (row >= last) return {last, 0};
        const int rest = min(last, (row / unit + 1) * unit) - row;
        const int tiles = (rest + TILE - 1) / TILE, height = (rest + tiles - 1) / tiles;
        row += height;
        return {row - height, height};
    }
};

// Weights under way: a lane copies what it will multiply itself, so nobody waits for anybody.
struct Ring {
    static constexpr int PIECES = WARPS * STAGES * 2 * 32;  // of 16 bytes, for a block

    uint4* own;
    int issued, used;

    __device__ __forceinline__ explicit Ring(uint4* shared)
        : own(shared + threadIdx.x / 32 * STAGES * 64 + threadIdx.x % 32), issued(0), used(0) {}

    // Start the copies of columns [k, k + 8), or of nothing.
    __device__ __forceinline__ void issue(const Lines& lines, int k, bool is_there, int depth) {
        if (is_there) {
            uint4* const to = own + issued++ % STAGES * 64;
            copy_async(to, lines.low + k, lines.low && k < depth);
            copy_async(to + 32, lines.high + k, lines.high && k < depth);
        }
        close_group();
    }

    // The oldest step under way.
    __device__ __forceinline__ void take(uint4& low, uint4& high) {
        wait_for_group<STAGES - 1>();
        const uint4* const from = own + used++ % STAGES * 64;
        low = from[0], high = from[32];
    }
};

// What a lane asks of its tokens at one time: pieces of `STEPS` steps, zeros behind the last column.
template <int N, int STEPS>
struct Tokens {
    uint4 v[STEPS][N], norm[STEPS];

    template <typename Prepare, typename Column>
    __device__ __forceinline__ void load(const bf16* const (&x)[N], int first, int end, int depth,
                                         const Prepare& prepare, Column column) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int k = column(first + i);
            const bool inside = first + i < end && k < depth;
            norm[i] = prepare.norm_at(k, inside);
#pragma unroll
            for (int n = 0; n < N; n++)
                v[i][n] = inside && x[n] ? *reinterpret_cast<const uint4*>(x[n] + k)
                                         : make_uint4(0, 0, 0, 0);
        }
    }
};

// sum += weights * prepare(tokens) over steps [begin, end), whose columns are column(step); `more`
// starts the copies of another step.
template <int N, typename Prepare, typename Column, typename More>
__device__ __forceinline__ void multiply(float (&sum)[N][4], Ring& ring, const bf16* const (&x)[N],
                                         int begin, int end, int depth, Prepare& prepare,
                                         Column column, More more) {
    constexpr int STEPS = N <= 2 ? 4 : 1;
    Tokens<N, STEPS> tokens;
    if (Prepare::AHEAD) tokens.load(x, begin, end, depth, prepare, column);
#pragma unroll 1
    for (int first = begin; first < end; first += STEPS) {
        Tokens<N, STEPS> coming;
        if (Prepare::AHEAD)
            coming.load(x, first + STEPS, end, depth, prepare, column);
        else
            tokens.load(x, first, end, depth, prepare, column);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (first + i >= end) break;
            uint4 low, high;
            ring.take(low, high);
            const int k = column(first + i);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint4 u = prepare(n, tokens.v[i][n], tokens.norm[i], k);
                mma(sum[n], low.x, high.x, low.y, high.y, u.x, u.y);
                mma(sum[n], low.z, high.z, low.w, high.w, u.z, u.w);
            }
            more();
        }
        if (Prepare::AHEAD) tokens = coming;
    }
}

// Tokens as they are; they come from far, and are asked for one batch ahead.
struct Plain {
    static constexpr bool AHEAD = true;

    __device__ __forceinline__ uint4 norm_at(int, bool) const { return make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ uint4 operator()(int, const uint4& v, const uint4&, int) const {
        return v;
    }
};

__device__ __forceinline__ uint4 load_norm(const bf16* norm, int k, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(norm + k) : make_uint4(0, 0, 0, 0);
}

// Tokens times the norm's weight; their squares are summed on the way, for a factor at the end.
template <int N, bool EARLY = false>
struct Normed {
    static constexpr bool AHEAD = EARLY;

    const bf16* norm;
    float squares[N];

    __device__ __forceinline__ explicit Normed(const bf16* norm) : norm(norm) {
#pragma unroll
        for (int n = 0; n < N; n++) squares[n] = 0.f;
    }

    __device__ __forceinline__ uint4 norm_at(int k, bool inside) const {
        return load_norm(norm, k, inside);
    }

    __device__ __forceinline__ uint4 operator()(int n, const uint4& v, const uint4& w, int) {
        float x[8];
        unpack(v, x);
#pragma unroll
        for (int i = 0; i < 8; i++) squares[n] = fmaf(x[i], x[i], squares[n]);
        return make_uint4(times(v.x, w.x), times(v.y, w.y), times(v.z, w.z), times(v.w, w.w));
    }
};

// The sum of a value over the lanes of each group of four.
__device__ __forceinline__ float over_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// What the warps of all teams have summed for a tile each. Two of them by turns need one barrier a tile.
template <int N>
struct Gathered {
    float sums[WARPS][N][4][32];
    float squares[WARPS][N * 8];

    __device__ __forceinline__ void put(const float (&sum)[N][4]) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[warp][n][i][lane] = sum[n][i];
    }

    __device__ __forceinline__ void put_squares(const float (&own)[N]) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float whole = over_four(own[n]);
            if (lane % 4 == 0) squares[warp][n * 8 + lane / 4] = whole;
        }
    }

    // The norm's factor of a token.
    __device__ __forceinline__ float factor(const Team& team, int token, int depth, float eps) const {
        float sum = 0.f;
        for (int w = 0; w < team.size; w++) sum += squares[team.number * team.size + w][token];
        return rsqrtf(sum / depth + eps);
    }

    // The product of row `row` of the team's tile with token `token`.
    __device__ __forceinline__ float at(const Team& team, int row, int token) const {
        const int i = row / 8 * 2 + token % 2, lane = row % 8 * 4 + token % 8 / 2;
        float sum = 0.f;
        for (int w = 0; w < team.size; w++)
            sum += sums[team.number * team.size + w][token / 8][i][lane];
        return sum;
    }
};

__device__ __forceinline__ float relu_squared(float x) {
    const float positive = fmaxf(x, 0.f);
    return positive * positive;
}

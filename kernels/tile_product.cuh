// Products of weights with few tokens: the weights are read once, in the order of memory.
//
// A warp multiplies a tile of 16 rows of weights with up to 8 * N tokens. Lane 4 g + t reads 16 bytes
// of rows g and g + 8, and 16 bytes of token g: the eight columns that one lane holds make the
// columns of two mma in another order, the same for weights and tokens, so nothing is shuffled.
#pragma once
#include "numbers.cuh"
#include "ptx.cuh"

constexpr int TILE = 16;   // rows of weights
constexpr int STEP = 32;   // columns of two mma
constexpr int AHEAD = 4;   // steps of a batch of loads; two batches are in flight
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

// Rows g and g + 8 of a tile at the columns of this lane; null where the matrix has no such row.
struct Lines {
    const bf16 *low, *high;
};

__device__ __forceinline__ Lines lines_of(const bf16* weight, long long stride, long long rows,
                                          long long first) {
    const long long row = first + threadIdx.x % 32 / 4;
    return {row < rows ? weight + row * stride : nullptr,
            row + 8 < rows ? weight + (row + 8) * stride : nullptr};
}

struct Weights {
    uint4 low[AHEAD], high[AHEAD];

    // Columns of steps [step, step + AHEAD) before `end`; zeros behind.
    __device__ __forceinline__ void load(const Lines& lines, int step, int end, int depth) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int k = (step + i) * STEP + threadIdx.x % 4 * 8;
            const bool inside = step + i < end && k < depth;
            low[i] = inside && lines.low ? load_once(lines.low + k) : make_uint4(0, 0, 0, 0);
            high[i] = inside && lines.high ? load_once(lines.high + k) : make_uint4(0, 0, 0, 0);
        }
    }

    // sum += weights * prepare(token n, its columns, k) for the N groups of 8 tokens.
    template <int N, typename Prepare>
    __device__ __forceinline__ void apply(float (&sum)[N][4], const bf16* const (&x)[N], int step,
                                          int end, int depth, Prepare& prepare) const {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (step + i >= end) break;
            const int k = (step + i) * STEP + threadIdx.x % 4 * 8;
#pragma unroll
            for (int n = 0; n < N; n++) {
                uint4 v = make_uint4(0, 0, 0, 0);
                if (x[n] && k < depth) v = prepare(n, *reinterpret_cast<const uint4*>(x[n] + k), k);
                mma(sum[n], low[i].x, high[i].x, low[i].y, high[i].y, v.x, v.y);
                mma(sum[n], low[i].z, high[i].z, low[i].w, high[i].w, v.z, v.w);
            }
        }
    }
};

// Two batches of loads: `start` issues them, `run` goes through all steps [begin, end).
struct Pipeline {
    Weights first, second;

    __device__ __forceinline__ void start(const Lines& lines, int begin, int end, int depth) {
        first.load(lines, begin, end, depth);
        second.load(lines, begin + AHEAD, end, depth);
    }

    template <int N, typename Prepare>
    __device__ __forceinline__ void run(float (&sum)[N][4], const Lines& lines,
                                        const bf16* const (&x)[N], int begin, int end, int depth,
                                        Prepare& prepare) {
#pragma unroll 1
        for (int step = begin; step < end; step += 2 * AHEAD) {
            first.apply(sum, x, step, end, depth, prepare);
            first.load(lines, step + 2 * AHEAD, end, depth);
            second.apply(sum, x, step + AHEAD, end, depth, prepare);
            second.load(lines, step + 3 * AHEAD, end, depth);
        }
    }
};

// Tokens as they are.
struct Plain {
    __device__ __forceinline__ uint4 operator()(int, const uint4& v, int) const { return v; }
};

// Tokens times the norm's weight; their squares are summed on the way, for a factor at the end.
template <int N>
struct Normed {
    const bf16* norm;
    float squares[N];

    __device__ __forceinline__ explicit Normed(const bf16* norm) : norm(norm) {
#pragma unroll
        for (int n = 0; n < N; n++) squares[n] = 0.f;
    }

    __device__ __forceinline__ uint4 operator()(int n, const uint4& v, int k) {
        const uint4 w = *reinterpret_cast<const uint4*>(norm + k);
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

// The steps of a warp: an equal share of all, in the order of memory.
__device__ __forceinline__ void share_of(int warp, int steps, int& begin, int& end) {
    const int each = (steps + WARPS - 1) / WARPS;
    begin = min(warp * each, steps);
    end = min(begin + each, steps);
}

// What the warps of a block have summed, brought together.
template <int N>
struct Gathered {
    float sums[WARPS][N][4][32];
    float squares[WARPS][N * 8];
    float factors[N * 8];

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

    // Between a barrier after `put_squares` and one before `factors` is read.
    __device__ __forceinline__ void make_factors(int depth, float eps) {
        if (threadIdx.x >= N * 8) return;
        float sum = 0.f;
        for (int warp = 0; warp < WARPS; warp++) sum += squares[warp][threadIdx.x];
        factors[threadIdx.x] = rsqrtf(sum / depth + eps);
    }

    // The product of row `row` of the tile with token `token`.
    __device__ __forceinline__ float at(int row, int token) const {
        const int i = row / 8 * 2 + token % 2, lane = row % 8 * 4 + token % 8 / 2;
        float sum = 0.f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += sums[warp][token / 8][i][lane];
        return sum;
    }
};

__device__ __forceinline__ float relu_squared(float x) {
    const float positive = fmaxf(x, 0.f);
    return positive * positive;
}

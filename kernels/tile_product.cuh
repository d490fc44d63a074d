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
constexpr int STAGES = 8;  // steps of weights on their way to shared memory, for each warp
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int RING = WARPS * STAGES * 2 * 32;  // pieces of 16 bytes

// Rows g and g + 8 of a tile; null where the matrix has no such row.
struct Lines {
    const bf16 *low, *high;
};

__device__ __forceinline__ Lines lines_of(const bf16* weight, long long stride, long long rows,
                                          long long first) {
    const long long row = first + threadIdx.x % 32 / 4;
    return {row < rows ? weight + row * stride : nullptr,
            row + 8 < rows ? weight + (row + 8) * stride : nullptr};
}

// Weights on their way: a lane copies the 16 bytes that it will multiply itself, so that nobody waits
// for anybody and the copies in flight take no registers.
struct Ring {
    uint4* own;

    __device__ __forceinline__ explicit Ring(uint4* shared)
        : own(shared + threadIdx.x / 32 * STAGES * 64 + threadIdx.x % 32) {}

    __device__ __forceinline__ uint4* stage(int step) const { return own + step % STAGES * 64; }

    __device__ __forceinline__ void issue(const Lines& lines, int step, int end, int depth) const {
        const int k = step * STEP + threadIdx.x % 4 * 8;
        const bool inside = step < end && k < depth;
        uint4* const to = stage(step);
        copy_async(to, lines.low + k, inside && lines.low);
        copy_async(to + 32, lines.high + k, inside && lines.high);
        close_group();
    }

    // The first steps from `begin` on.
    __device__ __forceinline__ void start(const Lines& lines, int begin, int end, int depth) const {
#pragma unroll
        for (int i = 0; i < STAGES; i++) issue(lines, begin + i, end, depth);
    }

    // sum += weights * prepare(tokens) over steps [begin, end), after `start`.
    template <int N, typename Prepare>
    __device__ __forceinline__ void run(float (&sum)[N][4], const Lines& lines,
                                        const bf16* const (&x)[N], int begin, int end, int depth,
                                        Prepare& prepare) const {
        constexpr int TOGETHER = N <= 2 ? 4 : 1;  // steps whose tokens are asked for at once
#pragma unroll 1
        for (int first = begin; first < end; first += TOGETHER) {
            uint4 v[TOGETHER][N], norm[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int k = (first + i) * STEP + threadIdx.x % 4 * 8;
                const bool inside = first + i < end && k < depth;
                norm[i] = prepare.norm_at(k, inside);
#pragma unroll
                for (int n = 0; n < N; n++)
                    v[i][n] = inside && x[n] ? *reinterpret_cast<const uint4*>(x[n] + k)
                                             : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                wait_for_group<STAGES - 1>();
                const uint4 low = stage(first + i)[0], high = stage(first + i)[32];
                const int k = (first + i) * STEP + threadIdx.x % 4 * 8;
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const uint4 u = prepare(n, v[i][n], norm[i], k);
                    mma(sum[n], low.x, high.x, low.y, high.y, u.x, u.y);
                    mma(sum[n], low.z, high.z, low.w, high.w, u.z, u.w);
                }
                issue(lines, first + i + STAGES, end, depth);
            }
        }
        wait_for_group<0>();  // empty ones, so that the next `start` counts from none
    }
};

// Tokens as they are.
struct Plain {
    __device__ __forceinline__ uint4 norm_at(int, bool) const { return make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ uint4 operator()(int, const uint4& v, const uint4&, int) const {
        return v;
    }
};

__device__ __forceinline__ uint4 load_norm(const bf16* norm, int k, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(norm + k) : make_uint4(0, 0, 0, 0);
}

// Tokens times the norm's weight; their squares are summed on the way, for a factor at the end.
template <int N>
struct Normed {
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

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
constexpr int STAGES = 4;  // steps of weights under way, for each warp, where three blocks are on a
                           // multiprocessor, and twice as many where two are
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

// Rows g and g + 8 of a tile; null where there is no such row.
struct Lines {
    const bf16 *low, *high;
};

// Rows [row, row + height) of a unit that are multiplied at once.
struct Tile {
    int unit, row, height;
};

// a / b with the inverse of b at hand; an exact division takes far more instructions, which every warp of
// a multiprocessor would wait for.
__device__ __forceinline__ int quotient(int a, int b, float inverse) {
    const int guess = (int)(a * inverse), rest = a - guess * b;
    return guess + (rest >= b) - (rest < 0);
}

// The warps that multiply a tile together: 1 << log of them, this one being number `warp`.
struct Team {
    int log, size, number, warp;

    __device__ __forceinline__ explicit Team(int log) : log(log), size(1 << log) {
        const int own = threadIdx.x / 32;
        warp = own & (size - 1), number = own >> log;
    }

    // Among the teams of all blocks, and how many these are.
    __device__ __forceinline__ int place() const { return blockIdx.x * (WARPS >> log) + number; }
    __device__ __forceinline__ int all() const { return gridDim.x * (WARPS >> log); }

    // Among the threads of the team.
    __device__ __forceinline__ int thread() const { return warp * 32 + threadIdx.x % 32; }
    __device__ __forceinline__ int threads() const { return 32 << log; }

    __device__ __forceinline__ void meet() const {
        if (size == 1)
            __syncwarp();
        else
            ::meet(1 + number, 32 * size);
    }

    // The steps of this warp: every size-th, so that a team reads one stretch of memory.
    __device__ __forceinline__ int steps(int depth) const {
        return ((depth + STEP - 1) / STEP - warp + size - 1) >> log;
    }

    // The first of this lane's columns in a step of its warp.
    __device__ __forceinline__ int column(int step) const {
        return ((step << log) + warp) * STEP + (int)threadIdx.x % 4 * 8;
    }
};

// The tiles of a team's share of units of `height` rows each, the last two of a unit as equal as can be.
// Every team has `share` rows, the first `rest` of them one more.
struct Walk {
    int unit, row, left, height;  // `left` rows from `row` of `unit` on

    // Of one unit.
    __device__ __forceinline__ Walk(const Team& team, int share, int rest, int height)
        : unit(0), height(height) {
        const int place = team.place();
        row = place * share + min(place, rest), left = share + (place < rest);
    }

    __device__ __forceinline__ Walk(const Team& team, int share, int rest, int height, float inverse)
        : Walk(team, share, rest, height) {
        unit = quotient(row, height, inverse);
        row -= unit * height;
    }

    __device__ __forceinline__ Tile next() {
        if (row == height) row = 0, unit++;
        const int rest = min(left, height - row);
        const int own = rest > TILE && rest < 2 * TILE ? (rest + 1) / 2 : min(rest, TILE);
        row += own, left -= own;
        return {unit, row - own, own};
    }
};

// Steps of a warp, from `first` to before `end`, of weights with `depth` columns; none where there is
// nothing more to copy.
struct Batch {
    Lines lines;
    int first, end, depth;
};

// How many steps a batch has for 8 * N tokens.
template <int N>
constexpr int STEPS = N <= 2 ? STAGES : 1;

// Weights under way: a lane copies what it will multiply itself, so nobody waits for anybody. SLOTS are
// filled in turns, as many steps ahead.
template <int SLOTS>
struct Ring {
    static constexpr int PIECES = WARPS * SLOTS * 2 * 32;  // of 16 bytes, for a block

    uint4* own;
    int slot;  // of the coming batch

    __device__ __forceinline__ explicit Ring(uint4* shared)
        : own(shared + threadIdx.x / 32 * SLOTS * 64 + threadIdx.x % 32), slot(0) {}

    // Start the copies of step `first + i` of a batch, whose columns are [k, k + 8), if there is one.
    __device__ __forceinline__ void issue(int slot, const Batch& batch, int i, int k) {
        if (batch.first + i < batch.end) {
            uint4* const to = own + slot * 64;
            copy_async(to, batch.lines.low + k, batch.lines.low && k < batch.depth);
            copy_async(to + 32, batch.lines.high + k, batch.lines.high && k < batch.depth);
        }
        close_group();
    }

    // Fill all slots; following() is the next batch.
    template <int N, typename Column, typename Following>
    __device__ __forceinline__ void fill(Column column, Following following) {
#pragma unroll 1
        for (int slot = 0; slot < SLOTS; slot += STEPS<N>) {
            const Batch batch = following();
#pragma unroll
            for (int i = 0; i < STEPS<N>; i++)
                issue(slot + i, batch, i, column(batch.first + i));
        }
    }

    // The oldest step under way.
    __device__ __forceinline__ void take(int slot, uint4& low, uint4& high) const {
        wait_for_group<SLOTS - 1>();
        const uint4* const from = own + slot * 64;
        low = from[0], high = from[32];
    }
};

// What a lane asks of its tokens at one time: pieces of a batch, zeros behind the last column.
template <int N>
struct Tokens {
    uint4 v[STEPS<N>][N], norm[STEPS<N>];

    template <typename Prepare, typename Column>
    __device__ __forceinline__ void load(const bf16* const (&x)[N], int first, int end, int depth,
                                         const Prepare& prepare, Column column) {
#pragma unroll
        for (int i = 0; i < STEPS<N>; i++) {
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

// sum += weights * prepare(tokens) over steps [begin, end), whose columns are column(step). For every
// batch that is multiplied another one, following(), is put under way: the code that finds it stands
// here once, since a kernel that runs for some microseconds must also fetch its instructions.
template <int N, int SLOTS, typename Prepare, typename Column, typename Following>
__device__ __forceinline__ void multiply(float (&sum)[N][4], Ring<SLOTS>& ring,
                                         const bf16* const (&x)[N], int begin, int end, int depth,
                                         Prepare& prepare, Column column, Following following) {
    Tokens<N> tokens;
    if (Prepare::AHEAD) tokens.load(x, begin, end, depth, prepare, column);
#pragma unroll 1
    for (int first = begin; first < end; first += STEPS<N>) {
        Tokens<N> coming;
        if (Prepare::AHEAD)
            coming.load(x, first + STEPS<N>, end, depth, prepare, column);
        else
            tokens.load(x, first, end, depth, prepare, column);
        // All tokens of the batch are asked for before any is waited for: without this the compiler puts
        // each step's loads behind the branch before it.
        __syncwarp();
        const Batch batch = following();
#pragma unroll
        for (int i = 0; i < STEPS<N>; i++) {
            const int slot = STEPS<N> == SLOTS ? i : ring.slot + i;
            if (first + i < end) {
                uint4 low, high;
                ring.take(slot, low, high);
                const int k = column(first + i);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const uint4 u = prepare(n, tokens.v[i][n], tokens.norm[i], k);
                    mma(sum[n], low.x, high.x, low.y, high.y, u.x, u.y);
                    mma(sum[n], low.z, high.z, low.w, high.w, u.z, u.w);
                }
            }
            ring.issue(slot, batch, i, column(batch.first + i));
        }
        if (STEPS<N> < SLOTS) ring.slot = (ring.slot + STEPS<N>) % SLOTS;
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
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < team.size) sum += squares[team.number * team.size + w][token];
        return rsqrtf(__fdividef(sum, depth) + eps);
    }

    // The product of row `row` of the team's tile with token `token`.
    __device__ __forceinline__ float at(const Team& team, int row, int token) const {
        const int i = row / 8 * 2 + token % 2, lane = row % 8 * 4 + token % 8 / 2;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < team.size) sum += sums[team.number * team.size + w][token / 8][i][lane];
        return sum;
    }
};

__device__ __forceinline__ float relu_squared(float x) {
    const float positive = fmaxf(x, 0.f);
    return positive * positive;
}

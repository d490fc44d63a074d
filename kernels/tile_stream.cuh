// Products of weights with few tokens: a stream of weights through each multiprocessor.
//
// A warp multiplies a tile of up to 16 rows of weights with up to 8 * N tokens. Lane 4 g + t holds 16
// bytes of rows g and g + 8, and 16 bytes of token g: the eight columns that one lane holds make the
// columns of two mma in another order, the same for weights and tokens, so nothing is shuffled.
//
// As many blocks as run at the same time share all rows. One, two, four or all of a block's eight warps
// form a team, which owns an equal share of the rows and goes through it tile by tile, its warps taking
// turns at batches of columns; the copies of coming batches are always under way, in the shared memory
// of the lane that will multiply them, and begin before the kernel before this one has ended. A tile
// moves a kilobyte for every two mma, so all else must be few instructions: a batch is one piece of a
// row, whose steps differ by a constant.
#pragma once
#include "numbers.cuh"
#include "ptx.cuh"

constexpr int TILE = 16;   // rows of weights
constexpr int STEP = 32;   // columns of two mma
constexpr int STAGES = 4;  // steps of weights under way, for each warp; what is asked for after them waits
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

// Steps and columns of a batch for 8 * N tokens.
template <int N>
constexpr int STEPS = N <= 2 ? STAGES : 1;
template <int N>
constexpr int SPAN = STEPS<N> * STEP;

// The first of this lane's columns in a step that begins with column `first`.
__device__ __forceinline__ int own_column(int first) { return first + (int)threadIdx.x % 4 * 8; }

// Rows [row, row + height) of a unit that are multiplied at once.
struct Tile {
    int unit, row, height;
};

// The height of the first tile of so many rows, the last two as equal as can be.
__device__ __forceinline__ int first_height(int rows) {
    return rows > TILE && rows < 2 * TILE ? (rows + 1) / 2 : min(rows, TILE);
}

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

    // The batches of this warp: every size-th, so that a team reads one stretch of memory.
    template <int N>
    __device__ __forceinline__ int batches(int depth) const {
        return ((depth + SPAN<N> - 1) / SPAN<N> - warp + size - 1) >> log;
    }

    // The first of this lane's columns in a batch of its warp.
    template <int N>
    __device__ __forceinline__ int column(int batch) const {
        return own_column(((batch << log) + warp) * SPAN<N>);
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
        const int own = first_height(min(left, height - row));
        row += own, left -= own;
        return {unit, row - own, own};
    }
};

// What a lane copies of a batch: from rows g and g + 8 of a tile, or from its last row where there are
// fewer; `left` columns from there to the end of the row, none where there is nothing to copy.
struct Batch {
    const bf16 *low, *high;
    int left;
};

// Weights under way: a lane copies what it will multiply itself, so nobody waits for anybody. SLOTS steps
// are filled in turns.
template <int SLOTS>
struct Ring {
    static constexpr int PIECES = WARPS * SLOTS * 2 * 32;  // of 16 bytes, for a block

    uint4* own;
    int slot;  // of the coming batch

    __device__ __forceinline__ explicit Ring(uint4* shared)
        : own(shared + threadIdx.x / 32 * SLOTS * 64 + threadIdx.x % 32), slot(0) {}

    // Start the copies of step `i` of a batch; zeros behind the end.
    __device__ __forceinline__ void issue(uint4* to, const Batch& batch, int i) {
        const bool inside = batch.left > i * STEP;
        copy_async(to + i * 64, batch.low + i * STEP, inside);
        copy_async(to + i * 64 + 32, batch.high + i * STEP, inside);
        close_group();
    }

    // Fill all slots; following() is the next batch.
    template <int N, typename Following>
    __device__ __forceinline__ void fill(Following following) {
#pragma unroll 1
        for (int slot = 0; slot < SLOTS; slot += STEPS<N>) {
            const Batch batch = following();
#pragma unroll
            for (int i = 0; i < STEPS<N>; i++) issue(own + slot * 64, batch, i);
        }
    }
};

// What a lane asks of its tokens at one time: pieces of a batch, zeros behind the last column.
template <int N>
struct Tokens {
    uint4 v[STEPS<N>][N], norm[STEPS<N>];

    __device__ __forceinline__ static uint4 load(const bf16* from, bool inside) {
        return inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    }

    // left: columns from column k on
    template <typename Prepare>
    __device__ __forceinline__ void load(const bf16* const (&x)[N], int k, int left,
                                         const Prepare& prepare) {
#pragma unroll
        for (int i = 0; i < STEPS<N>; i++) {
            if (Prepare::HAS_NORM) norm[i] = load(prepare.norm + k + i * STEP, left > i * STEP);
#pragma unroll
            for (int n = 0; n < N; n++)
                v[i][n] = load(x[n] + k + i * STEP, x[n] && left > i * STEP);
        }
    }
};

// sum += weights * prepare(tokens) over batches [begin, end), whose first columns are column(batch). For
// every batch that is multiplied another one, following(), is put under way: the code that finds it
// stands here once, since a kernel that runs for some microseconds must also fetch its instructions.
template <int N, int SLOTS, typename Prepare, typename Column, typename Following>
__device__ __forceinline__ void multiply(float (&sum)[N][4], Ring<SLOTS>& ring,
                                         const bf16* const (&x)[N], int begin, int end, int depth,
                                         Prepare& prepare, Column column, Following following) {
    Tokens<N> tokens;
    if (Prepare::AHEAD) tokens.load(x, column(begin), depth - column(begin), prepare);
#pragma unroll 1
    for (int batch = begin; batch < end; batch++) {
        const int k = column(batch), ahead = column(batch + 1);
        Tokens<N> coming;
        if (Prepare::AHEAD)
            coming.load(x, ahead, batch + 1 < end ? depth - ahead : 0, prepare);
        else
            tokens.load(x, k, depth - k, prepare);
        // All tokens of the batch are asked for before any is waited for: without this the compiler puts
        // each step's loads behind the branch before it.
        __syncwarp();
        const Batch next = following();
        uint4* const own = ring.own + (STEPS<N> == SLOTS ? 0 : ring.slot * 64);
#pragma unroll
        for (int i = 0; i < STEPS<N>; i++) {
            wait_for_group<SLOTS - 1>();
            const uint4 low = own[i * 64], high = own[i * 64 + 32];
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint4 u = prepare(n, tokens.v[i][n], tokens.norm[i], k + i * STEP);
                mma(sum[n], low.x, high.x, low.y, high.y, u.x, u.y);
                mma(sum[n], low.z, high.z, low.w, high.w, u.z, u.w);
            }
            ring.issue(own, next, i);
        }
        if (STEPS<N> < SLOTS) ring.slot = (ring.slot + STEPS<N>) % SLOTS;
        if (Prepare::AHEAD) tokens = coming;
    }
}

// Tokens as they are; they come from far, and are asked for one batch ahead.
struct Plain {
    static constexpr bool AHEAD = true, HAS_NORM = false;
    static constexpr const bf16* norm = nullptr;

    __device__ __forceinline__ uint4 operator()(int, const uint4& v, const uint4&, int) const {
        return v;
    }
};

// Tokens times the norm's weight; their squares are summed on the way, for a factor at the end: as the
// products of all tokens with each other, since a token's piece is laid out for either side of an mma.
template <int N, bool EARLY = false>
struct Normed {
    static constexpr bool AHEAD = EARLY, HAS_NORM = true;

    const bf16* norm;
    float products[N][4];

    __device__ __forceinline__ explicit Normed(const bf16* norm) : norm(norm), products{} {}

    __device__ __forceinline__ uint4 operator()(int n, const uint4& v, const uint4& w, int) {
        mma(products[n], v.x, 0, v.y, 0, v.x, v.y);
        mma(products[n], v.z, 0, v.w, 0, v.z, v.w);
        return make_uint4(times(v.x, w.x), times(v.y, w.y), times(v.z, w.z), times(v.w, w.w));
    }

    // The square of token 8 n + g, in the lane that HOLDS it.
    __device__ __forceinline__ float square(int n) const {
        return threadIdx.x / 4 % 2 ? products[n][1] : products[n][0];
    }

    // The lane that holds the square of token 8 n + `token`.
    __device__ __forceinline__ static int holder(int token) { return token * 4 + token / 2; }
};

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

    template <bool EARLY>
    __device__ __forceinline__ void put_squares(const Normed<N, EARLY>& normed) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = lane / 4;
#pragma unroll
        for (int n = 0; n < N; n++)
            if (lane == normed.holder(token)) squares[warp][n * 8 + token] = normed.square(n);
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

// The same of what is kept as bf16.
__device__ __forceinline__ bf16 activated(float x) {
    return (bf16)narrow(relu_squared(widen((bf16)narrow(x))));
}

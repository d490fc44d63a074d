// Replay journal entries into SSM states: h <- exp(A dt) h + dt x B^T, entry by entry.
//
// A block holds rows p of one head's state [P, N] of one (layer, row) in registers, so that each
// element is read once and written once. Entries pass through shared memory, CHUNK at a time:
//     h <- exp(A sum dt) h + sum_j (dt_j exp(A sum_{i > j} dt_i)) x_j B_j^T.
// The kernel is bound by memory where little but loads and fused multiply-adds is issued: sizes that
// one block would divide by come from the host, and a chunk is asked for before it is waited for.
#include "numbers.cuh"

struct Arguments {
    void* state;           // [L, S, H, P, N]
    const void* scanned;   // [L, S', J, H * P + G * N]
    const float* dt;       // [L, S', J, H]
    const float* decay;    // [L, H]
    const long long* rows;
    const long long* sources;
    const long long* counts;
    long long slots, journal_rows, entries, heads, head_dim, size, channels;
    long long tiles;               // blocks that share a head
    long long by_tiles, by_group;  // ceil(2^32 / tiles), ceil(2^32 / heads of a group)
};

constexpr int CHUNK = 16;

// a / b for `inverse` = ceil(2^32 / b), exact while a * b < 2^32
__device__ __forceinline__ unsigned divided(unsigned a, long long inverse) {
    return (unsigned)(a * (unsigned long long)inverse >> 32);
}

// fp32 of shared memory, N a multiple of 4.
__device__ __forceinline__ void store(float* to, const float4& four) {
    *reinterpret_cast<float4*>(to) = four;
}

template <int N>
__device__ __forceinline__ void load(const float* from, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 v = four(from + i);
        out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
}

// By a whole warp, lane j with dt_j (0 past the end): the weight of entry j, and of h at [CHUNK].
__device__ __forceinline__ void weigh(float* weights, int lane, float step, float rate) {
    float from_here = step;
#pragma unroll
    for (int by = 1; by < CHUNK; by *= 2) {
        const float more = __shfl_down_sync(0xffffffffu, from_here, by);
        if (lane + by < CHUNK) from_here += more;
    }
    if (lane < CHUNK) weights[lane] = step * expf(rate * (from_here - step));
    if (lane == 0) weights[CHUNK] = expf(rate * from_here);
}

// blockDim = (N / WIDTH, threads down P), at least a warp; grid = (heads * tiles, R, L)
// shared, fp32: B [CHUNK][N], x [CHUNK][block_rows], weights [CHUNK + 1]
template <typename State, typename Entry>
__device__ __forceinline__ void replay(const Arguments& a) {
    constexpr int WIDTH = 16 / sizeof(State);
    constexpr int ROWS = 32 / WIDTH;  // state rows of a thread: 32 numbers in registers
    extern __shared__ float4 shared[];

    const long long slot = a.rows[blockIdx.y], source = a.sources[blockIdx.y];
    const int count = (int)min(a.counts[blockIdx.y], a.entries);
    if (count <= 0 || slot < 0 || slot >= a.slots || source < 0 || source >= a.journal_rows) return;

    const unsigned layer = blockIdx.z, heads = (unsigned)a.heads, size = (unsigned)a.size;
    const unsigned head_dim = (unsigned)a.head_dim, channels = (unsigned)a.channels;
    const unsigned head = divided(blockIdx.x, a.by_tiles), group = divided(head, a.by_group);
    const unsigned block_rows = blockDim.y * ROWS;
    const unsigned tile = (blockIdx.x - head * (unsigned)a.tiles) * block_rows;
    const unsigned first = tile + threadIdx.y * ROWS, column = threadIdx.x * WIDTH;
    const unsigned rows = min(block_rows, head_dim - tile);  // of the tile; P is a multiple of 4

    const unsigned long long place = layer * (unsigned)a.slots + (unsigned)slot;
    State* piece = static_cast<State*>(a.state) + place * (heads * head_dim * size) +
                         ((head * head_dim + first) * size + column);
    uint4 raw[ROWS];
    const State* from = piece;
#pragma unroll
    for (int i = 0; i < ROWS; i++, from += size)
        if (first + i / 4 * 4 < head_dim) raw[i] = __ldcs(reinterpret_cast<const uint4*>(from));

    float* const write = reinterpret_cast<float*>(shared);
    float* const x = write + CHUNK * size;
    float* const weights = x + CHUNK * block_rows;
    const unsigned long long line =
        (layer * (unsigned)a.journal_rows + (unsigned)source) * (unsigned)a.entries;
    const Entry* const scanned = static_cast<const Entry*>(a.scanned) + line * channels;
    const Entry* const scanned_x = scanned + (head * head_dim + tile);
    const Entry* const scanned_write = scanned + (heads * head_dim + group * size + column);
    const float* const dt = a.dt + line * heads + head;
    const float rate = a.decay[layer * heads + head];
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;

    const auto stage = [&](unsigned begin, unsigned n) {
        const float step = thread < n ? dt[(begin + thread) * heads] : 0.f;
        for (unsigned j = threadIdx.y; j < (n + 1 & ~1u); j += blockDim.y) {
            // Behind an odd last entry one of zeros.
            const unsigned entry = (begin + j) * channels, across = j < n ? rows : 0;
            unsigned k = threadIdx.x * 4;
            typename Quads<Entry>::type of_x{}, of_write[WIDTH / 4]{};
            if (k < across) of_x = quad(scanned_x + entry + k);
#pragma unroll
            for (int i = 0; i < WIDTH / 4; i++)
                if (j < n) of_write[i] = quad(scanned_write + entry + i * 4);
            if (k < rows) store(x + j * block_rows + k, widen(of_x));
#pragma unroll
            for (int i = 0; i < WIDTH / 4; i++)
                store(write + j * size + column + i * 4, widen(of_write[i]));
            while ((k += blockDim.x * 4) < rows)  // of narrow states
                store(x + j * block_rows + k,
                      k < across ? four(scanned_x + entry + k) : make_float4(0.f, 0.f, 0.f, 0.f));
        }
        if (thread < 32) weigh(weights, thread, step, rate);
        __syncthreads();
    };

    float h[ROWS][WIDTH];
    stage(0, min(CHUNK, count));
#pragma unroll
    for (int i = 0; i < ROWS; i++) unpack(raw[i], h[i]);  // not earlier: it waits for the loads

#pragma unroll 1
    for (int begin = 0; begin < count; begin += CHUNK) {
        const int n = min(CHUNK, count - begin);
        if (begin) {
            __syncthreads();
            stage(begin, n);
        }
        const float kept = weights[CHUNK];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int k = 0; k < WIDTH; k++) h[i][k] *= kept;
#pragma unroll 1
        for (int pair = 0; pair < n; pair += 2) {
#pragma unroll
            for (int j = pair; j < pair + 2; j++) {
                float b[WIDTH], left[ROWS];
                load(write + j * size + column, b);
                load(x + j * block_rows + threadIdx.y * ROWS, left);
                const float weight = weights[j];
#pragma unroll
                for (int i = 0; i < 4; i++) (WIDTH == 4 ? b[i] : left[i]) *= weight;  // 4 of the 12
#pragma unroll
                for (int i = 0; i < ROWS; i++)
#pragma unroll
                    for (int k = 0; k < WIDTH; k++) h[i][k] = fmaf(left[i], b[k], h[i][k]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++, piece += size)
        if (first + i / 4 * 4 < head_dim) __stcs(reinterpret_cast<uint4*>(piece), pack(h[i]));
}

#define ENTRY(name, State, Entry)                                                  \
    extern "C" __global__ void __launch_bounds__(256, 3) name(const Arguments a) { \
        replay<State, Entry>(a);                                                   \
    }
ENTRY(replay_f32_f32, float, float)
ENTRY(replay_f32_bf16, float, bf16)
ENTRY(replay_bf16_f32, bf16, float)
ENTRY(replay_bf16_bf16, bf16, bf16)

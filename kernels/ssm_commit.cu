// Replay journal entries into SSM states: h <- exp(A dt) h + dt x B^T, entry by entry.
//
// One block holds a few rows p of one head's state [P, N] of one (layer, row) in registers, so each
// element is read once and written once. Entries pass through shared memory, CHUNK at a time:
//     h <- exp(A sum dt) h + sum_j (dt_j exp(A sum_{i > j} dt_i)) x_j B_j^T.
#include "numbers.cuh"

struct Arguments {
    void* state;           // [L, S, H, P, N]
    const void* scanned;   // [L, S', J, H * P + G * N]
    const float* dt;       // [L, S', J, H]
    const float* decay;    // [L, H]
    const long long* rows;
    const long long* sources;
    const long long* counts;
    long long slots, journal_rows, entries, heads, head_dim, size, groups;
};

constexpr int CHUNK = 16;

// blockDim = (N / WIDTH, rows of threads); grid = (heads * blocks of p, R, L)
// shared: B [CHUNK][N], x [CHUNK][block_rows], weights [CHUNK + 1], dt [CHUNK], all fp32
template <typename State, typename Entry>
__device__ __forceinline__ void replay(const Arguments& a) {
    constexpr int WIDTH = 16 / sizeof(State);
    constexpr int ROWS = 32 / WIDTH;  // state rows of a thread: 32 numbers in registers
    extern __shared__ float4 shared[];

    const long long slot = a.rows[blockIdx.y], source = a.sources[blockIdx.y];
    const int count = (int)min(a.counts[blockIdx.y], a.entries);
    if (count <= 0 || slot < 0 || slot >= a.slots || source < 0 || source >= a.journal_rows) return;

    const int heads = (int)a.heads, head_dim = (int)a.head_dim, size = (int)a.size;
    const int layer = blockIdx.z, head = blockIdx.x % heads;
    const int block_rows = blockDim.y * ROWS, block_first = blockIdx.x / heads * block_rows;
    const int first = block_first + threadIdx.y * ROWS, column = threadIdx.x * WIDTH;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;

    State* const tile = static_cast<State*>(a.state) +
                        (((layer * a.slots + slot) * heads + head) * head_dim + first) * size + column;
    uint4 raw[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        if (first + i < head_dim) raw[i] = *reinterpret_cast<const uint4*>(tile + (long long)i * size);

    float* const write = reinterpret_cast<float*>(shared);
    float* const x = write + CHUNK * size;
    float* const weights = x + CHUNK * block_rows;
    float* const steps = weights + CHUNK + 1;
    const int channels = heads * head_dim + (int)a.groups * size;
    const int group = head / (heads / (int)a.groups);
    const long long journal = (layer * a.journal_rows + source) * a.entries;
    const Entry* const scanned = static_cast<const Entry*>(a.scanned) + journal * channels;
    const float* const dt = a.dt + journal * heads + head;
    const float rate = a.decay[layer * heads + head];
    const int x_parts = block_rows / 4, parts = x_parts + size / 4;

    const auto stage = [&](int begin, int n) {
        for (int j = thread; j < n; j += threads) steps[j] = dt[(long long)(begin + j) * heads];
#pragma unroll 2
        for (int t = thread; t < n * parts; t += threads) {
            const int j = t / parts, part = t % parts;
            const Entry* const entry = scanned + (long long)(begin + j) * channels;
            if (part >= x_parts) {
                const int at = (part - x_parts) * 4;
                *reinterpret_cast<float4*>(write + j * size + at) =
                    four(entry + heads * head_dim + group * size + at);
            } else {
                const int at = part * 4;
                *reinterpret_cast<float4*>(x + j * block_rows + at) =
                    block_first + at < head_dim ? four(entry + head * head_dim + block_first + at)
                                                : make_float4(0.f, 0.f, 0.f, 0.f);
            }
        }
        __syncthreads();
        for (int j = thread; j <= n; j += threads) {  // j == n: the decay of the whole chunk
            float later = 0.f;
            for (int i = n - 1; i >= (j == n ? 0 : j + 1); i--) later += steps[i];
            const float left = expf(rate * later);
            weights[j == n ? CHUNK : j] = j == n ? left : steps[j] * left;
        }
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
#pragma unroll 2
        for (int j = 0; j < n; j++) {
            float b[WIDTH], left[ROWS];
            const float weight = weights[j];
#pragma unroll
            for (int k = 0; k < WIDTH; k += 4) {
                const float4 v = *reinterpret_cast<const float4*>(write + j * size + column + k);
                b[k] = v.x * weight, b[k + 1] = v.y * weight;
                b[k + 2] = v.z * weight, b[k + 3] = v.w * weight;
            }
#pragma unroll
            for (int i = 0; i < ROWS; i += 4) {
                const float4 v = *reinterpret_cast<const float4*>(
                    x + j * block_rows + threadIdx.y * ROWS + i);
                left[i] = v.x, left[i + 1] = v.y, left[i + 2] = v.z, left[i + 3] = v.w;
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int k = 0; k < WIDTH; k++) h[i][k] = fmaf(left[i], b[k], h[i][k]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        if (first + i < head_dim) *reinterpret_cast<uint4*>(tile + (long long)i * size) = pack(h[i]);
}

#define ENTRY(name, State, Entry)                                                    \
    extern "C" __global__ void __launch_bounds__(256, 3) name(const Arguments a) {   \
        replay<State, Entry>(a);                                                     \
    }
ENTRY(replay_f32_f32, float, float)
ENTRY(replay_f32_bf16, float, bf16)
ENTRY(replay_bf16_f32, bf16, float)
ENTRY(replay_bf16_bf16, bf16, bf16)

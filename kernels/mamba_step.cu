// One Mamba-2 layer between its projections, for the tokens of a pass: convolution, scan, gate.
//
//     y_t = exp(c_t) C_t h + sum_{j <= t} exp(c_t - c_j) dt_j (C_t . B_j) x_j + D x_t,
// c the running sum of A dt over the journal's entries and the new tokens, h the committed state,
// which is read and not written (Mamba-2, arXiv 2405.21060, in its quadratic form: a pass is short).
// Convolved values are rounded to the journal's dtype before they are used, so that a commit, which
// replays the journal, continues from the very numbers that this pass has seen.
#include "numbers.cuh"
#include "ptx.cuh"

struct Arguments {
    const bf16* projected;  // [R * T, gate H P | x H P | B G N | C G N | dt H], rows stride apart
    const void* state;      // [S, H, P, N] of this layer
    const bf16* window;     // [S, TAPS - 1, C]
    bf16* inputs;           // [S', J, C]
    bf16* scanned;          // [S', J, H P + G N]
    float* dt;              // [S', J, H]
    const bf16* conv;       // [C, TAPS]
    const bf16* conv_bias;  // [C], or null
    const bf16* dt_bias;    // [H]
    const float* decay;     // [H]
    const bf16* skip;       // [H]
    bf16* out;              // [R * T, H P]: y silu(gate)
    float* squares;         // [R * T, H]: of a head's outputs
    const long long* slots;
    const long long* sources;
    const long long* entries;  // [R]: journal entries before the new tokens
    const long long* counts;   // [R]: new tokens
    long long stride, length, slots_held, sources_held, entries_held, heads, groups, min_step;
};

constexpr int TAPS = 4, QUERIES = 8;

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

__device__ __forceinline__ float4 load_four(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}

__device__ __forceinline__ float4 load_four(const bf16* from) { return four(from); }

// blockDim = 4 P; grid = (H, R). A group of four threads owns row p of the head's state, each a
// quarter of its N columns in pieces of four.
// shared, fp32: x [E, P], B [E, N], C [QUERIES, N], weight [QUERIES, E], sum [E], dt [E],
// squares [QUERIES, warps]; E = entries held + length
template <typename State, int N>
__device__ __forceinline__ void step(const Arguments& a) {
    constexpr int PIECES = N / 16;
    extern __shared__ float4 given[];
    const int threads = blockDim.x, thread = threadIdx.x, rows = threads / 4, length = (int)a.length;
    const int heads = (int)a.heads, head = blockIdx.x, row = blockIdx.y;
    const int group = head / (heads / (int)a.groups);
    const bool first_of_group = head % (heads / (int)a.groups) == 0;
    const int inner = heads * rows, channels = inner + 2 * (int)a.groups * N;
    const int width = inner + (int)a.groups * N;
    const long long slot = a.slots[row], source = a.sources[row], token = (long long)row * length;
    const int old = (int)a.entries[row];
    const int count = (int)min(a.counts[row], (long long)length);
    const bool usable = slot >= 0 && slot < a.slots_held && source >= 0 &&
                        source < a.sources_held && old >= 0 && count > 0 &&
                        old + count <= a.entries_held;
    const int p = thread / 4, quarter = thread % 4;

    float4 h[PIECES];  // committed: nothing that this step waits for
    if (usable) {
        const State* const own =
            static_cast<const State*>(a.state) + ((slot * heads + head) * rows + p) * N + quarter * 4;
#pragma unroll
        for (int i = 0; i < PIECES; i++) h[i] = load_four(own + i * 16);
    }
    wait_for_inputs();
    let_next_start();
    const int present = usable ? count : 0, total = old + present;
    for (int t = present; t < length; t++) {  // padding
        if (quarter == 0) a.out[(token + t) * inner + head * rows + p] = 0;
        if (thread == 0) a.squares[(token + t) * heads + head] = 0.f;
    }
    if (!present) return;

    const int held = (int)a.entries_held;
    float* const x = reinterpret_cast<float*>(given);
    float* const write = x + held * rows;
    float* const read = write + held * N;
    float* const weight = read + QUERIES * N;
    float* const sum = weight + QUERIES * held;
    float* const steps = sum + held;
    float* const partial = steps + held;

    // What the journal holds already.
    const bf16* const journal = a.scanned + source * a.entries_held * width;
    for (int i = thread; i < old * (rows + N); i += threads) {
        const int j = i / (rows + N), c = i % (rows + N);
        if (c < rows)
            x[j * rows + c] = widen(journal[(long long)j * width + head * rows + c]);
        else
            write[j * N + c - rows] =
                widen(journal[(long long)j * width + inner + group * N + c - rows]);
    }
    const float rate = a.decay[head];
    for (int j = thread; j < total; j += threads) {
        const long long place = (source * a.entries_held + j) * heads + head;
        if (j < old) {
            steps[j] = a.dt[place];
            continue;
        }
        const float raw = widen(a.projected[(token + j - old) * a.stride + inner + channels + head]) +
                          widen(a.dt_bias[head]);
        const float value = raw > 20.f ? raw : log1pf(expf(raw));
        steps[j] = fmaxf(value, __int_as_float((int)a.min_step));
        a.dt[place] = steps[j];
    }

    // The convolution of this head's x, and of its group's B and C. A thread goes along one channel.
    const bf16* const window = a.window + slot * (TAPS - 1) * channels;
    bf16* const inputs = a.inputs + source * a.entries_held * channels;
    bf16* const outputs = a.scanned + source * a.entries_held * width;
    for (int first = 0; first < present; first += QUERIES) {
        const int last = min(first + QUERIES, present);
        __syncthreads();
        for (int c = thread; c < rows + 2 * N; c += threads) {
            const bool is_x = c < rows, is_read = c >= rows + N;
            const int channel = is_x ? head * rows + c
                                     : inner + (is_read ? (int)a.groups * N : 0) + group * N +
                                           (c - rows) % N;
            float tap[TAPS], history[TAPS - 1];
#pragma unroll
            for (int k = 0; k < TAPS; k++) tap[k] = widen(a.conv[channel * TAPS + k]);
            const float bias = a.conv_bias ? widen(a.conv_bias[channel]) : 0.f;
#pragma unroll
            for (int k = 0; k < TAPS - 1; k++) {
                const int at = old + first - (TAPS - 1) + k;  // an entry, or before the first one
                if (at >= old)
                    history[k] =
                        widen(a.projected[(token + at - old) * a.stride + inner + channel]);
                else if (at >= 0)
                    history[k] = widen(inputs[(long long)at * channels + channel]);
                else
                    history[k] = widen(window[(TAPS - 1 + at) * channels + channel]);
            }
            const bool keeps = is_x || first_of_group;
#pragma unroll 4
            for (int t = first; t < last; t++) {
                const bf16 raw = a.projected[(token + t) * a.stride + inner + channel];
                float value = bias + tap[TAPS - 1] * widen(raw);
#pragma unroll
                for (int k = 0; k < TAPS - 1; k++) value = fmaf(history[k], tap[k], value);
#pragma unroll
                for (int k = 0; k < TAPS - 2; k++) history[k] = history[k + 1];
                history[TAPS - 2] = widen(raw);
                const bf16 rounded = (bf16)narrow(silu(widen((bf16)narrow(value))));
                const int entry = old + t;
                if (is_x)
                    x[entry * rows + c] = widen(rounded);
                else if (is_read)
                    read[(t - first) * N + c - rows - N] = widen(rounded);
                else
                    write[entry * N + c - rows] = widen(rounded);
                if (!keeps) continue;
                inputs[(long long)entry * channels + channel] = raw;
                if (!is_read) outputs[(long long)entry * width + channel] = rounded;
            }
        }
        if (first == 0 && thread < 32)  // running sums of A dt, by the first warp
            for (int begin = 0; begin < total; begin += 32) {
                const int j = begin + thread;
                float value = j < total ? rate * steps[j] : 0.f;
                for (int distance = 1; distance < 32; distance *= 2) {
                    const float before = __shfl_up_sync(~0u, value, distance);
                    if (thread >= distance) value += before;
                }
                if (begin) value += sum[begin - 1];
                if (j < total) sum[j] = value;
                __syncwarp();
            }
        __syncthreads();

        // weight[t][j] = exp(c_t - c_j) dt_j (C_t . B_j): a warp a pair.
        const int seen = old + last;
        for (int pair = thread / 32; pair < (last - first) * seen; pair += threads / 32) {
            const int t = pair / seen, j = pair % seen, now = old + first + t;
            float dot = 0.f;
            for (int n = thread % 32; n < N; n += 32) dot = fmaf(read[t * N + n], write[j * N + n], dot);
            for (int distance = 16; distance; distance /= 2)
                dot += __shfl_xor_sync(~0u, dot, distance);
            if (thread % 32 == 0)
                weight[t * held + j] = j <= now ? dot * steps[j] * expf(sum[now] - sum[j]) : 0.f;
        }
        __syncthreads();

        for (int t = first; t < last; t++) {
            const int now = old + t;
            const float* const c = read + (t - first) * N;
            float y = 0.f;
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                const float4 v = *reinterpret_cast<const float4*>(c + i * 16 + quarter * 4);
                y += h[i].x * v.x + h[i].y * v.y + h[i].z * v.z + h[i].w * v.w;
            }
            y *= expf(sum[now]);
            for (int j = quarter; j <= now; j += 4)
                y = fmaf(weight[(t - first) * held + j], x[j * rows + p], y);
            y += __shfl_xor_sync(~0u, y, 1);
            y += __shfl_xor_sync(~0u, y, 2);
            y = fmaf(widen(a.skip[head]), x[now * rows + p], y);
            const bf16 gate = a.projected[(token + t) * a.stride + head * rows + p];
            y *= silu(widen(gate));
            if (quarter == 0) a.out[(token + t) * inner + head * rows + p] = (bf16)narrow(y);
            float square = quarter == 0 ? y * y : 0.f;
            for (int distance = 16; distance; distance /= 2)
                square += __shfl_xor_sync(~0u, square, distance);
            if (thread % 32 == 0) partial[(t - first) * (threads / 32) + thread / 32] = square;
        }
        __syncthreads();
        if (thread < last - first) {
            float square = 0.f;
            for (int warp = 0; warp < threads / 32; warp++)
                square += partial[thread * (threads / 32) + warp];
            a.squares[(token + first + thread) * heads + head] = square;
        }
    }
}

#define ENTRY(name, State, N) \
    extern "C" __global__ void __launch_bounds__(256) name(const Arguments a) { step<State, N>(a); }
ENTRY(step_f32_128, float, 128)
ENTRY(step_f32_64, float, 64)
ENTRY(step_f32_32, float, 32)
ENTRY(step_f32_16, float, 16)
ENTRY(step_bf16_128, bf16, 128)
ENTRY(step_bf16_64, bf16, 64)
ENTRY(step_bf16_32, bf16, 32)
ENTRY(step_bf16_16, bf16, 16)

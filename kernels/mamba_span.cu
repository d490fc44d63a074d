// One Mamba-2 layer between its projections, for many new tokens a row: convolution, scan, gate.
//
// The same sums as mamba.cuh, in two kernels whose work grows with the tokens and not with their
// square. `convolve` takes all tokens at once and fills the journal. `scan` walks through a row's
// entries one after the other with the state in registers:
//     h <- exp(A dt) h + dt x B^T,   y = h C + D x.
// The committed state is read and not written. Convolved values are rounded to the journal's dtype
// before they are used, as a commit will read them.
#include "activations.cuh"
#include "numbers.cuh"

struct Arguments {
    const bf16* projected;  // [n, gate H P | x H P | B G N | C G N | dt H], rows stride apart
    const void* state;      // [S, H, P, N] of this layer
    const bf16* window;     // [S, TAPS - 1, C]
    bf16* inputs;           // [S', J, C]
    bf16* scanned;          // [S', J, H P + G N]
    float* dt;              // [S', J, H]
    bf16* read;             // [n, G N]: C after the convolution
    const bf16* conv;       // [C, TAPS]
    const bf16* conv_bias;  // [C], or null
    const bf16* dt_bias;    // [H]
    const float* decay;     // [H]
    const bf16* skip;       // [H]
    bf16* out;              // [n, H P]: y silu(gate)
    const long long* slots;
    const long long* sources;
    const long long* entries;  // [R]: journal entries before the new tokens
    const long long* begins;   // [R]: the first packed token of a row
    const long long* counts;   // [R]: new tokens
    long long stride, tokens, slots_held, sources_held, entries_held, heads, head_dim, groups, size;
    long long min_step;
};

constexpr int THREADS = 256;
constexpr int RUN = 16;    // tokens that a thread convolves, one after the other
constexpr int CHUNK = 32;  // entries in shared memory at once
constexpr int ROWS = 32;   // rows p of a head's state that a block holds
constexpr int OWN = 4;     // of which a thread holds so many, by as many columns
constexpr int AHEAD = 8;   // entries whose outputs are added up together
constexpr int LINE = ROWS + 4;  // floats between two entries' outputs: no two in a bank

// A row of the pass: where its tokens, its state and its journal are.
struct Row {
    long long slot, source, begin;
    int old, count;

    __device__ __forceinline__ Row(const Arguments& a, int row)
        : slot(a.slots[row]), source(a.sources[row]), begin(a.begins[row]), old((int)a.entries[row]),
          count((int)a.counts[row]) {
        const bool usable = slot >= 0 && slot < a.slots_held && source >= 0 &&
                            source < a.sources_held && old >= 0 && count > 0 &&
                            old + count <= a.entries_held && begin >= 0 && begin + count <= a.tokens;
        if (!usable) count = 0;
    }
};

// blockDim = THREADS; grid = (pieces of THREADS quads of channels, one more for dt; runs of tokens; R)
extern "C" __global__ void __launch_bounds__(THREADS) convolve(const Arguments a) {
    const Row row(a, blockIdx.z);
    const int first = blockIdx.y * RUN, last = min(first + RUN, row.count);
    if (first >= last) return;
    const int heads = (int)a.heads, inner = heads * (int)a.head_dim;
    const int across = (int)(a.groups * a.size), width = inner + across, channels = width + across;
    const bf16* const projected = a.projected + row.begin * a.stride + inner;
    const long long journal = row.source * a.entries_held + row.old;

    if (blockIdx.x == gridDim.x - 1) {
        for (int i = threadIdx.x; i < (last - first) * heads; i += THREADS) {
            const int t = first + i / heads, head = i % heads;
            const float raw = widen(projected[t * a.stride + channels + head]) + widen(a.dt_bias[head]);
            a.dt[(journal + t) * heads + head] =
                fmaxf(softplus(raw), __int_as_float((int)a.min_step));
        }
        return;
    }
    const int channel = (blockIdx.x * THREADS + threadIdx.x) * 4;
    if (channel >= channels) return;
    float taps[4][TAPS], bias[4], past[TAPS - 1][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float4 own = four(a.conv + (channel + i) * TAPS);
        taps[i][0] = own.x, taps[i][1] = own.y, taps[i][2] = own.z, taps[i][3] = own.w;
        bias[i] = a.conv_bias ? widen(a.conv_bias[channel + i]) : 0.f;
    }
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++) {
        const int t = first - (TAPS - 1) + k, at = row.old + t;  // a token, an entry, or before both
        const bf16* const from =
            t >= 0    ? projected + t * a.stride
            : at >= 0 ? a.inputs + (journal + t) * channels
                      : a.window + (row.slot * (TAPS - 1) + TAPS - 1 + at) * channels;
        const float4 own = four(from + channel);
        past[k][0] = own.x, past[k][1] = own.y, past[k][2] = own.z, past[k][3] = own.w;
    }
    bf16* const to = channel < width ? a.scanned + journal * width + channel
                                     : a.read + row.begin * across + channel - width;
    const int line = channel < width ? width : across;
#pragma unroll 4
    for (int t = first; t < last; t++) {
        const uint2 raw = quad(projected + t * a.stride + channel);
        *reinterpret_cast<uint2*>(a.inputs + (journal + t) * channels + channel) = raw;
        const float4 wide = widen(raw);
        const float now[4] = {wide.x, wide.y, wide.z, wide.w};
        unsigned value[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float sum = fmaf(taps[i][TAPS - 1], now[i], bias[i]);
#pragma unroll
            for (int k = 0; k < TAPS - 1; k++) sum = fmaf(taps[i][k], past[k][i], sum);
            value[i] = narrow(silu(widen((bf16)narrow(sum))));
#pragma unroll
            for (int k = 0; k < TAPS - 2; k++) past[k][i] = past[k + 1][i];
            past[TAPS - 2][i] = now[i];
        }
        *reinterpret_cast<uint2*>(to + (long long)t * line) =
            make_uint2(value[0] | value[1] << 16, value[2] | value[3] << 16);
    }
}

// The sums of COUNT values over 2 STEP lanes, half of them for each half of the lanes, and so on: lane i
// gets those from i * COUNT / (2 STEP) on, in the first places.
template <int STEP, int COUNT, int SIZE>
__device__ __forceinline__ void over_lanes(float (&values)[SIZE], int lane) {
    if constexpr (STEP > 0) {
        constexpr int HALF = COUNT / 2;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float kept = lane & STEP ? values[i + HALF] : values[i];
            const float given = lane & STEP ? values[i] : values[i + HALF];
            values[i] = kept + __shfl_xor_sync(~0u, given, STEP);
        }
        over_lanes<STEP / 2, HALF>(values, lane);
    }
}

// blockDim = 2 N; grid = (heads * tiles of ROWS rows, R). A thread holds OWN rows p by four columns of a
// head's state; N / 4 lanes hold all columns of the same rows.
// shared, fp32: B [CHUNK, N], C [CHUNK, N], x [CHUNK, ROWS], y [CHUNK, LINE], (decay, dt) [CHUNK]
template <typename State, int N>
__device__ __forceinline__ void scan(const Arguments& a) {
    constexpr int THREADS = 2 * N, LANES = N / 4, SUMS = AHEAD * OWN;
    constexpr int QUADS = CHUNK * N / 4 / THREADS, POINTS = CHUNK * ROWS / THREADS;  // a thread loads
    static_assert(THREADS / LANES * OWN == ROWS && SUMS >= LANES, "sizes of a block");
    extern __shared__ float4 given[];
    float* const write = reinterpret_cast<float*>(given);
    float* const read = write + CHUNK * N;
    float* const x = read + CHUNK * N;
    float* const result = x + CHUNK * ROWS;
    float2* const steps = reinterpret_cast<float2*>(result + CHUNK * LINE);

    const Row row(a, blockIdx.y);
    if (!row.count) return;
    const int thread = threadIdx.x, lane = thread % LANES, own = thread / LANES * OWN;
    const int head_dim = (int)a.head_dim, tiles = (head_dim + ROWS - 1) / ROWS;
    const int head = blockIdx.x / tiles, top = blockIdx.x % tiles * ROWS;
    const int rows = min(ROWS, head_dim - top);
    const int heads = (int)a.heads, groups = (int)a.groups, group = head / (heads / groups);
    const int inner = heads * head_dim, across = groups * N, width = inner + across;
    const float rate = a.decay[head], skip = widen(a.skip[head]);
    const bf16* const scanned = a.scanned + row.source * a.entries_held * width;
    const float* const dt = a.dt + row.source * a.entries_held * heads + head;
    const bf16* const reads = a.read + row.begin * across + group * N;
    const int total = row.old + row.count;

    float4 h[OWN];
#pragma unroll
    for (int r = 0; r < OWN; r++) {
        const int p = min(own + r, rows - 1);  // what is no row does one that is there
        h[r] = four(static_cast<const State*>(a.state) +
                    ((row.slot * heads + head) * head_dim + top + p) * N + lane * 4);
    }

    // A chunk on its way from memory; entries behind the last one have a dt of zero.
    uint2 next_write[QUADS], next_read[QUADS];
    bf16 next_x[POINTS];
    float next_step = 0.f;
    const auto ask = [&](int begin) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int place = thread + i * THREADS, entry = begin + place / (N / 4);
            const int column = place % (N / 4) * 4;
            next_write[i] = next_read[i] = make_uint2(0, 0);
            if (entry >= total) continue;
            next_write[i] = quad(scanned + (long long)entry * width + inner + group * N + column);
            if (entry >= row.old)
                next_read[i] = quad(reads + (long long)(entry - row.old) * across + column);
        }
#pragma unroll
        for (int i = 0; i < POINTS; i++) {
            const int place = thread + i * THREADS, entry = begin + place / ROWS;
            const int column = place % ROWS;
            next_x[i] = 0;
            if (entry < total && column < rows)
                next_x[i] = scanned[(long long)entry * width + head * head_dim + top + column];
        }
        if (thread < CHUNK)
            next_step = begin + thread < total ? dt[(long long)(begin + thread) * heads] : 0.f;
    };
    ask(0);
    for (int begin = 0; begin < total; begin += CHUNK) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int place = (thread + i * THREADS) * 4;
            *reinterpret_cast<float4*>(write + place) = widen(next_write[i]);
            *reinterpret_cast<float4*>(read + place) = widen(next_read[i]);
        }
#pragma unroll
        for (int i = 0; i < POINTS; i++) x[thread + i * THREADS] = widen(next_x[i]);
        if (thread < CHUNK) steps[thread] = make_float2(__expf(rate * next_step), next_step);
        __syncthreads();
        if (begin + CHUNK < total) ask(begin + CHUNK);

        const int most = min(CHUNK, total - begin);
        for (int j = 0; j < most; j += AHEAD) {
            float y[SUMS];
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int entry = j + u;
                const float2 step = steps[entry];
                const float4 in = four(x + entry * ROWS + own);
                const float4 b = four(write + entry * N + lane * 4);
                const float4 c = four(read + entry * N + lane * 4);
                const float more[OWN] = {step.y * in.x, step.y * in.y, step.y * in.z, step.y * in.w};
#pragma unroll
                for (int r = 0; r < OWN; r++) {
                    h[r].x = fmaf(h[r].x, step.x, more[r] * b.x);
                    h[r].y = fmaf(h[r].y, step.x, more[r] * b.y);
                    h[r].z = fmaf(h[r].z, step.x, more[r] * b.z);
                    h[r].w = fmaf(h[r].w, step.x, more[r] * b.w);
                    y[u * OWN + r] =
                        fmaf(h[r].x, c.x, h[r].y * c.y) + fmaf(h[r].z, c.z, h[r].w * c.w);
                }
            }
            over_lanes<LANES / 2, SUMS>(y, lane);
#pragma unroll
            for (int i = 0; i < SUMS / LANES; i++) {
                const int sum = lane * (SUMS / LANES) + i;
                result[(j + sum / OWN) * LINE + own + sum % OWN] = y[i];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < POINTS; i++) {
            const int place = thread + i * THREADS, entry = place / ROWS, column = place % ROWS;
            const int t = begin + entry - row.old;
            if (t < 0 || t >= row.count || column >= rows) continue;
            const long long token = row.begin + t, channel = head * head_dim + top + column;
            const float y = fmaf(skip, x[place], result[entry * LINE + column]);
            const float gate = widen(a.projected[token * a.stride + channel]);
            a.out[token * inner + channel] = (bf16)narrow(y * silu(gate));
        }
        __syncthreads();
    }
}

#define ENTRY(name, State, N)                                                     \
    extern "C" __global__ void __launch_bounds__(2 * N) name(const Arguments a) { \
        scan<State, N>(a);                                                        \
    }
ENTRY(scan_f32_128, float, 128)
ENTRY(scan_f32_64, float, 64)
ENTRY(scan_f32_32, float, 32)
ENTRY(scan_f32_16, float, 16)
ENTRY(scan_bf16_128, bf16, 128)
ENTRY(scan_bf16_64, bf16, 64)
ENTRY(scan_bf16_32, bf16, 32)
ENTRY(scan_bf16_16, bf16, 16)

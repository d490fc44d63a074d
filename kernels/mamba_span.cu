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
constexpr int LANES = 8;   // threads that share a row

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

// The sums of eight values over the eight lanes of a row; lane i gets that of value i.
__device__ __forceinline__ float over_lanes(const float (&values)[LANES], int lane) {
    float four_left[4], two_left[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float kept = lane & 4 ? values[i + 4] : values[i];
        const float given = lane & 4 ? values[i] : values[i + 4];
        four_left[i] = kept + __shfl_xor_sync(~0u, given, 4);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float kept = lane & 2 ? four_left[i + 2] : four_left[i];
        const float given = lane & 2 ? four_left[i] : four_left[i + 2];
        two_left[i] = kept + __shfl_xor_sync(~0u, given, 2);
    }
    const float kept = lane & 1 ? two_left[1] : two_left[0];
    return kept + __shfl_xor_sync(~0u, lane & 1 ? two_left[0] : two_left[1], 1);
}

__device__ __forceinline__ void load_pair(const float* from, float& x, float& y) {
    x = from[0], y = from[1];
}
__device__ __forceinline__ void load_pair(const bf16* from, float& x, float& y) {
    const unsigned both = *reinterpret_cast<const unsigned*>(from);
    x = __uint_as_float(both << 16), y = __uint_as_float(both & 0xffff0000u);
}

// blockDim = THREADS; grid = (heads * tiles of ROWS rows, R). Eight lanes share a row p of a head's
// state; lane i holds columns 2 i and 2 i + 1 of every sixteen.
// shared, fp32: B [CHUNK, N], C [CHUNK, N], x [CHUNK, ROWS], y [CHUNK, ROWS], dt [CHUNK], decay [CHUNK]
template <typename State, int N>
__device__ __forceinline__ void scan(const Arguments& a) {
    constexpr int PAIRS = N / (2 * LANES);
    constexpr int QUADS = CHUNK * N / 4 / THREADS > 0 ? CHUNK * N / 4 / THREADS : 1;  // a thread loads
    extern __shared__ float4 given[];
    float* const write = reinterpret_cast<float*>(given);
    float* const read = write + CHUNK * N;
    float* const x = read + CHUNK * N;
    float* const result = x + CHUNK * ROWS;
    float* const steps = result + CHUNK * ROWS;
    float* const decays = steps + CHUNK;

    const Row row(a, blockIdx.y);
    if (!row.count) return;
    const int thread = threadIdx.x, lane = thread % LANES, head_dim = (int)a.head_dim;
    const int tiles = (head_dim + ROWS - 1) / ROWS, head = blockIdx.x / tiles;
    const int top = blockIdx.x % tiles * ROWS, rows = min(ROWS, head_dim - top);
    const int heads = (int)a.heads, groups = (int)a.groups, group = head / (heads / groups);
    const int inner = heads * head_dim, across = groups * N, width = inner + across;
    const int p = min(thread / LANES, rows - 1);  // threads without a row do one that is there
    const float rate = a.decay[head], skip = widen(a.skip[head]);
    const bf16* const scanned = a.scanned + row.source * a.entries_held * width;
    const float* const dt = a.dt + row.source * a.entries_held * heads + head;
    const bf16* const reads = a.read + row.begin * across + group * N;
    const int total = row.old + row.count;

    float h[PAIRS][2];
    const State* const own =
        static_cast<const State*>(a.state) + ((row.slot * heads + head) * head_dim + top + p) * N;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) load_pair(own + (i * LANES + lane) * 2, h[i][0], h[i][1]);

    // A chunk on its way from memory; entries behind the last one have a dt of zero.
    uint2 next_write[QUADS], next_read[QUADS];
    bf16 next_x[CHUNK * ROWS / THREADS];
    float next_step = 0.f;
    const auto ask = [&](int begin) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int place = thread + i * THREADS, entry = begin + place / (N / 4);
            const int column = place % (N / 4) * 4;
            next_write[i] = next_read[i] = make_uint2(0, 0);
            if (place < CHUNK * N / 4 && entry < total) {
                next_write[i] = quad(scanned + (long long)entry * width + inner + group * N + column);
                if (entry >= row.old)
                    next_read[i] = quad(reads + (long long)(entry - row.old) * across + column);
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNK * ROWS / THREADS; i++) {
            const int place = thread + i * THREADS, entry = begin + place / ROWS;
            const bool there = entry < total && place % ROWS < rows;
            next_x[i] = 0;
            if (there)
                next_x[i] = scanned[(long long)entry * width + head * head_dim + top + place % ROWS];
        }
        next_step = thread < CHUNK && begin + thread < total ? dt[(long long)(begin + thread) * heads]
                                                             : 0.f;
    };
    ask(0);
    for (int begin = 0; begin < total; begin += CHUNK) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int place = thread + i * THREADS;
            if (place >= CHUNK * N / 4) continue;
            *reinterpret_cast<float4*>(write + place * 4) = widen(next_write[i]);
            *reinterpret_cast<float4*>(read + place * 4) = widen(next_read[i]);
        }
#pragma unroll
        for (int i = 0; i < CHUNK * ROWS / THREADS; i++) x[thread + i * THREADS] = widen(next_x[i]);
        if (thread < CHUNK) {
            steps[thread] = next_step;
            decays[thread] = __expf(rate * next_step);
        }
        __syncthreads();
        if (begin + CHUNK < total) ask(begin + CHUNK);

        const int most = min(CHUNK, total - begin);
        for (int j = 0; j < most; j += LANES) {
            float y[LANES];
#pragma unroll
            for (int u = 0; u < LANES; u++) {
                const int entry = j + u;
                const float keep = decays[entry], more = steps[entry] * x[entry * ROWS + p];
                const float2* const b = reinterpret_cast<const float2*>(write + entry * N) + lane;
                const float2* const c = reinterpret_cast<const float2*>(read + entry * N) + lane;
                float low = 0.f, high = 0.f;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    const float2 in = b[i * LANES], from = c[i * LANES];
                    h[i][0] = fmaf(h[i][0], keep, more * in.x);
                    h[i][1] = fmaf(h[i][1], keep, more * in.y);
                    low = fmaf(h[i][0], from.x, low);
                    high = fmaf(h[i][1], from.y, high);
                }
                y[u] = low + high;
            }
            const float sum = over_lanes(y, lane);
            if (thread / LANES < rows) result[(j + lane) * ROWS + p] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < CHUNK * ROWS / THREADS; i++) {
            const int place = thread + i * THREADS, t = begin + place / ROWS - row.old;
            const int column = place % ROWS;
            if (t < 0 || t >= row.count || column >= rows) continue;
            const long long token = row.begin + t, channel = head * head_dim + top + column;
            const float y = fmaf(skip, x[place], result[place]);
            const float gate = widen(a.projected[token * a.stride + channel]);
            a.out[token * inner + channel] = (bf16)narrow(y * silu(gate));
        }
        __syncthreads();
    }
}

#define ENTRY(name, State, N)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(const Arguments a) { \
        scan<State, N>(a);                                                           \
    }
ENTRY(scan_f32_128, float, 128)
ENTRY(scan_f32_64, float, 64)
ENTRY(scan_f32_32, float, 32)
ENTRY(scan_f32_16, float, 16)
ENTRY(scan_bf16_128, bf16, 128)
ENTRY(scan_bf16_64, bf16, 64)
ENTRY(scan_bf16_32, bf16, 32)
ENTRY(scan_bf16_16, bf16, 16)

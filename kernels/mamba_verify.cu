// The step of mamba.cuh for several new tokens a row.
//
// A block takes one head and QUERIES of the tokens; it convolves all tokens up to them, which costs less
// than to wait for other blocks.
#include "mamba.cuh"

constexpr int QUERIES = 8;

// One channel of the convolution: its taps, and the inputs before the next one.
struct Channel {
    float tap[TAPS], history[TAPS - 1], bias;
    int number;       // among all channels
    bool there;

    __device__ __forceinline__ bf16 next(bf16 raw) {
        float value = fmaf(tap[TAPS - 1], widen(raw), bias);
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) value = fmaf(history[k], tap[k], value);
#pragma unroll
        for (int k = 0; k < TAPS - 2; k++) history[k] = history[k + 1];
        history[TAPS - 2] = widen(raw);
        return (bf16)narrow(silu(widen((bf16)narrow(value))));
    }
};

// blockDim = 4 P; grid = (H, R, tiles of QUERIES tokens). A group of four threads owns row p of the
// head's state, each a quarter of its N columns in pieces of four. The convolution runs over the head's
// x and its group's B and C, P + 2 N channels: at most two a thread.
// shared, fp32: C [QUERIES, N], weight [QUERIES, E], sum [E], dt [E], squares [QUERIES, warps]; then
// bf16: x [E, P], B [E, N]; E = entries held
template <typename State, int N>
__device__ __forceinline__ void step(const Arguments& a) {
    constexpr int PIECES = N / 16;
    extern __shared__ float4 given[];
    const int threads = blockDim.x, thread = threadIdx.x, rows = threads / 4, length = (int)a.length;
    const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
    const int heads = (int)a.heads, groups = (int)a.groups, head = blockIdx.x;
    const int heads_of_group = heads / groups, group = head / heads_of_group;
    const bool first_of_group = head == group * heads_of_group;
    const int inner = heads * rows, channels = inner + 2 * groups * N, width = inner + groups * N;
    const int held = (int)a.entries_held;
    const Row row(a, blockIdx.y);
    const long long token = (long long)blockIdx.y * length;
    const int old = row.old, first = blockIdx.z * QUERIES;
    const int p = thread / 4, quarter = thread % 4;

    float* const read = reinterpret_cast<float*>(given);
    float* const weight = read + QUERIES * N;
    float* const sum = weight + QUERIES * held;
    float* const steps = sum + held;
    float* const partial = steps + held;
    bf16* const x = reinterpret_cast<bf16*>(partial + QUERIES * warps);
    bf16* const write = x + held * rows;
    const bf16* const projected = a.projected + token * a.stride;
    bf16* const inputs = a.inputs + row.source * held * channels;
    bf16* const outputs = a.scanned + row.source * held * width;
    float* const dt = a.dt + row.source * held * heads + head;

    // What is committed, and the journal of passes before: nothing that this step waits for.
    float4 h[PIECES];
    const float rate = a.decay[head], skip = widen(a.skip[head]), dt_bias = widen(a.dt_bias[head]);
    const auto channel_of = [&](int c) {  // the c-th of this block: x, B, C
        return c < rows ? head * rows + c
                        : inner + group * N + (c < rows + N ? c - rows : groups * N + c - rows - N);
    };
    const auto open = [&](int c) {
        Channel own;
        own.there = c < rows + 2 * N;
        own.number = own.there ? channel_of(c) : 0;
        const uint2 raw = *reinterpret_cast<const uint2*>(a.conv + own.number * TAPS);
        own.tap[0] = __uint_as_float(raw.x << 16), own.tap[1] = __uint_as_float(raw.x & 0xffff0000u);
        own.tap[2] = __uint_as_float(raw.y << 16), own.tap[3] = __uint_as_float(raw.y & 0xffff0000u);
        own.bias = a.conv_bias ? widen(a.conv_bias[own.number]) : 0.f;
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) {
            const int at = old - (TAPS - 1) + k;  // an entry, or before the first one
            const bf16* const from =
                at >= 0 ? inputs + (long long)at * channels
                        : a.window + (row.slot * (TAPS - 1) + TAPS - 1 + at) * channels;
            own.history[k] = widen(from[own.number]);
        }
        return own;
    };
    Channel pair[2];
    if (row.usable && first < row.count) {
        const State* const own =
            static_cast<const State*>(a.state) + ((row.slot * heads + head) * rows + p) * N + quarter * 4;
#pragma unroll
        for (int i = 0; i < PIECES; i++) h[i] = load_four(own + i * 16);
        for (int j = warp; j < old; j += warps) {
            const bf16* const entry = outputs + (long long)j * width;
            for (int c = lane; c < rows; c += 32) x[j * rows + c] = entry[head * rows + c];
            for (int n = lane; n < N; n += 32) write[j * N + n] = entry[inner + group * N + n];
        }
        for (int j = thread; j < old; j += threads) steps[j] = dt[(long long)j * heads];
        pair[0] = open(thread), pair[1] = open(thread + threads);
    }
    wait_for_inputs();
    let_next_start();
    const int last = row.usable ? min(first + QUERIES, row.count) : 0;
    for (int t = max(first, last); t < min(first + QUERIES, length); t++) {  // padding
        if (quarter == 0) a.out[(token + t) * inner + head * rows + p] = 0;
        if (thread == 0) a.squares[(token + t) * heads + head] = 0.f;
    }
    if (first >= last) return;
    for (int t = thread; t < last; t += threads) {
        const float raw = widen(projected[t * a.stride + inner + channels + head]) + dt_bias;
        steps[old + t] = fmaxf(softplus(raw), __int_as_float((int)a.min_step));
        if (t >= first) dt[(long long)(old + t) * heads] = steps[old + t];
    }
    float gate[QUERIES / 4];  // of every fourth token; the other three threads have the others
#pragma unroll
    for (int i = 0; i < QUERIES / 4; i++) {
        const int t = first + i * 4 + quarter;
        gate[i] = t < last ? widen(projected[t * a.stride + head * rows + p]) : 0.f;
    }
#pragma unroll 2
    for (int t = 0; t < last; t++) {
        const int entry = old + t;
        const bf16* const from = projected + t * a.stride + inner;
        const bf16 raw[2] = {from[pair[0].number], from[pair[1].number]};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bf16 value = pair[i].next(raw[i]);
            const int c = thread + i * threads;
            if (!pair[i].there) continue;
            if (c < rows)
                x[entry * rows + c] = value;
            else if (c < rows + N)
                write[entry * N + c - rows] = value;
            else if (t >= first)
                read[(t - first) * N + c - rows - N] = widen(value);
            if (t < first || (c >= rows && !first_of_group)) continue;
            inputs[(long long)entry * channels + pair[i].number] = raw[i];
            if (c < rows + N) outputs[(long long)entry * width + pair[i].number] = value;
        }
    }
    __syncthreads();
    if (warp == 0)  // running sums of A dt
        for (int begin = 0; begin < old + last; begin += 32) {
            const int j = begin + lane;
            float value = sum_through(j < old + last ? rate * steps[j] : 0.f);
            if (begin) value += sum[begin - 1];
            if (j < old + last) sum[j] = value;
            __syncwarp();
        }
    __syncthreads();

    // weight[t][j] = exp(c_t - c_j) dt_j (C_t . B_j): a warp an entry, for each token after it.
    for (int j = warp; j < old + last; j += warps) {
        float own[(N + 31) / 32];
#pragma unroll
        for (int i = 0; i < (N + 31) / 32; i++)
            own[i] = i * 32 + lane < N ? widen(write[j * N + i * 32 + lane]) : 0.f;
        for (int t = max(first, j - old); t < last; t++) {
            float dot = 0.f;
#pragma unroll
            for (int i = 0; i < (N + 31) / 32; i++)
                if (i * 32 + lane < N)
                    dot = fmaf(read[(t - first) * N + i * 32 + lane], own[i], dot);
            dot = over_warp(dot);
            if (lane == 0)
                weight[(t - first) * held + j] = dot * steps[j] * __expf(sum[old + t] - sum[j]);
        }
    }
    __syncthreads();

    for (int t = first; t < last; t++) {
        const int now = old + t;
        const float* const c = read + (t - first) * N + quarter * 4;
        float y = 0.f;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const float4 v = *reinterpret_cast<const float4*>(c + i * 16);
            y += h[i].x * v.x + h[i].y * v.y + h[i].z * v.z + h[i].w * v.w;
        }
        y *= __expf(sum[now]);
        for (int j = quarter; j <= now; j += 4)
            y = fmaf(weight[(t - first) * held + j], widen(x[j * rows + p]), y);
        y = over_four(y);
        y = fmaf(skip, widen(x[now * rows + p]), y);
        const float mine = (t - first) / 4 ? gate[1] : gate[0];
        y *= silu(__shfl_sync(~0u, mine, (lane & ~3) + (t - first) % 4));
        if (quarter == 0) a.out[(token + t) * inner + head * rows + p] = (bf16)narrow(y);
        const float square = over_warp(quarter == 0 ? y * y : 0.f);
        if (lane == 0) partial[(t - first) * warps + warp] = square;
    }
    __syncthreads();
    if (thread < last - first) {
        float square = 0.f;
        for (int w = 0; w < warps; w++) square += partial[thread * warps + w];
        a.squares[(token + first + thread) * heads + head] = square;
    }
}

#define ENTRY(name, State, N)                                                              \
    extern "C" __global__ void __launch_bounds__(256, 3) name(const Arguments a) {         \
        step<State, N>(a);                                                                 \
    }
ENTRY(step_f32_128, float, 128)
ENTRY(step_f32_64, float, 64)
ENTRY(step_f32_32, float, 32)
ENTRY(step_f32_16, float, 16)
ENTRY(step_bf16_128, bf16, 128)
ENTRY(step_bf16_64, bf16, 64)
ENTRY(step_bf16_32, bf16, 32)
ENTRY(step_bf16_16, bf16, 16)

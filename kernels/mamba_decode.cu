// The step of mamba.cuh for one new token a row.
//
// A block takes several heads of one group, which share B and C: it convolves what they need once, and
// then streams their states, the next one always under way.
#include "mamba.cuh"

// Two neighbouring channels of bf16.
__device__ __forceinline__ float2 two(const bf16* from) {
    const unsigned raw = *reinterpret_cast<const unsigned*>(from);
    return {__uint_as_float(raw << 16), __uint_as_float(raw & 0xffff0000u)};
}

// The taps of two neighbouring channels, their bias and the inputs before the new one.
struct Channels {
    float first[TAPS], second[TAPS];
    float2 history[TAPS - 1], bias;

    __device__ __forceinline__ void load(const Arguments& a, const Row& row, int channel, int channels) {
        const uint4 raw = *reinterpret_cast<const uint4*>(a.conv + channel * TAPS);
        float taps[2 * TAPS];
        unpack(raw, taps);
#pragma unroll
        for (int k = 0; k < TAPS; k++) first[k] = taps[k], second[k] = taps[TAPS + k];
        bias = a.conv_bias ? two(a.conv_bias + channel) : float2{0.f, 0.f};
        const bf16* const entries = a.inputs + row.source * a.entries_held * channels + channel;
        const bf16* const before = a.window + (row.slot + 1) * (TAPS - 1) * channels + channel;
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) {
            const int at = row.old - (TAPS - 1) + k;  // an entry, or before the first one
            history[k] = two((at >= 0 ? entries : before) + at * channels);
        }
    }

    // Both convolved with the new inputs, as two bf16.
    __device__ __forceinline__ unsigned next(unsigned raw) const {
        float x = fmaf(first[TAPS - 1], __uint_as_float(raw << 16), bias.x);
        float y = fmaf(second[TAPS - 1], __uint_as_float(raw & 0xffff0000u), bias.y);
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) {
            x = fmaf(history[k].x, first[k], x);
            y = fmaf(history[k].y, second[k], y);
        }
        x = silu(widen((bf16)narrow(x))), y = silu(widen((bf16)narrow(y)));
        return narrow(x) | narrow(y) << 16;
    }
};

// blockDim = 4 P; grid = (H / heads a block, R)
// shared, fp32: x [heads * P], y of the journal likewise, B [N], C [N], C . B [E], weight [heads, E],
// kept [heads], squares [heads, warps]; E = entries held
template <typename State, int N>
__device__ __forceinline__ void step(const Arguments& a) {
    constexpr int PIECES = N / 16;
    extern __shared__ float4 given[];
    const int threads = blockDim.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warps = threads / 32, rows = threads / 4, many = (int)a.heads_a_block;
    const int heads = (int)a.heads, groups = (int)a.groups, head = blockIdx.x * many;
    const int heads_of_group = heads / groups, group = head / heads_of_group;
    const int inner = heads * rows, channels = inner + 2 * groups * N, width = inner + groups * N;
    const int held = (int)a.entries_held, token = blockIdx.y;
    const int p = thread / 4, quarter = thread % 4;
    const Row row(a, token);

    float* const x = reinterpret_cast<float*>(given);
    float* const y_old = x + many * rows;
    float* const write = y_old + many * rows;
    float* const read = write + N;
    float* const products = read + N;
    float* const weight = products + held;
    float* const kept = weight + many * held;
    float* const partial = kept + many;
    const bf16* const projected = a.projected + token * a.stride;
    const long long journal = row.source * held;

    // What is committed, and the journal of passes before: nothing that this step waits for.
    float4 h[PIECES], coming[PIECES];
    const State* const states =
        static_cast<const State*>(a.state) + ((row.slot * heads + head) * rows + p) * N + quarter * 4;
    const auto fetch = [&](int i, float4(&to)[PIECES]) {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            to[piece] = load_four(states + (long long)i * rows * N + piece * 16);
    };
    // A pair of x's channels for each of the first threads, and one of B's or C's.
    const bool has_x = thread < many * rows / 2, has_bc = thread < N;
    const int channel = head * rows + 2 * thread;
    const int own = 2 * thread < N ? group * N + 2 * thread : (groups + group) * N + 2 * thread - N;
    Channels mine, its;
    const int my_head = head + min(warp, many - 1);  // whose step this warp works out
    const float rate = a.decay[my_head], dt_bias = widen(a.dt_bias[my_head]);
    const float skip = has_x ? widen(a.skip[head + 2 * thread / rows]) : 0.f;
    if (row.usable) {
        fetch(0, h);
        if (has_x) mine.load(a, row, channel, channels);
        if (has_bc) its.load(a, row, inner + own, channels);
    }
    wait_for_inputs();
    let_next_start();
    if (!row.usable) {
#pragma unroll 1
        for (int i = thread; i < many * rows; i += threads)
            a.out[token * inner + head * rows + i] = 0;
        if (thread < many) a.squares[token * heads + head + thread] = 0.f;
        return;
    }

    // All that this step reads of the projection, asked for at once.
    const long long entry = journal + row.old;
    const bf16* const projected_x = projected + inner + channel;
    const unsigned raw_x = has_x ? *reinterpret_cast<const unsigned*>(projected_x) : 0;
    const unsigned raw_bc =
        has_bc ? *reinterpret_cast<const unsigned*>(projected + 2 * inner + own) : 0;
    const float raw_dt = widen(projected[inner + channels + my_head]);
    float gate = widen(projected[head * rows + p]);
    if (has_x) {
        const unsigned raw = raw_x, value = mine.next(raw);
        *reinterpret_cast<unsigned*>(a.inputs + entry * channels + channel) = raw;
        *reinterpret_cast<unsigned*>(a.scanned + entry * width + channel) = value;
        x[2 * thread] = __uint_as_float(value << 16);
        x[2 * thread + 1] = __uint_as_float(value & 0xffff0000u);
    }
    if (has_bc) {
        const unsigned raw = raw_bc, value = its.next(raw);
        const bool is_b = 2 * thread < N;
        if (head == group * heads_of_group) {
            *reinterpret_cast<unsigned*>(a.inputs + entry * channels + inner + own) = raw;
            if (is_b) *reinterpret_cast<unsigned*>(a.scanned + entry * width + inner + own) = value;
        }
        float* const to = is_b ? write + 2 * thread : read + 2 * thread - N;
        to[0] = __uint_as_float(value << 16), to[1] = __uint_as_float(value & 0xffff0000u);
    }
    __syncthreads();

    // C . B_j of the journal's entries and of the new token: a warp an entry.
    for (int j = warp; j <= row.old; j += warps) {
        const bf16* const from = a.scanned + (journal + j) * width + inner + group * N;
        float dot = 0.f;
        for (int n = lane; n < N; n += 32)
            dot = fmaf(read[n], j == row.old ? write[n] : widen(from[n]), dot);
        dot = over_warp(dot);
        if (lane == 0) products[j] = dot;
    }
    __syncthreads();

    // weight_j = exp(c - c_j) dt_j (C . B_j): a warp a head, from the new token backwards.
    if (warp < many) {
        const int i = warp;
        const float fresh_step = fmaxf(softplus(raw_dt + dt_bias), __int_as_float((int)a.min_step));
        if (lane == 0) a.dt[entry * heads + head + i] = fresh_step;
        float after = 0.f;  // the sum of dt over the entries that come later
        for (int last = row.old; last >= 0; last -= 32) {
            const int j = last - lane;
            const float dt = j < 0            ? 0.f
                             : j == row.old ? fresh_step
                                            : a.dt[(journal + j) * heads + head + i];
            const float through = sum_through(dt) + after;
            if (j >= 0) weight[i * held + j] = products[j] * dt * __expf(rate * (through - dt));
            after = __shfl_sync(~0u, through, 31);
        }
        if (lane == 0) kept[i] = __expf(rate * after);
    }
    __syncthreads();

    if (has_x) {
        const int i = 2 * thread / rows;
        const float now = skip + weight[i * held + row.old];
        float2 y = {now * x[2 * thread], now * x[2 * thread + 1]};
#pragma unroll 4
        for (int j = 0; j < row.old; j++) {
            const float2 v = two(a.scanned + (journal + j) * width + channel);
            const float w = weight[i * held + j];
            y.x = fmaf(w, v.x, y.x), y.y = fmaf(w, v.y, y.y);
        }
        y_old[2 * thread] = y.x, y_old[2 * thread + 1] = y.y;
    }
    __syncthreads();

#pragma unroll 1
    for (int i = 0; i < many; i++) {
        float coming_gate = 0.f;
        if (i + 1 < many) {
            fetch(i + 1, coming);
            coming_gate = widen(projected[(head + i + 1) * rows + p]);
        }
        float y = 0.f;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            const float4 c = *reinterpret_cast<const float4*>(read + piece * 16 + quarter * 4);
            y += h[piece].x * c.x + h[piece].y * c.y + h[piece].z * c.z + h[piece].w * c.w;
        }
        y += __shfl_xor_sync(~0u, y, 1);
        y += __shfl_xor_sync(~0u, y, 2);
        y = fmaf(y, kept[i], y_old[i * rows + p]) * silu(gate);
        if (quarter == 0) a.out[token * inner + (head + i) * rows + p] = (bf16)narrow(y);
        const float square = over_warp(quarter == 0 ? y * y : 0.f);
        if (lane == 0) partial[i * warps + warp] = square;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) h[piece] = coming[piece];
        gate = coming_gate;
    }
    __syncthreads();
    if (thread < many) {
        float square = 0.f;
#pragma unroll 1
        for (int w = 0; w < warps; w++) square += partial[thread * warps + w];
        a.squares[token * heads + head + thread] = square;
    }
}

#define ENTRY(name, State, N)                                                             \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const Arguments a) {        \
        step<State, N>(a);                                                                \
    }
ENTRY(step_f32_128, float, 128)
ENTRY(step_f32_64, float, 64)
ENTRY(step_f32_32, float, 32)
ENTRY(step_f32_16, float, 16)
ENTRY(step_bf16_128, bf16, 128)
ENTRY(step_bf16_64, bf16, 64)
ENTRY(step_bf16_32, bf16, 32)
ENTRY(step_bf16_16, bf16, 16)

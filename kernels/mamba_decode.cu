// The step of mamba.cuh for one new token a row.
//
// A block takes several heads of one group, which share B and C: it convolves what they need once, and
// then streams their states and what the journal holds of their x, the next head's always under way.
// What passes before have written is asked for before this kernel's turn. Then every way to memory and
// every barrier counts: one and two of them until y.
#include "mamba.cuh"

__device__ __forceinline__ float2 two(unsigned raw) {
    return {__uint_as_float(raw << 16), __uint_as_float(raw & 0xffff0000u)};
}

// Line i of a matrix of lines of `width`.
template <typename T>
__device__ __forceinline__ T* line(T* matrix, long long i, unsigned width) {
    return matrix + (unsigned)i * (unsigned long long)width;
}

// The taps of four neighbouring channels, their bias and the inputs before the new one, as stored.
struct Channels {
    uint4 taps[2];
    uint2 history[TAPS - 1], bias;

    // entries, before: the first entry's inputs, and those of the token after the window
    __device__ __forceinline__ void load(const Arguments& a, const bf16* entries, const bf16* before,
                                         int old, int channel, int channels) {
        const uint4* const own = reinterpret_cast<const uint4*>(a.conv + channel * TAPS);
        taps[0] = own[0], taps[1] = own[1];
        bias = a.conv_bias ? quad(a.conv_bias + channel) : make_uint2(0, 0);
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) {
            const int at = old - (TAPS - 1) + k;
            history[k] = quad((at >= 0 ? entries : before) + at * channels + channel);
        }
    }

    // All convolved with the new inputs.
    __device__ __forceinline__ uint2 next(uint2 raw) const {
        unsigned value[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float tap[2 * TAPS];
            unpack(taps[half], tap);
            float2 sum = two(half ? bias.y : bias.x), x = two(half ? raw.y : raw.x);
            sum = {fmaf(tap[TAPS - 1], x.x, sum.x), fmaf(tap[2 * TAPS - 1], x.y, sum.y)};
#pragma unroll
            for (int k = 0; k < TAPS - 1; k++) {
                x = two(half ? history[k].y : history[k].x);
                sum = {fmaf(x.x, tap[k], sum.x), fmaf(x.y, tap[TAPS + k], sum.y)};
            }
            sum = two(narrow(sum.x, sum.y));
            value[half] = narrow(silu(sum.x), silu(sum.y));
        }
        return {value[0], value[1]};
    }
};

__device__ __forceinline__ void add_products(float4& sum, const float4& a, const float4& b) {
    sum.x = fmaf(a.x, b.x, sum.x), sum.y = fmaf(a.y, b.y, sum.y);
    sum.z = fmaf(a.z, b.z, sum.z), sum.w = fmaf(a.w, b.w, sum.w);
}

__device__ __forceinline__ float all_of(const float4& sum) { return sum.x + sum.y + (sum.z + sum.w); }

// Lane 4 r + q gets the sum of sums[r] over the lanes 4 i + q.
__device__ __forceinline__ float spread(float (&sums)[8]) {
#pragma unroll
    for (int half = 4; half; half /= 2) {
        const bool upper = threadIdx.x & 4 * half;
#pragma unroll
        for (int r = 0; r < half; r++) {
            const float given = upper ? sums[r] : sums[half + r];
            sums[r] = (upper ? sums[half + r] : sums[r]) + __shfl_xor_sync(~0u, given, 4 * half);
        }
    }
    return sums[0];
}

// y = decay (kept C h + sum_j weight_j (C . B_j) x_j) + (step C . B + skip) x
struct Factors {
    float decay, kept, step, skip;
};

constexpr int HEADS = 8, ROWS = 64;  // at most, of a block and of a head

// blockDim = 4 P; grid = (heads of a group / heads a block, G, R). Four threads share row p of a state,
// each a quarter of its columns in pieces of four; a warp's eight rows are 16 bytes of an entry's x.
// shared, E = entries held; bf16: B [E, N + 16], x [1 or 2 heads, warps, E, 8]; fp32: C . B [E],
// weight [heads, E]
template <typename State, int N>
__device__ __forceinline__ void step(const Arguments& a) {
    constexpr int PIECES = N / 16, LINE = N + 16;  // so that eight entries are in different banks
    extern __shared__ float4 given[];
    alignas(16) __shared__ float read[N], fresh[HEADS * ROWS];  // C; new x, later y^2
    __shared__ Factors factors[HEADS];
    const unsigned threads = blockDim.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const unsigned rows = threads / 4, p = thread / 4, quarter = thread % 4;
    const unsigned group = blockIdx.y, groups = gridDim.y, token = blockIdx.z;
    const int many = (int)a.heads_a_block, heads = (int)a.heads, held = (int)a.entries_held;
    const int head = (int)(group * gridDim.x + blockIdx.x) * many;
    const int inner = heads * rows, width = inner + groups * N, channels = width + groups * N;
    const Row row(a, token);
    const int old = row.old;

    bf16* const write = reinterpret_cast<bf16*>(given);
    bf16* const x = write + held * LINE;
    float* const products = reinterpret_cast<float*>(x + (many > 1 ? 2 : 1) * held * rows);
    float* const weights = products + held;

    // What is committed, and the journal of passes before: nothing that this step waits for.
    const unsigned journal = (unsigned)row.source * held;
    bf16* const inputs = line(a.inputs, journal, channels);
    bf16* const scanned = line(a.scanned, journal, width);
    float* const dt = line(a.dt, journal, heads) + head;
    const State* const states = line(static_cast<const State*>(a.state), row.slot, heads * rows * N) +
                                (head * rows + p) * N + quarter * 4;
    const auto fetch = [&](int i, float4(&to)[PIECES]) {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            to[piece] = load_four(states + i * rows * N + piece * 16);
    };
    const auto x_of = [&](int i) { return x + (i % 2 * rows + warp * 8) * held; };
    const auto copy_x = [&](int i) {
#pragma unroll 1
        for (int j = lane; j < old; j += 32)
            copy_near<16>(x_of(i) + j * 8, scanned + j * width + (head + i) * rows + warp * 8);
        close_group();
    };
    // Four channels a thread: x of all heads, B, C. The last warps have a head each to weigh.
    const int at = 4 * thread, at_b = at - many * (int)rows;
    const bool has_channels = at_b < 2 * N, is_x = at_b < 0, is_c = at_b >= N;
    const int channel =
        is_x ? head * rows + at : inner + group * N + at_b + (is_c ? (groups - 1) * N : 0);
    const int place = threads / 32 - 1 - warp, its = min(place, many - 1);
    const bool weighs = place < many;
    float* const weight = weights + its * held;
    const float rate = a.decay[head + its];
    const bf16 dt_bias = a.dt_bias[head + its], skip = a.skip[head + its];
    float4 h[PIECES], coming[PIECES];
    Channels mine;
    if (row.usable) {
        fetch(0, h);
        if (has_channels)
            mine.load(a, inputs, line(a.window, row.slot + 1, (TAPS - 1) * channels), old, channel,
                      channels);
        if (weighs)
#pragma unroll 1
            for (int j = old - 1 - (int)lane; j >= 0; j -= 32)
                copy_near<4>(weight + j, dt + j * heads + its);
#pragma unroll 1
        for (unsigned i = thread; i < old * (N / 8); i += threads) {
            const unsigned j = i / (N / 8), n = i % (N / 8) * 8;
            copy_near<16>(write + j * LINE + n, scanned + j * width + inner + group * N + n);
        }
        copy_x(0);
    }
    const bf16* const projected = line(a.projected, token, (unsigned)a.stride);
    bf16* const out = line(a.out, token, inner) + head * rows;
    float* const squares = line(a.squares, token, heads) + head;
    wait_for_inputs();
    let_next_start();
    if (!row.usable) {
#pragma unroll 1
        for (int i = thread; i < many * rows; i += threads) out[i] = 0;
        if (thread < many) squares[thread] = 0.f;
        return;
    }

    // All that this step reads of the projection, asked for at once.
    const bf16* const gates = projected + head * rows + p;
    const uint2 raw = has_channels ? quad(projected + inner + channel) : make_uint2(0, 0);
    const bf16 raw_dt = projected[inner + channels + head + its];
    bf16 gate = gates[0];

    // weight_j = dt_j exp(c - c_j), c and all sums before the new token.
    if (weighs) {
        wait_for_group<0>();
        float after = 0.f;  // the sum of dt over the entries that come later
#pragma unroll 1
        for (int last = old - 1; last >= 0; last -= 32) {
            const int j = last - (int)lane;
            const float own = j < 0 ? 0.f : weight[j];
            const float through = sum_through(own) + after;
            if (j >= 0) weight[j] = own * __expf(rate * (through - own));
            after = __shfl_sync(~0u, through, 31);
        }
        const float raw = softplus(widen(raw_dt) + widen(dt_bias));
        const float step = fmaxf(raw, __int_as_float((int)a.min_step));
        if (lane == 0) {
            factors[its] = {__expf(rate * step), __expf(rate * after), step, widen(skip)};
            dt[old * heads + its] = step;
        }
    }
    if (has_channels) {
        const uint2 value = mine.next(raw);
        if (is_x || is_c)
            *reinterpret_cast<float4*>(is_x ? fresh + at : read + at_b - N) = widen(value);
        else
            *reinterpret_cast<uint2*>(write + old * LINE + at_b) = value;
        if (is_x || blockIdx.x == 0) {
            *reinterpret_cast<uint2*>(inputs + old * channels + channel) = raw;
            if (!is_c) *reinterpret_cast<uint2*>(scanned + old * width + channel) = value;
        }
    }
    wait_for_group<0>();
    __syncthreads();

    const float* const own_read = read + quarter * 4;
    for (int i = 0;;) {
        const float opened = silu(widen(gate));
        if (i + 1 < many) {
            fetch(i + 1, coming);
            copy_x(i + 1);
            gate = gates[(i + 1) * rows];
        }
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            add_products(sum, h[piece], four(own_read + piece * 16));
        if (i == 0) {
            // C . B_j of the journal's entries and of the new token: four lanes an entry.
#pragma unroll 1
            for (int first = warp * 8; first <= old; first += rows) {
                const int j = min(first + (int)lane / 4, old);
                const bf16* const own = write + j * LINE + quarter * 4;
                float4 dot = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++)
                    add_products(dot, four(own + piece * 16), four(own_read + piece * 16));
                products[j] = over_four(all_of(dot));
            }
            __syncthreads();
        }
        const Factors by = factors[i];
        float y = by.kept * all_of(sum);
        if (old) {  // an entry a lane
            float sums[8] = {};
#pragma unroll 1
            for (int j = lane; j < old; j += 32) {
                const float w = weights[i * held + j] * products[j];
                float v[8];
                unpack(*reinterpret_cast<const uint4*>(x_of(i) + j * 8), v);
#pragma unroll
                for (int r = 0; r < 8; r++) sums[r] = fmaf(w, v[r], sums[r]);
            }
            y += spread(sums);
        }
        float& own = fresh[i * rows + p];
        const float now = fmaf(by.step, products[old], by.skip) * own;
        y = fmaf(by.decay, over_four(y), now) * opened;
        __syncwarp();  // before the lanes of a row lose its x
        if (quarter == 0) {
            out[i * rows + p] = (bf16)narrow(y, 0.f);
            own = y * y;
        }
        if (++i == many) break;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) h[piece] = coming[piece];
        wait_for_group<0>();
    }
    __syncthreads();
    if (warp < many) {
        float square = 0.f;
#pragma unroll 1
        for (unsigned i = lane; i < rows; i += 32) square += fresh[warp * rows + i];
        square = over_warp(square);
        if (lane == 0) squares[warp] = square;
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

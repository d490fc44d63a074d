// Grouped-query attention of a pass's tokens over their slots, split over length; writes K and V.
//
// Heads that share K and V are the 16 rows of an mma. The eight columns of K that a lane reads at once
// make the depth of two mma in another order, the same for the query.
#include "numbers.cuh"
#include "ptx.cuh"

struct Arguments {
    const bf16* query;   // [R * T, kv heads * group * D], rows stride apart
    const bf16* fresh_keys;    // [R * T, kv heads * D], rows stride apart
    const bf16* fresh_values;  // likewise
    bf16* keys;          // [S, M, kv heads, D] of this layer
    bf16* values;
    bf16* out;           // [R * T, kv heads * group * D]
    float* partial;      // [R * T, kv heads, splits, 16, D]
    float* extent;       // [R * T, kv heads, splits, 16, 2]: maximum, sum of weights
    unsigned* arrived;   // [R * T, kv heads], zero before and after
    const long long* slots;
    const long long* starts;  // [R]: position of a row's first new token
    const long long* counts;  // [R]: new tokens
    long long stride, length, slots_held, positions_held, kv_heads, group, splits, scale;
};

constexpr int WARPS = 4, THREADS = 32 * WARPS, KEYS = 16;
constexpr float NOTHING = -3.402823466e38f;  // the maximum of no scores

__device__ __forceinline__ unsigned pair_of(float low, float high) {
    return narrow(low) | narrow(high) << 16;
}

__device__ __forceinline__ float over_four_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float over_four_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The weight that a part with maximum `own` has in a whole with maximum `all`.
__device__ __forceinline__ float rescale(float own, float all) {
    return own == NOTHING ? 0.f : expf(own - all);
}

// grid = (splits, kv heads, R * T); shared: V tiles [WARPS, KEYS, D + 8] bf16, then the same memory
// for what the warps found [WARPS, 16, D] fp32
template <int D>
__device__ __forceinline__ void attend(const Arguments& a) {
    constexpr int READS = (D + 31) / 32, ROW = D + 8, OUT = D / 8;
    extern __shared__ uint4 given[];
    __shared__ float maxima[WARPS][16], weights[WARPS][16];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int split = blockIdx.x, splits = (int)a.splits, head = blockIdx.y, group = (int)a.group;
    const long long token = blockIdx.z, row = token / a.length, t = token % a.length;
    const long long kv_width = a.kv_heads * D, out_width = kv_width * group;
    const long long slot = a.slots[row], start = a.starts[row];
    wait_for_inputs();
    let_next_start();
    bf16* const out = a.out + token * out_width + head * group * D;
    const long long place = (token * a.kv_heads + head) * splits + split;
    if (t >= a.counts[row] || slot < 0 || slot >= a.slots_held || start < 0 ||
        start + t >= a.positions_held) {
        if (split == 0)
            for (int i = threadIdx.x; i < group * D; i += THREADS) out[i] = 0;
        return;
    }
    bf16* const keys = a.keys + (slot * a.positions_held * a.kv_heads + head) * D;
    bf16* const values = a.values + (slot * a.positions_held * a.kv_heads + head) * D;
    const bf16* const fresh_keys = a.fresh_keys + row * a.length * a.stride + head * D;
    const bf16* const fresh_values = a.fresh_values + row * a.length * a.stride + head * D;
    if (split == 0)
        for (int i = threadIdx.x; i < D; i += THREADS) {
            keys[(start + t) * kv_width + i] = fresh_keys[t * a.stride + i];
            values[(start + t) * kv_width + i] = fresh_values[t * a.stride + i];
        }

    const int visible = (int)(start + t + 1);
    const int each = ((visible + splits - 1) / splits + KEYS - 1) / KEYS * KEYS;
    const int first = min(split * each, visible), last = min(first + each, visible);

    uint4 low[READS], high[READS];
    const bf16* const query = a.query + token * a.stride + head * group * D;
#pragma unroll
    for (int i = 0; i < READS; i++) {
        const int k = i * 32 + t4 * 8;
        const bool inside = k < D;
        low[i] = inside && g < group ? *reinterpret_cast<const uint4*>(query + g * D + k)
                                     : make_uint4(0, 0, 0, 0);
        high[i] = inside && g + 8 < group
                      ? *reinterpret_cast<const uint4*>(query + (g + 8) * D + k)
                      : make_uint4(0, 0, 0, 0);
    }
    float o[OUT][4] = {};
    float top[2] = {NOTHING, NOTHING}, whole[2] = {0.f, 0.f};
    const float scale = __int_as_float((int)a.scale);
    bf16* const tile = reinterpret_cast<bf16*>(given) + warp * KEYS * ROW;

    for (int base = first + warp * KEYS; base < last; base += WARPS * KEYS) {
        uint4 v[OUT / 2];
#pragma unroll
        for (int i = 0; i < OUT / 2; i++) {  // KEYS * D / 8 pieces of 16 bytes among 32 lanes
            const int piece = i * 32 + lane, key = base + piece / OUT, k = piece % OUT * 8;
            const bf16* const from = key < start ? values + key * kv_width
                                                 : fresh_values + (key - start) * a.stride;
            v[i] = key < last ? *reinterpret_cast<const uint4*>(from + k) : make_uint4(0, 0, 0, 0);
        }
        float s[2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = base + half * 8 + g;
            const bf16* const from =
                key < start ? keys + key * kv_width : fresh_keys + (key - start) * a.stride;
#pragma unroll
            for (int i = 0; i < READS; i++) {
                const int k = i * 32 + t4 * 8;
                const uint4 w = key < last && k < D ? *reinterpret_cast<const uint4*>(from + k)
                                                    : make_uint4(0, 0, 0, 0);
                mma(s[half], low[i].x, high[i].x, low[i].y, high[i].y, w.x, w.y);
                mma(s[half], low[i].z, high[i].z, low[i].w, high[i].w, w.z, w.w);
            }
        }
#pragma unroll
        for (int i = 0; i < OUT / 2; i++) {
            const int piece = i * 32 + lane;
            *reinterpret_cast<uint4*>(tile + piece / OUT * ROW + piece % OUT * 8) = v[i];
        }
        __syncwarp();
#pragma unroll
        for (int side = 0; side < 2; side++) {  // heads g and g + 8
            float best = top[side];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& score = s[half][side * 2 + j];
                    score = base + half * 8 + t4 * 2 + j < last ? score * scale : NOTHING;
                    best = fmaxf(best, score);
                }
            best = over_four_max(best);
            const float kept = rescale(top[side], best);
            float sum = 0.f;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& score = s[half][side * 2 + j];
                    score = widen((bf16)narrow(expf(score - best)));
                    sum += score;
                }
            whole[side] = whole[side] * kept + over_four_sum(sum);
            top[side] = best;
#pragma unroll
            for (int n = 0; n < OUT; n++) o[n][side * 2] *= kept, o[n][side * 2 + 1] *= kept;
        }
        const unsigned a0 = pair_of(s[0][0], s[0][1]), a1 = pair_of(s[0][2], s[0][3]);
        const unsigned a2 = pair_of(s[1][0], s[1][1]), a3 = pair_of(s[1][2], s[1][3]);
#pragma unroll
        for (int n = 0; n < OUT; n += 2) {
            const uint4 b = load_transposed(tile + (lane / 8 % 2 * 8 + lane % 8) * ROW + n * 8 +
                                            lane / 16 * 8);
            mma(o[n], a0, a1, a2, a3, b.x, b.y);
            mma(o[n + 1], a0, a1, a2, a3, b.z, b.w);
        }
        __syncwarp();
    }

    if (t4 == 0)
#pragma unroll
        for (int side = 0; side < 2; side++) {
            maxima[warp][g + 8 * side] = top[side];
            weights[warp][g + 8 * side] = whole[side];
        }
    __syncthreads();  // nobody reads V any more
    float* const found = reinterpret_cast<float*>(given);
#pragma unroll
    for (int n = 0; n < OUT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            found[(warp * 16 + g + i / 2 * 8) * D + n * 8 + t4 * 2 + i % 2] = o[n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * D; i += THREADS) {
        const int h = i / D;
        float best = NOTHING, sum = 0.f, value = 0.f;
        for (int w = 0; w < WARPS; w++) best = fmaxf(best, maxima[w][h]);
        for (int w = 0; w < WARPS; w++) {
            const float share = rescale(maxima[w][h], best);
            sum += share * weights[w][h];
            value += share * found[(w * 16 + h) * D + i % D];
        }
        if (splits == 1) {
            if (h < group) out[i] = (bf16)narrow(value / sum);
            continue;
        }
        a.partial[place * 16 * D + i] = value;
        if (i % D == 0) {
            a.extent[(place * 16 + h) * 2] = best;
            a.extent[(place * 16 + h) * 2 + 1] = sum;
        }
    }
    if (splits == 1) return;

    // The block that is done last puts the splits together.
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        is_last = atomicInc(&a.arrived[token * a.kv_heads + head], splits - 1) == splits - 1u;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const long long begin = place - split;
    float* const shares = reinterpret_cast<float*>(given);  // [splits, 16]
    for (int i = threadIdx.x; i < splits * 16; i += THREADS)
        shares[i] = __ldcg(a.extent + (begin * 16 + i) * 2);
    __syncthreads();
    if (threadIdx.x < 16) {
        const int h = threadIdx.x;
        float best = NOTHING, sum = 0.f;
        for (int s = 0; s < splits; s++) best = fmaxf(best, shares[s * 16 + h]);
        for (int s = 0; s < splits; s++) {
            const float share = rescale(shares[s * 16 + h], best);
            sum += share * __ldcg(a.extent + ((begin + s) * 16 + h) * 2 + 1);
            shares[s * 16 + h] = share;
        }
        for (int s = 0; s < splits; s++) shares[s * 16 + h] /= sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * D; i += THREADS) {
        float value = 0.f;
#pragma unroll 8
        for (int s = 0; s < splits; s++)
            value += shares[s * 16 + i / D] * __ldcg(a.partial + (begin + s) * 16 * D + i);
        out[i] = (bf16)narrow(value);
    }
}

#define ENTRY(D)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_##D(const Arguments a) { \
        attend<D>(a);                                                                     \
    }
ENTRY(16)
ENTRY(32)
ENTRY(64)
ENTRY(128)

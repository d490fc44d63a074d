// Grouped-query attention of a pass's tokens over their slots, split over length; writes K and V.
//
// Heads that share K and V are the 16 rows of an mma. The eight columns of K that a lane reads at once
// make the depth of two mma in another order, the same for the query.
#include "lanes.cuh"
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

__device__ __forceinline__ float over_four_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The weight that a part with maximum `own` has in a whole with maximum `all`.
__device__ __forceinline__ float rescale(float own, float all) {
    return own == NOTHING ? 0.f : __expf(own - all);
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
    const int token = blockIdx.z, length = (int)a.length, row = token / length;
    const int t = token - row * length;
    const long long kv_width = a.kv_heads * D, out_width = kv_width * group;
    const long long slot = a.slots[row], start = a.starts[row];
    const bool usable = t < a.counts[row] && slot >= 0 && slot < a.slots_held && start >= 0 &&
                        start + t < a.positions_held;
    bf16* const keys = a.keys + (slot * a.positions_held * a.kv_heads + head) * D;
    bf16* const values = a.values + (slot * a.positions_held * a.kv_heads + head) * D;
    const bf16* const fresh_keys = a.fresh_keys + row * a.length * a.stride + head * D;
    const bf16* const fresh_values = a.fresh_values + row * a.length * a.stride + head * D;

    // Whole tiles of all warps: where little is to be seen, fewer blocks have less to put together.
    constexpr int TILES = WARPS * KEYS;
    const int visible = usable ? (int)(start + t + 1) : 0;
    const int each = ((visible + splits - 1) / splits + TILES - 1) / TILES * TILES;
    const int busy = usable ? (visible + each - 1) / each : 1;
    const int first = min(split * each, visible), last = min(first + each, visible);

    // What a lane holds of a tile: of keys g and g + 8, and pieces of 16 bytes of all values. All of it
    // is asked for at once, since every load is a way to memory and back; zeros where there is no key.
    uint4 k[2][READS], v[OUT / 2];
    const auto fetch = [&](int base, bool is_fresh) {
        const long long width = is_fresh ? a.stride : kv_width, before = is_fresh ? start : 0;
        const bf16* const key_lines = (is_fresh ? fresh_keys : keys) + t4 * 8;
        const bf16* const value_lines = (is_fresh ? fresh_values : values) + lane % OUT * 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = base + half * 8 + g;
            const bf16* const from = key_lines + (key - before) * width;
            const bool is_there = key < last && (key >= start) == is_fresh;
#pragma unroll
            for (int i = 0; i < READS; i++)
                if (is_there && i * 32 + t4 * 8 < D)
                    k[half][i] = *reinterpret_cast<const uint4*>(from + i * 32);
                else if (!is_fresh)
                    k[half][i] = make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < OUT / 2; i++) {  // KEYS * D / 8 pieces among 32 lanes
            const int key = base + (i * 32 + lane) / OUT;
            if (key < last && (key >= start) == is_fresh)
                v[i] = *reinterpret_cast<const uint4*>(value_lines + (key - before) * width);
            else if (!is_fresh)
                v[i] = make_uint4(0, 0, 0, 0);
        }
    };
    fetch(first + warp * KEYS, false);  // committed long ago
    wait_for_inputs();
    let_next_start();
    bf16* const out = a.out + (long long)token * out_width + head * group * D;
    const long long place = ((long long)token * a.kv_heads + head) * splits + split;
    if (!usable && split == 0)
#pragma unroll 1
        for (int i = threadIdx.x; i < group * D; i += THREADS) out[i] = 0;
    if (!usable || split >= busy) return;

    uint4 low[READS], high[READS];
    const bf16* const query = a.query + token * a.stride + head * group * D;
#pragma unroll
    for (int i = 0; i < READS; i++) {
        const int at = i * 32 + t4 * 8;
        const bool inside = at < D;
        low[i] = inside && g < group ? *reinterpret_cast<const uint4*>(query + g * D + at)
                                     : make_uint4(0, 0, 0, 0);
        high[i] = inside && g + 8 < group
                      ? *reinterpret_cast<const uint4*>(query + (g + 8) * D + at)
                      : make_uint4(0, 0, 0, 0);
    }
    float o[OUT][4] = {};
    float top[2] = {NOTHING, NOTHING}, whole[2] = {0.f, 0.f};
    const float scale = __int_as_float((int)a.scale);
    bf16* const tile = reinterpret_cast<bf16*>(given) + warp * KEYS * ROW;

    for (int base = first + warp * KEYS; base < last; base += WARPS * KEYS) {
        if (base + KEYS > start) fetch(base, true);
        float s[2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < READS; i++) {
                const uint4& w = k[half][i];
                mma(s[half], low[i].x, high[i].x, low[i].y, high[i].y, w.x, w.y);
                mma(s[half], low[i].z, high[i].z, low[i].w, high[i].w, w.z, w.w);
            }
#pragma unroll
        for (int i = 0; i < OUT / 2; i++) {
            const int piece = i * 32 + lane;
            *reinterpret_cast<uint4*>(tile + piece / OUT * ROW + piece % OUT * 8) = v[i];
        }
        fetch(base + WARPS * KEYS, false);
        __syncwarp();
        unsigned p[2][2];
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
            for (int half = 0; half < 2; half++) {
                const float* const own = s[half] + side * 2;
                const unsigned both = narrow(__expf(own[0] - best), __expf(own[1] - best));
                sum += __uint_as_float(both << 16) + __uint_as_float(both & 0xffff0000u);
                p[half][side] = both;
            }
            whole[side] = whole[side] * kept + over_four(sum);
            top[side] = best;
#pragma unroll
            for (int n = 0; n < OUT; n++) o[n][side * 2] *= kept, o[n][side * 2 + 1] *= kept;
        }
#pragma unroll
        for (int n = 0; n < OUT; n += 2) {
            const uint4 b = load_transposed(tile + (lane / 8 % 2 * 8 + lane % 8) * ROW + n * 8 +
                                            lane / 16 * 8);
            mma(o[n], p[0][0], p[0][1], p[1][0], p[1][1], b.x, b.y);
            mma(o[n + 1], p[0][0], p[0][1], p[1][0], p[1][1], b.z, b.w);
        }
        __syncwarp();
    }

    // This pass reads the new keys and values from where they are now; the next one from the cache.
    if (split == 0)
#pragma unroll 1
        for (int i = threadIdx.x; i < D; i += THREADS) {
            keys[(start + t) * kv_width + i] = fresh_keys[t * a.stride + i];
            values[(start + t) * kv_width + i] = fresh_values[t * a.stride + i];
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
    if (threadIdx.x < 16) {
        const int h = threadIdx.x;
        float best = NOTHING, sum = 0.f, share[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) best = fmaxf(best, maxima[w][h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            share[w] = rescale(maxima[w][h], best);
            sum += share[w] * weights[w][h];
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++) maxima[w][h] = busy == 1 ? share[w] / sum : share[w];
        if (busy > 1) {
            a.extent[(place * 16 + h) * 2] = best;
            a.extent[(place * 16 + h) * 2 + 1] = sum;
        }
    }
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < 16 * D; i += THREADS) {
        const int h = i / D;
        float value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += maxima[w][h] * found[w * 16 * D + i];
        if (busy > 1)
            a.partial[place * 16 * D + i] = value;
        else if (h < group)
            out[i] = (bf16)narrow(value);
    }
    if (busy == 1) return;

    // The block that is done last puts the splits together.
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        is_last = atomicInc(&a.arrived[token * a.kv_heads + head], busy - 1) == busy - 1u;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const long long begin = place - split;
    float* const extents = reinterpret_cast<float*>(given);  // [busy, 16, 2]
    float* const shares = extents + busy * 32;             // [busy, 16]
#pragma unroll 1
    for (int i = threadIdx.x; i < busy * 32; i += THREADS)
        extents[i] = __ldcg(a.extent + begin * 32 + i);
    __syncthreads();
    if (threadIdx.x < 16) {
        const int h = threadIdx.x;
        float best = NOTHING, sum = 0.f;
#pragma unroll 1
        for (int s = 0; s < busy; s++) best = fmaxf(best, extents[(s * 16 + h) * 2]);
#pragma unroll 1
        for (int s = 0; s < busy; s++) {
            shares[s * 16 + h] = rescale(extents[(s * 16 + h) * 2], best);
            sum += shares[s * 16 + h] * extents[(s * 16 + h) * 2 + 1];
        }
#pragma unroll 1
        for (int s = 0; s < busy; s++) shares[s * 16 + h] /= sum;
    }
    __syncthreads();
    // Pieces of four numbers, all of a thread's at once: every load is a way to memory and back.
    constexpr int PIECES = (16 * D / 4 + THREADS - 1) / THREADS;
    const float4* const partial = reinterpret_cast<const float4*>(a.partial + begin * 16 * D);
    float4 sum[PIECES];
#pragma unroll
    for (int k = 0; k < PIECES; k++) sum[k] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int s = 0; s < busy; s++)
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            const int piece = k * THREADS + threadIdx.x;
            if (piece >= group * D / 4) continue;
            const float4 v = __ldcg(partial + s * 4 * D + piece);
            const float share = shares[s * 16 + piece / (D / 4)];
            sum[k].x = fmaf(share, v.x, sum[k].x), sum[k].y = fmaf(share, v.y, sum[k].y);
            sum[k].z = fmaf(share, v.z, sum[k].z), sum[k].w = fmaf(share, v.w, sum[k].w);
        }
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int piece = k * THREADS + threadIdx.x;
        if (piece >= group * D / 4) continue;
        const uint2 raw = {narrow(sum[k].x, sum[k].y), narrow(sum[k].z, sum[k].w)};
        *reinterpret_cast<uint2*>(out + piece * 4) = raw;
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

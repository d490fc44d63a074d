// x += the weighted sum of what a token's experts gave, in the order of its choice.
#include "numbers.cuh"
#include "ptx.cuh"

struct Arguments {
    bf16* x;              // [tokens, width], rows x_stride apart
    const void* pairs;    // [tokens * top_k, width]
    const int* places;    // [tokens, top_k]: pair, below zero for none
    const float* shares;  // [tokens, top_k]
    long long x_stride, width, top_k;
};

constexpr int THREADS = 256;

// grid = (tokens, pieces of 4 columns)
template <typename Pair>
__device__ __forceinline__ void combine(const Arguments& a) {
    const Pair* const pairs = static_cast<const Pair*>(a.pairs);
    const long long column = ((long long)blockIdx.y * THREADS + threadIdx.x) * 4, token = blockIdx.x;
    wait_for_inputs();
    let_next_start();
    if (column >= a.width) return;
    bf16* const x = a.x + token * a.x_stride + column;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int j = 0; j < a.top_k; j++) {
        const int pair = a.places[token * a.top_k + j];
        if (pair < 0) continue;
        const float share = a.shares[token * a.top_k + j];
        const float4 v = four(pairs + pair * a.width + column);
        sum.x = fmaf(share, v.x, sum.x), sum.y = fmaf(share, v.y, sum.y);
        sum.z = fmaf(share, v.z, sum.z), sum.w = fmaf(share, v.w, sum.w);
    }
    const float4 old = four(x);
    const uint2 raw = {narrow(old.x + sum.x) | narrow(old.y + sum.y) << 16,
                       narrow(old.z + sum.z) | narrow(old.w + sum.w) << 16};
    *reinterpret_cast<uint2*>(x) = raw;
}

extern "C" __global__ void __launch_bounds__(THREADS) combine_f32(const Arguments a) { combine<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) combine_bf16(const Arguments a) { combine<bf16>(a); }

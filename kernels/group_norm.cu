// RMSNorm over each of several equal groups of columns.
#include "lanes.cuh"
#include "numbers.cuh"
#include "ptx.cuh"

struct Arguments {
    bf16* out;          // [tokens, depth]
    const bf16* x;      // [tokens, depth], rows x_stride apart
    const bf16* norm;   // [depth]
    long long x_stride, depth, groups, eps;
};

constexpr int THREADS = 256;

// grid = (tokens, groups)
extern "C" __global__ void __launch_bounds__(THREADS) group_norm(const Arguments a) {
    __shared__ float warps[THREADS / 32];
    wait_for_inputs();
    let_next_start();
    const int width = (int)(a.depth / a.groups);
    const long long first = (long long)blockIdx.y * width, token = blockIdx.x;
    const bf16* const x = a.x + token * a.x_stride + first;
    float squares = 0.f;
    for (int k = threadIdx.x * 8; k < width; k += THREADS * 8) {
        float v[8];
        unpack(*reinterpret_cast<const uint4*>(x + k), v);
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(v[i], v[i], squares);
    }
    squares = over_warp(squares);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = squares;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) sum += warps[i];
    const float factor = rsqrtf(sum / width + __int_as_float((int)a.eps));
    for (int k = threadIdx.x * 8; k < width; k += THREADS * 8) {
        float v[8], w[8];
        unpack(*reinterpret_cast<const uint4*>(x + k), v);
        unpack(*reinterpret_cast<const uint4*>(a.norm + first + k), w);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = widen((bf16)narrow(v[i] * factor)) * w[i];
        *reinterpret_cast<uint4*>(a.out + token * a.depth + first + k) = pack(v);
    }
}

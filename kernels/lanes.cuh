// A value of every lane, summed over lanes of a warp.
#pragma once

__device__ __forceinline__ float over_warp(float x) {
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Over each group of four.
__device__ __forceinline__ float over_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// What the layers of Mamba-2 do to single numbers, and the taps of their convolution.
#pragma once

constexpr int TAPS = 4;

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(__expf(x)); }

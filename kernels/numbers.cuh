// Stored numbers as fp32: fp32 itself, or bf16 as raw 16 bits (no toolkit header needed).
#pragma once

typedef unsigned short bf16;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }

// To the nearest bf16, ties to even; NaN stays NaN.
__device__ __forceinline__ unsigned narrow(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// 16 bytes of state to and from fp32: 4 numbers of fp32, 8 of bf16.
__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[4]) {
    out[0] = __uint_as_float(raw.x);
    out[1] = __uint_as_float(raw.y);
    out[2] = __uint_as_float(raw.z);
    out[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[8]) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint4 pack(const float (&in)[4]) {
    return make_uint4(__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]),
                      __float_as_uint(in[3]));
}

__device__ __forceinline__ uint4 pack(const float (&in)[8]) {
    return make_uint4(narrow(in[0]) | narrow(in[1]) << 16, narrow(in[2]) | narrow(in[3]) << 16,
                      narrow(in[4]) | narrow(in[5]) << 16, narrow(in[6]) | narrow(in[7]) << 16);
}

// 4 neighbouring numbers of a journal as fp32.
__device__ __forceinline__ float4 four(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}

__device__ __forceinline__ float4 four(const bf16* from) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                       __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
}

// Stored numbers as fp32: fp32 itself, or bf16 as raw 16 bits (no toolkit header needed).
#pragma once
#include "ptx.cuh"

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
    return make_uint4(narrow(in[0], in[1]), narrow(in[2], in[3]), narrow(in[4], in[5]),
                      narrow(in[6], in[7]));
}

// 4 neighbouring numbers as they are stored, for loads that are not to be waited for yet.
template <typename T>
struct Quads;
template <>
struct Quads<float> {
    typedef float4 type;
};
template <>
struct Quads<bf16> {
    typedef uint2 type;
};

template <typename T>
__device__ __forceinline__ typename Quads<T>::type quad(const T* from) {
    return *reinterpret_cast<const typename Quads<T>::type*>(from);
}

// And as fp32.
__device__ __forceinline__ float4 widen(const float4& quad) { return quad; }
__device__ __forceinline__ float4 widen(const uint2& quad) {
    return make_float4(__uint_as_float(quad.x << 16), __uint_as_float(quad.x & 0xffff0000u),
                       __uint_as_float(quad.y << 16), __uint_as_float(quad.y & 0xffff0000u));
}

template <typename T>
__device__ __forceinline__ float4 four(const T* from) {
    return widen(quad(from));
}

// Stored numbers as fp32: fp32 itself, or bf16 as raw 16 bits (no toolkit header needed).
#pragma once

typedef unsigned short bf16;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }

// Two fp32 to the nearest bf16 each, ties to even; NaN becomes 0x7fff.
__device__ __forceinline__ unsigned narrow(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
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

// 4 neighbouring numbers of a journal as they are stored, and as fp32.
template <typename T>
struct Quads;
template <>
struct Quads<float> {
    using type = float4;
};
template <>
struct Quads<bf16> {
    using type = uint2;
};
template <typename T>
using Quad = typename Quads<T>::type;

template <typename T>
__device__ __forceinline__ Quad<T> quad(const T* from) {
    return __ldg(reinterpret_cast<const Quad<T>*>(from));
}

__device__ __forceinline__ void store(float* to, const float4& four) {
    *reinterpret_cast<float4*>(to) = four;
}

__device__ __forceinline__ void store(float* to, const uint2& four) {
    store(to, make_float4(__uint_as_float(four.x << 16), __uint_as_float(four.x & 0xffff0000u),
                          __uint_as_float(four.y << 16), __uint_as_float(four.y & 0xffff0000u)));
}

// N fp32 of shared memory, N a multiple of 4.
template <int N>
__device__ __forceinline__ void load(const float* from, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + i);
        out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
}

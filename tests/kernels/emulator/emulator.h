// CUDA C++ on a processor: threads of a block are fibers, run one after the other until each waits.
//
// Enough of the language for the kernels of this project. Put before the text of a .cu file; takes the
// place of ptx.cuh. Blocks run one by one, so `__shared__` may be static. A warp's instructions
// (shuffles, mma, ldmatrix) gather what its lanes bring and compute from that.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct Dim {
    unsigned x, y, z;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
inline auto min(A a, B b) -> decltype(a + b) {
    return a < b ? a : b;
}
template <class A, class B>
inline auto max(A a, B b) -> decltype(a + b) {
    return a > b ? a : b;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __threadfence() {}
template <class T>
inline T __ldcg(const T* from) {
    return *from;
}
template <class T>
inline T __ldcs(const T* from) {
    return *from;
}
template <class T>
inline void __stcs(T* to, const T& value) {
    *to = value;
}

template <class T>
inline T atomicOr(T* place, T value) {
    const T before = *place;
    *place = before | value;
    return before;
}
template <class T>
inline T atomicAdd(T* place, T value) {
    const T before = *place;
    *place = before + value;
    return before;
}
inline unsigned atomicInc(unsigned* place, unsigned most) {
    const unsigned before = *place;
    *place = before >= most ? 0 : before + 1;
    return before;
}

// ---- fibers ----

struct Copy {
    void* to;
    const void* from;
    int bytes, group;
};

struct Fiber {
    ucontext_t context;
    char* stack;
    bool done;
    Dim index;
    std::vector<Copy> copies;
    int groups;
};

struct Warp {
    alignas(16) char brought[2][32][64];  // by turns, so that a slow lane can still read
    int arrived, alive;
    long turn;
};

extern std::vector<Fiber> fibers;
extern std::vector<Warp> warps;
extern int current, alive, arrived;
extern long turn;
extern Dim threadIdx, blockIdx, gridDim, blockDim;
extern char* dynamic_shared;
void yield();

inline void __syncthreads() {
    const long mine = turn;
    if (++arrived == alive) {
        arrived = 0;
        turn++;
    } else
        while (turn == mine) yield();
}

// What every lane of the warp has brought.
inline char (*gather(const void* own, size_t size))[64] {
    Warp& warp = warps[current / 32];
    const long mine = warp.turn;
    memcpy(warp.brought[mine & 1][current % 32], own, size);
    if (++warp.arrived == warp.alive) {
        warp.arrived = 0;
        warp.turn++;
    } else
        while (warp.turn == mine) yield();
    return warp.brought[mine & 1];
}

template <class T>
inline T from_lane(const T& own, int lane) {
    T value;
    memcpy(&value, gather(&own, sizeof own)[lane & 31], sizeof value);
    return value;
}

inline void __syncwarp() { from_lane(0, 0); }
template <class T>
inline T __shfl_sync(unsigned, T own, int lane) {
    return from_lane(own, lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T own, int mask) {
    return from_lane(own, current % 32 ^ mask);
}
template <class T>
inline T __shfl_up_sync(unsigned, T own, int by) {
    const int lane = current % 32;
    return from_lane(own, lane >= by ? lane - by : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned, T own, int by) {
    const int lane = current % 32;
    return from_lane(own, lane + by < 32 ? lane + by : lane);
}

inline unsigned __reduce_max_sync(unsigned, unsigned own) {
    const auto all = gather(&own, sizeof own);
    for (int lane = 0; lane < 32; lane++) own = max(own, *reinterpret_cast<unsigned*>(all[lane]));
    return own;
}
inline unsigned __reduce_min_sync(unsigned, unsigned own) {
    const auto all = gather(&own, sizeof own);
    for (int lane = 0; lane < 32; lane++) own = min(own, *reinterpret_cast<unsigned*>(all[lane]));
    return own;
}

// ---- ptx.cuh ----

// Copies arrive when they are waited for, not earlier.
template <int BYTES>
inline void copy_near(void* to, const void* from) {
    if ((uintptr_t)from % BYTES || (uintptr_t)to % BYTES) {
        fprintf(stderr, "a copy of %d bytes from %p to %p\n", BYTES, from, to);
        abort();
    }
    fibers[current].copies.push_back({to, from, BYTES, fibers[current].groups});
}
inline void copy_async(void* to, const void* from, bool is_there) {
    alignas(16) static const char nothing[16] = {};
    copy_near<16>(to, is_there ? from : nothing);
}
inline void close_group() { fibers[current].groups++; }
template <int N>
inline void wait_for_group() {
    std::vector<Copy> later;
    for (const Copy& copy : fibers[current].copies)
        if (copy.group < fibers[current].groups - N)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            later.push_back(copy);
    fibers[current].copies = later;
}

inline float bf16_of(unsigned word, int half) {
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
}

inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1) {
    const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
    const auto all = gather(own, sizeof own);
    const int g = current % 32 / 4, t = current % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            const auto a = reinterpret_cast<const unsigned*>(all[row % 8 * 4 + k % 8 / 2]);
            const auto b = reinterpret_cast<const unsigned*>(all[column * 4 + k % 8 / 2]);
            c[i] += bf16_of(a[(row >= 8) + 2 * (k >= 8)], k % 2) * bf16_of(b[4 + (k >= 8)], k % 2);
        }
    }
}

inline uint4 load_transposed(const void* row) {
    const auto all = gather(&row, sizeof row);
    const int g = current % 32 / 4, t = current % 4;
    unsigned words[4];
    for (int tile = 0; tile < 4; tile++) {
        const uint16_t *low, *high;
        memcpy(&low, all[tile * 8 + 2 * t], sizeof low);
        memcpy(&high, all[tile * 8 + 2 * t + 1], sizeof high);
        words[tile] = low[g] | (unsigned)high[g] << 16;
    }
    return {words[0], words[1], words[2], words[3]};
}

inline void meet(int number, int threads) {
    static int here[16];
    static long rounds[16];
    const long mine = rounds[number];
    if (++here[number] == threads) {
        here[number] = 0;
        rounds[number]++;
    } else
        while (rounds[number] == mine) yield();
}

inline unsigned rounded(float x) {
    const unsigned bits = __float_as_uint(x);
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline unsigned narrow(float low, float high) {
    return (low == low ? rounded(low) : 0x7fff) | (high == high ? rounded(high) : 0x7fff) << 16;
}

inline unsigned times(unsigned a, unsigned b) {
    return rounded(bf16_of(a, 0) * bf16_of(b, 0)) | rounded(bf16_of(a, 1) * bf16_of(b, 1)) << 16;
}

inline int fresh(const int* from) { return *from; }
inline float fresh(const float* from) { return *from; }
inline void wait_for_inputs() {}
inline void let_next_start() {}

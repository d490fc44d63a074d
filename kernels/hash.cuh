// The counter-based random numbers and the hash of reference.py: splitmix64's finaliser.
#pragma once

typedef unsigned long long u64;

constexpr u64 GOLDEN = 0x9e3779b97f4a7c15ull;  // 2**64 / golden ratio

__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Of an element's bits and its index.
__device__ __forceinline__ u64 hash(u64 bits, u64 index) { return mix(mix(index * GOLDEN + 1) ^ bits); }

__device__ __forceinline__ u64 random_key(u64 seed, u64 position, int stream) {
    return mix(seed + (position * 4 + (u64)(stream + 1)) * GOLDEN);
}

// Uniform in (0, 1), never 0 or 1: the middles of 2**52 equal parts.
__device__ __forceinline__ double uniform(u64 key, u64 index) {
    const u64 drawn = mix(key + (index + 1) * GOLDEN);
    return ((double)(drawn >> 12) + 0.5) * 0x1p-52;
}

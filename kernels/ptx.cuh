// The few instructions that CUDA C++ has no name for.
#pragma once

// Copy 16 bytes to shared memory in the background, past L1, the whole 128-byte line into L2; zeros
// where there is nothing to copy.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_there) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    const int bytes = is_there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(from), "r"(bytes)
                 : "memory");
}

// Copy 4, 8 or 16 bytes in the background through L1, which serves pieces of lines to several warps.
template <int BYTES>
__device__ __forceinline__ void copy_near(void* to, const void* from) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                 :
                 : "r"(address), "l"(from), "n"(BYTES)
                 : "memory");
}

// Close a group of copies.
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void wait_for_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] by one warp, bf16 into fp32. Lane 4 g + t holds
// a: rows g, g + 8 (x columns 2t, 2t + 1), then the same rows at columns 8 further on;
// b: rows 2t, 2t + 1, then 8 further on, of column g; c: row g (columns 2t, 2t + 1), then row g + 8.
__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                    unsigned a3, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four transposed 8 x 8 tiles of 16-bit numbers; lane i gives the address of row i % 8 of tile i / 8.
__device__ __forceinline__ uint4 load_transposed(const void* row) {
    uint4 raw;
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "r"(address)
                 : "memory");
    return raw;
}

// Two fp32 to the nearest bf16 each, ties to even; NaN becomes 0x7fff.
__device__ __forceinline__ unsigned narrow(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// A barrier of some of a block's threads; `number` 1 to 15.
__device__ __forceinline__ void meet(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Two products of bf16, each rounded once.
__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
    unsigned product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

// Wait for what the kernels before this one in the stream have written (programmatic dependent
// launch); everything before the call may run while they still do, and may read what is older.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start as far as there is room for it.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A number as it is in memory, whatever this multiprocessor has read before.
__device__ __forceinline__ int fresh(const int* from) { return *(const volatile int*)from; }
__device__ __forceinline__ float fresh(const float* from) { return *(const volatile float*)from; }

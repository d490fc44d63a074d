// x W^T for few tokens and up to three matrices W at once, after a norm of x if there is one.
#include "skinny.cuh"

typedef Products Arguments;

#define ENTRY(name, N, NORM, BLOCKS)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Arguments a) { \
        multiply_all<N, NORM>(a, Quiet());                                                  \
    }
ENTRY(none_8, 1, NONE, 2)
ENTRY(none_16, 2, NONE, 2)
ENTRY(none_32, 4, NONE, 2)
ENTRY(whole_8, 1, WHOLE, 3)
ENTRY(whole_16, 2, WHOLE, 2)
ENTRY(whole_32, 4, WHOLE, 2)
ENTRY(warpwise_8, 1, WARPWISE, 2)
ENTRY(warpwise_16, 2, WARPWISE, 2)
ENTRY(warpwise_32, 4, WARPWISE, 2)
ENTRY(given_8, 1, GIVEN, 2)
ENTRY(given_16, 2, GIVEN, 2)
ENTRY(given_32, 4, GIVEN, 2)

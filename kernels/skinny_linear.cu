// x W^T for few tokens and up to three matrices W at once, after a norm of x if there is one.
#include "skinny.cuh"

typedef Products Arguments;

#define ENTRY(name, N, NORM, EARLY, BLOCKS)                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Arguments a) { \
        multiply_all<N, NORM, EARLY>(a);                                                    \
    }
ENTRY(none_8, 1, NONE, true, 2)
ENTRY(none_16, 2, NONE, true, 2)
ENTRY(none_32, 4, NONE, true, 2)
ENTRY(whole_8, 1, WHOLE, false, 3)
ENTRY(short_8, 1, WHOLE, true, 2)
ENTRY(whole_16, 2, WHOLE, false, 2)
ENTRY(whole_32, 4, WHOLE, false, 2)
ENTRY(warpwise_8, 1, WARPWISE, true, 2)
ENTRY(warpwise_16, 2, WARPWISE, false, 2)
ENTRY(warpwise_32, 4, WARPWISE, false, 2)
ENTRY(given_8, 1, GIVEN, false, 2)
ENTRY(given_16, 2, GIVEN, false, 2)
ENTRY(given_32, 4, GIVEN, false, 2)

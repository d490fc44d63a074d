// x W^T for few tokens and up to three matrices W at once, after a norm of x if there is one.
#include "skinny.cuh"

typedef Products Arguments;

// Up to 8 tokens and few rows: more steps under way, which are copied while the kernel before runs. The
// threads in the bounds keep registers few enough for a block of the next kernel beside two of these.
#define ENTRY(name, N, NORM, STAGES, LIMIT, BLOCKS)                                       \
    extern "C" __global__ void __launch_bounds__(LIMIT, BLOCKS) name(const Arguments a) { \
        multiply_all<N, NORM, STAGES>(a, Quiet());                                        \
    }
ENTRY(none_8, 1, NONE, 8, 352, 2)
ENTRY(none_16, 2, NONE, 4, THREADS, 2)
ENTRY(none_32, 4, NONE, 4, THREADS, 2)
ENTRY(whole_8, 1, WHOLE, 4, THREADS, 3)
ENTRY(whole_16, 2, WHOLE, 4, THREADS, 2)
ENTRY(whole_32, 4, WHOLE, 4, THREADS, 2)
ENTRY(warpwise_8, 1, WARPWISE, 8, 352, 2)
ENTRY(warpwise_16, 2, WARPWISE, 4, THREADS, 2)
ENTRY(warpwise_32, 4, WARPWISE, 4, THREADS, 2)
ENTRY(given_8, 1, GIVEN, 4, THREADS, 2)
ENTRY(given_16, 2, GIVEN, 4, THREADS, 2)
ENTRY(given_32, 4, GIVEN, 4, THREADS, 2)

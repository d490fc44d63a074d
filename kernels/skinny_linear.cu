// x W^T for few tokens and up to three matrices W at once, after a norm of x if there is one.
#include "tile_product.cuh"

constexpr int PARTS = 3;
enum Kind { STORE, STORE_F32, RELU2, ADD };
enum Norm { NONE, WHOLE, GROUPS };  // of x; for groups the sums of squares are given

struct Arguments {
    const bf16* x;      // [tokens, depth], rows x_stride apart
    const bf16* norm;   // [depth]
    const float* sums;  // [tokens, groups, summands] of squares
    const bf16* weight[PARTS];
    void* out[PARTS];
    long long weight_stride[PARTS], rows[PARTS], out_stride[PARTS], kind[PARTS];
    long long x_stride, tokens, depth, groups, summands, eps;
};

// Tokens times the norm's weight and the factor of their group of columns.
template <int N>
struct Grouped {
    const bf16* norm;
    const float* factors;  // [N * 8, groups]
    int groups, width;     // columns of a group

    __device__ __forceinline__ uint4 norm_at(int k, bool inside) const {
        return load_norm(norm, k, inside);
    }

    __device__ __forceinline__ uint4 operator()(int n, const uint4& v, const uint4& weight,
                                                int k) const {
        // Behind the last column v is zero and any factor will do.
        const int group = min(k / width, groups - 1);
        const float factor = factors[(n * 8 + threadIdx.x % 32 / 4) * groups + group];
        float x[8], w[8];
        unpack(v, x);
        unpack(weight, w);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = x[i] * factor * w[i];
        return pack(x);
    }
};

__device__ __forceinline__ void write(const Arguments& a, int part, long long token, long long row,
                                      float value) {
    const long long place = token * a.out_stride[part] + row;
    bf16* const out = static_cast<bf16*>(a.out[part]);
    switch (a.kind[part]) {
        case STORE: out[place] = (bf16)narrow(value); break;
        case STORE_F32: static_cast<float*>(a.out[part])[place] = value; break;
        case RELU2: out[place] = (bf16)narrow(relu_squared(widen((bf16)narrow(value)))); break;
        case ADD: out[place] = (bf16)narrow(widen(out[place]) + value); break;
    }
}

// grid = (tiles of all matrices); shared: the ring, then factors [N * 8, groups] where sums are given
template <int N, Norm NORM>
__device__ __forceinline__ void product(const Arguments& a) {
    __shared__ Gathered<N> gathered;
    extern __shared__ uint4 ring[];
    float* const given = reinterpret_cast<float*>(ring + RING);
    long long tile = blockIdx.x;
    int part = 0;
    while (part < PARTS - 1 && tile >= (a.rows[part] + TILE - 1) / TILE)
        tile -= (a.rows[part++] + TILE - 1) / TILE;
    const int depth = (int)a.depth, steps = (depth + STEP - 1) / STEP;
    const int lane = threadIdx.x % 32;
    int begin, end;
    share_of(threadIdx.x / 32, steps, begin, end);
    const Lines lines =
        lines_of(a.weight[part], a.weight_stride[part], a.rows[part], tile * TILE);
    const float eps = __int_as_float((int)a.eps);

    const Ring weights(ring);
    weights.start(lines, begin, end, depth);
    wait_for_inputs();
    let_next_start();

    for (long long first = 0; first < a.tokens; first += 8 * N) {
        if (first) weights.start(lines, begin, end, depth);
        const bf16* x[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const long long token = first + n * 8 + lane / 4;
            x[n] = token < a.tokens ? a.x + token * a.x_stride : nullptr;
        }
        float sum[N][4] = {};
        if constexpr (NORM == NONE) {
            Plain plain;
            weights.run(sum, lines, x, begin, end, depth, plain);
        } else if constexpr (NORM == WHOLE) {
            Normed<N> normed(a.norm);
            weights.run(sum, lines, x, begin, end, depth, normed);
            gathered.put_squares(normed.squares);
        } else {
            const int groups = (int)a.groups, summands = (int)a.summands;
            for (int i = threadIdx.x; i < N * 8 * groups; i += THREADS) {
                const long long token = min(first + i / groups, a.tokens - 1);
                const float* const own = a.sums + (token * groups + i % groups) * summands;
                float squares = 0.f;
                for (int j = 0; j < summands; j++) squares += own[j];
                given[i] = rsqrtf(squares * groups / depth + eps);
            }
            __syncthreads();
            Grouped<N> grouped{a.norm, given, groups, depth / groups};
            weights.run(sum, lines, x, begin, end, depth, grouped);
        }
        gathered.put(sum);
        __syncthreads();
        if (NORM == WHOLE) {
            gathered.make_factors(depth, eps);
            __syncthreads();
        }
        for (int i = threadIdx.x; i < N * 8 * TILE; i += THREADS) {
            const int row = i % TILE, token = i / TILE;
            if (first + token >= a.tokens || tile * TILE + row >= a.rows[part]) continue;
            const float factor = NORM == WHOLE ? gathered.factors[token] : 1.f;
            write(a, part, first + token, tile * TILE + row, gathered.at(row, token) * factor);
        }
        __syncthreads();
    }
}

#define ENTRY(name, N, NORM)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, N == 1 && NORM != GROUPS ? 3 : 2)                \
        name(const Arguments a) {                                                       \
        product<N, NORM>(a);                                                            \
    }
ENTRY(plain_8, 1, NONE)
ENTRY(plain_16, 2, NONE)
ENTRY(plain_32, 4, NONE)
ENTRY(whole_8, 1, WHOLE)
ENTRY(whole_16, 2, WHOLE)
ENTRY(whole_32, 4, WHOLE)
ENTRY(groups_8, 1, GROUPS)
ENTRY(groups_16, 2, GROUPS)
ENTRY(groups_32, 4, GROUPS)

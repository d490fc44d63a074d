// Products with the weights of the chosen experts, for many (token, expert) pairs: relu(up(x)) ** 2 into
// bf16, or down(inner) into fp32.
//
// A block has an equal share of the rows of all items, item after item, and each of its warps a share of
// every item's. The pairs of neighbouring items are neighbours: as many of them as there is room for are
// in shared memory, so that a warp that multiplies asks memory for nothing but weights.
#include "tile_stream.cuh"

struct Arguments {
    const bf16* x;        // up: [tokens, depth], down: [pairs, depth]; rows x_stride apart
    const bf16* weights;  // [experts, width, depth], strides apart
    void* out;            // [pairs, width]
    const int* items;     // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    long long x_stride, depth, width, expert_stride, row_stride, items_held;
    long long room, line;  // pairs in shared memory, and 16 bytes of each
};

constexpr int CREW = 2 * WARPS;  // of a block

// Rows [row, row + count) of an item.
struct Rows {
    int item, row, count;

    // The next tile of them.
    __device__ __forceinline__ Tile next() {
        const int height = first_height(count);
        row += height, count -= height;
        return {item, row - height, height};
    }
};

// The rows of all items that are a block's, item after item.
struct Share {
    int item, row, left, width;

    __device__ __forceinline__ Share(int items, int width) : width(width) {
        const long long rows = (long long)items * width;
        const int first = (int)(rows * blockIdx.x / gridDim.x);
        left = (int)(rows * (blockIdx.x + 1) / gridDim.x) - first;
        item = first / width, row = first - item * width;
    }

    // The item of the last row, where there are any.
    __device__ __forceinline__ int last() const { return item + (row + left - 1) / width; }

    // Of the next item; none at the end.
    __device__ __forceinline__ Rows next() {
        const Rows rows = {item, row, min(left, width - row)};
        left -= rows.count, item++, row = 0;
        return rows;
    }
};

// Of a block's rows those of this warp.
__device__ __forceinline__ Rows own(const Rows& all) {
    const int warp = threadIdx.x / 32, first = all.count * warp / CREW;
    return {all.item, all.row + first, all.count * (warp + 1) / CREW - first};
}

// Start to copy pairs [first, first + count) to shared memory, zeros behind their last column.
template <bool UP>
__device__ __forceinline__ void bring(const Arguments& a, uint4* shared, int first, int count) {
    const int line = (int)a.line, depth = (int)a.depth;
#pragma unroll 1
    for (int pair = threadIdx.x / 32; pair < count; pair += CREW) {
        const bf16* const x = a.x + (UP ? a.pair_token[first + pair] : first + pair) * a.x_stride;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < line; i += 32)
            copy_async(shared + pair * line + i, x + i * 8, i * 8 < depth);
    }
    close_group();
}

// A tile with 8 * N pairs, `x` being this lane's piece of the first.
template <int N, typename Following>
__device__ __forceinline__ void multiply(float (&sum)[4][4], Ring<STAGES>& ring, const uint4* x, int line,
                                         int batches, Following following) {
#pragma unroll 1
    for (int batch = 0; batch < batches; batch++, x += STAGES * 4) {
        const Batch next = following();
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            wait_for_group<STAGES - 1>();
            const uint4 low = ring.own[i * 64], high = ring.own[i * 64 + 32];
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint4 u = x[n * 8 * line + i * 4];
                mma(sum[n], low.x, high.x, low.y, high.y, u.x, u.y);
                mma(sum[n], low.z, high.z, low.w, high.w, u.z, u.w);
            }
            ring.issue(ring.own, next, i);
        }
    }
}

// grid = (blocks that share all rows); shared: the ring, then [room, line] pieces of pairs
template <bool UP>
__device__ __forceinline__ void product(const Arguments& a) {
    extern __shared__ uint4 shared[];
    uint4* const pairs_here = shared + CREW * STAGES * 64;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int depth = (int)a.depth, width = (int)a.width, held = (int)a.items_held;
    const int line = (int)a.line, room = (int)a.room;
    const int batches = (depth + SPAN<1> - 1) / SPAN<1>;
    if (UP) wait_for_inputs();  // the lists among them, which are older than down's
    const int items = a.counts[0];
    Share share(items, width), coming_share = share;
    Rows coming_rows = {0, 0, 0};
    const bf16 *low = nullptr, *high = nullptr;
    int height = 1, next = batches;
    const auto following = [&]() -> Batch {
        if (++next >= batches && height) {
            while (!coming_rows.count && coming_share.left) coming_rows = own(coming_share.next());
            const Tile tile = coming_rows.next();
            height = tile.height;
            if (height) {
                const bf16* const first = a.weights + (long long)a.items[tile.unit] * a.expert_stride +
                                          (long long)tile.row * a.row_stride;
                low = first + (long long)min(g, height - 1) * a.row_stride;
                high = first + (long long)min(g + 8, height - 1) * a.row_stride;
            }
            next = 0;
        }
        const int k = own_column(next * SPAN<1>);
        return {low + k, high + k, height ? depth - k : 0};
    };
    Ring<STAGES> ring(shared);
    int window = -room, end = 0;  // the first pair in shared memory, and behind the block's last one
    if (share.left) {
        const int last = share.last();
        end = a.items[held + last] + a.items[2 * held + last];
        if (UP) {  // ahead of the weights, behind which they would come late
            window = a.items[held + share.item];
            bring<UP>(a, pairs_here, window, min(room, end - window));
        }
    }
    ring.template fill<1>(following);
    if (UP)
        wait_for_group<STAGES>();
    else
        wait_for_inputs();
    __syncthreads();
    let_next_start();

    for (Rows rows = share.next(); rows.count; rows = share.next()) {
        const int first = a.items[held + rows.item], pairs = a.items[2 * held + rows.item];
        if (first + (pairs + 7) / 8 * 8 > window + room) {
            __syncthreads();
            window = first;
            bring<UP>(a, pairs_here, window, min(room, end - window));
            wait_for_group<0>();
            __syncthreads();
        }
        const uint4* const x = pairs_here + (first - window + g) * line + t;
        Rows mine = own(rows);
        for (Tile tile = mine.next(); tile.height; tile = mine.next()) {
            float sum[4][4] = {};
            if (pairs <= 8)
                multiply<1>(sum, ring, x, line, batches, following);
            else if (pairs <= 16)
                multiply<2>(sum, ring, x, line, batches, following);
            else if (pairs <= 24)
                multiply<3>(sum, ring, x, line, batches, following);
            else
                multiply<4>(sum, ring, x, line, batches, following);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int pair = n * 8 + 2 * t + i % 2, row = g + i / 2 * 8;
                    if (pair >= pairs || row >= tile.height) continue;
                    const long long to = (long long)(first + pair) * width + tile.row + row;
                    if (UP)
                        static_cast<bf16*>(a.out)[to] = activated(sum[n][i]);
                    else
                        static_cast<float*>(a.out)[to] = sum[n][i];
                }
        }
    }
}

extern "C" __global__ void __launch_bounds__(2 * THREADS, 1) up(const Arguments a) { product<true>(a); }
extern "C" __global__ void __launch_bounds__(2 * THREADS, 1) down(const Arguments a) { product<false>(a); }

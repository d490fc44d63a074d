// x += sum over a token's experts of weight * down(inner), and down(inner) of the shared expert.
//
// A block owns a share of the channels of the result for all tokens and goes through every item of
// choose_experts: each weight is read once, and nothing is added up through memory. Its warps take
// equal shares of all steps, whatever expert these belong to.
#include "tile_stream.cuh"

struct Arguments {
    bf16* x;                   // [tokens, hidden], rows x_stride apart
    const bf16* inner;         // [pairs, width]
    const bf16* down;          // [experts, hidden, width], strides apart
    const bf16* shared_inner;  // [tokens, shared width], rows shared_input apart
    const bf16* shared_down;   // [hidden, shared width], rows shared_stride apart
    const int* items;          // [3, items held]: expert, first pair, pairs
    const int* counts;
    const int* pair_token;
    const float* pair_weight;
    long long x_stride, tokens, hidden, width, expert_stride, row_stride;
    long long shared_width, shared_stride, shared_input, items_held, share, rest;
};

// A run of batches of one item, or of up to 8 tokens of the shared expert.
struct Piece {
    bool is_routed;
    int item, begin, end;
};

// All batches of a tile, those of the items and then those of the shared expert, of which one warp has
// [first, last).
struct Plan {
    int items, routed, shared, first, last;  // batches of an item, and of the shared expert

    __device__ __forceinline__ static Plan of(const Arguments& a, int items, int warp) {
        const int routed = ((int)a.width + SPAN<1> - 1) / SPAN<1>;
        const int shared = ((int)a.shared_width + SPAN<1> - 1) / SPAN<1>;
        const int total = items * routed + ((int)a.tokens + 7) / 8 * shared;
        return {items, routed, shared, total * warp / WARPS, total * (warp + 1) / WARPS};
    }

    __device__ __forceinline__ Piece start() const {
        const bool is_routed = first < items * routed;
        const int own = is_routed ? first : first - items * routed, each = is_routed ? routed : shared;
        const int item = each ? own / each : 0, begin = own - item * each;
        return {is_routed, item, begin, min(each, begin + last - first)};
    }

    // The piece behind another one, which begins with batch `position` of all.
    __device__ __forceinline__ Piece after(const Piece& piece, int position) const {
        const bool is_routed = piece.is_routed && piece.item + 1 < items;
        const int item = piece.is_routed == is_routed ? piece.item + 1 : 0;
        return {is_routed, item, 0, min(is_routed ? routed : shared, last - position)};
    }
};

// grid = (blocks that share the channels); shared: the ring, then sums [WARPS, tokens, TILE] fp32
constexpr int SLOTS = 2 * STAGES;  // nothing else is read, so nothing waits behind more of them

extern "C" __global__ void __launch_bounds__(THREADS, 2) down(const Arguments a) {
    extern __shared__ uint4 shared[];
    float* const sums = reinterpret_cast<float*>(shared + Ring<SLOTS>::PIECES);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int tokens = (int)a.tokens;
    const Team team(3);
    float* const own = sums + warp * tokens * TILE;
    // Written by the kernel before the one before, so there already; not what L1 has of it.
    const Plan plan = Plan::of(a, fresh(a.counts), warp);
    const Piece start = plan.start();

    const auto column = [](int batch) { return own_column(batch * SPAN<1>); };
    Ring<SLOTS> ring(shared);
    Walk walk(team, (int)a.share, (int)a.rest, (int)a.hidden), ahead = walk;
    Tile coming = ahead.next();
    Piece piece = {false, 0, 0, 0};
    const bf16 *low = nullptr, *high = nullptr;
    int position = plan.first, end = 0, next = 0;  // columns end with `end`
    const auto following = [&]() -> Batch {
        if (++next >= piece.end) {
            position += piece.end - piece.begin;
            if (position >= plan.last) coming = ahead.next(), position = plan.first;
            const Piece before = piece;
            piece = {false, 0, 0, 0}, end = 0;
            if (coming.height && plan.first < plan.last) {
                piece = position == plan.first ? start : plan.after(before, position);
                const long long stride = piece.is_routed ? a.row_stride : a.shared_stride;
                const bf16* const first =
                    (piece.is_routed ? a.down + fresh(a.items + piece.item) * a.expert_stride
                                     : a.shared_down) +
                    coming.row * stride;
                low = first + min(g, coming.height - 1) * stride;
                high = first + min(g + 8, coming.height - 1) * stride;
                end = (int)(piece.is_routed ? a.width : a.shared_width);
            }
            next = piece.begin;
        }
        const int k = column(next);
        return {low + k, high + k, end - k};
    };
    ring.template fill<1>(following);
    wait_for_inputs();
    let_next_start();

    for (Tile tile = walk.next(); tile.height; tile = walk.next()) {
        for (int i = lane; i < tokens * TILE; i += 32) own[i] = 0.f;
        __syncwarp();
        Piece now = start;
        for (int at = plan.first; at < plan.last;) {
            if (at > plan.first) now = plan.after(now, at);
            const int depth = (int)(now.is_routed ? a.width : a.shared_width);
            const long long first = now.is_routed ? a.items[a.items_held + now.item] : now.item * 8;
            const int count =
                now.is_routed ? a.items[2 * a.items_held + now.item] : min(8, tokens - (int)first);
            const bf16* const source = now.is_routed ? a.inner : a.shared_inner;
            const long long stride = now.is_routed ? a.width : a.shared_input;
            const bf16* const x[1] = {g < count ? source + (first + g) * stride : nullptr};
            float sum[1][4] = {};
            Plain plain;
            multiply(sum, ring, x, now.begin, now.end, depth, plain, column, following);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int pair = lane % 4 * 2 + i;
                if (pair >= count) continue;
                const int token = now.is_routed ? a.pair_token[first + pair] : (int)first + pair;
                const float weight = now.is_routed ? a.pair_weight[first + pair] : 1.f;
                own[token * TILE + g] += sum[0][i] * weight;
                own[token * TILE + g + 8] += sum[0][i + 2] * weight;
            }
            __syncwarp();
            at += now.end - now.begin;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * TILE; i += THREADS) {
            const int token = i / TILE, row = i % TILE;
            if (row >= tile.height) continue;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[w * tokens * TILE + i];
            bf16* const out = a.x + token * a.x_stride + tile.row + row;
            *out = (bf16)narrow(widen(*out) + sum);
        }
        __syncthreads();
    }
}

// Runs a kernel block by block. Put behind the text of a .cu file, whose `Arguments` it needs.

std::vector<Fiber> fibers;
std::vector<Warp> warps;
int current, alive, arrived;
long turn;
Dim threadIdx, blockIdx, gridDim, blockDim;
char* dynamic_shared;

static ucontext_t scheduler;
static void (*kernel)(const Arguments);
static const Arguments* arguments;

constexpr size_t STACK = 1 << 16;

void yield() { swapcontext(&fibers[current].context, &scheduler); }

static void run_thread() {
    kernel(*arguments);
    fibers[current].done = true;
    // Barriers wait for those that are left.
    if (--alive && arrived == alive) arrived = 0, turn++;
    Warp& warp = warps[current / 32];
    if (--warp.alive && warp.arrived == warp.alive) warp.arrived = 0, warp.turn++;
    yield();
}

static void run_block(unsigned threads, size_t shared) {
    alive = (int)threads;
    arrived = 0;
    memset(dynamic_shared, 0xff, shared);  // NaN
    for (Warp& warp : warps) warp.arrived = warp.alive = 0;
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        warps[i / 32].alive++;
        fiber.done = false;
        fiber.copies.clear();
        fiber.groups = 0;
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_thread, 0);
    }
    // Every other block from the last thread to the first: a barrier that is missing shows in one of them.
    const bool backwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2;
    while (alive)
        for (unsigned turn = 0; turn < threads; turn++) {
            const unsigned i = backwards ? threads - 1 - turn : turn;
            if (fibers[i].done) continue;
            current = (int)i;
            threadIdx = fibers[i].index;
            swapcontext(&scheduler, &fibers[i].context);
        }
}

extern "C" void launch(void* entry, const unsigned* grid, const unsigned* block, size_t shared,
                       const void* values) {
    kernel = reinterpret_cast<void (*)(const Arguments)>(entry);
    arguments = static_cast<const Arguments*>(values);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const unsigned threads = block[0] * block[1] * block[2];
    dynamic_shared = static_cast<char*>(aligned_alloc(128, shared / 128 * 128 + 128));
    fibers.resize(threads);
    warps.resize((threads + 31) / 32);
    for (Fiber& fiber : fibers) fiber.stack = static_cast<char*>(malloc(STACK));
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) run_block(threads, shared);
    for (Fiber& fiber : fibers) free(fiber.stack);
    free(dynamic_shared);
}

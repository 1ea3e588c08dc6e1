// The threads of cuda_on_host.h, and what csrc/cuda_device.cu says where there is a GPU.
#include "cuda_on_host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

Index threadIdx, blockIdx;

namespace on_host {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;

enum class At { kReady, kWarpBarrier, kBlockBarrier, kDone };

// setjmp is several times as fast as swapcontext, which asks the system about signals
struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start;
    jmp_buf here;
    bool begun = false;
    At at;
    float lane;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
unsigned count;
const std::function<void()>* body;
// of blocks, of warps and of lanes; 0: in order, 1: from the last to the first, else shuffled by this seed
unsigned order_of_threads;

long launches = 0, launch_that_fails = -1;

Fiber& current() { return fibers[threadIdx.x]; }

void stop(At at) {
    Fiber& fiber = current();
    fiber.at = at;
    if (!setjmp(fiber.here)) longjmp(scheduler, 1);
}

// a fiber goes on with the next block: to start one costs more than what it does
void enter() {
    for (;;) {
        (*body)();
        stop(At::kDone);
    }
}

void go_on(unsigned i) {
    threadIdx.x = i;
    Fiber& fiber = fibers[i];
    fiber.at = At::kReady;
    if (setjmp(scheduler)) return;
    if (fiber.begun) longjmp(fiber.here, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    setcontext(&fiber.start);
}

bool all(unsigned first, unsigned last, At at) {
    return std::all_of(fibers.begin() + first, fibers.begin() + last,
                       [at](const Fiber& fiber) { return fiber.at == at; });
}

std::vector<unsigned> order(unsigned n, unsigned salt) {
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    if (order_of_threads == 1) std::reverse(order.begin(), order.end());
    if (order_of_threads > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_of_threads + salt));
    return order;
}

void release(unsigned first, unsigned last) {
    for (unsigned i = first; i < last; ++i) fibers[i].at = At::kReady;
}

// until all of the warp are done or wait for the block: as far ahead of the others as it can get
void run_warp(unsigned first, const std::vector<unsigned>& lanes) {
    for (;;) {
        for (const unsigned lane : lanes)
            if (fibers[first + lane].at == At::kReady) go_on(first + lane);
        if (!all(first, first + kWarp, At::kWarpBarrier)) return;
        release(first, first + kWarp);
    }
}

void run_block(unsigned salt) {
    const std::vector<unsigned> warps = order(count / kWarp, salt), lanes = order(kWarp, salt);
    release(0, count);
    for (;;) {
        for (const unsigned warp : warps) run_warp(warp * kWarp, lanes);
        if (all(0, count, At::kDone)) return;
        // a GPU would hang
        if (!all(0, count, At::kBlockBarrier))
            throw std::logic_error("a barrier is not reached by all threads");
        release(0, count);
    }
}

}  // namespace

void block_barrier() { stop(At::kBlockBarrier); }
void warp_barrier() { stop(At::kWarpBarrier); }

float from_lane(float x, int away) {
    const unsigned i = threadIdx.x, lane = i % kWarp;
    current().lane = x;
    warp_barrier();
    const float y = lane + unsigned(away) < kWarp ? fibers[i + unsigned(away)].lane : x;
    warp_barrier();
    return y;
}

const char* run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    if (launches++ == launch_that_fails) return "this launch is to fail";
    const char* const order_asked_for = std::getenv("CUDA_ON_HOST_ORDER");
    order_of_threads = order_asked_for ? unsigned(std::atoi(order_asked_for)) : 0;
    count = threads;
    body = &kernel;
    while (fibers.size() < threads) fibers.emplace_back();
    for (const unsigned i : order(blocks, 0)) {
        blockIdx.x = i;
        run_block(i);
    }
    return nullptr;
}

}  // namespace on_host

// for the tests, which find them in the module by ctypes
#define FUSEDLR_EXPORT extern "C" __attribute__((visibility("default")))
FUSEDLR_EXPORT long on_host_launches() { return on_host::launches; }
FUSEDLR_EXPORT void on_host_fail_after(long more) { on_host::launch_that_fails = on_host::launches + more; }

namespace fusedlr {

extern const char* const device_type;
extern const int toolkit;
const char* const device_type = "cpu";
const int toolkit = 0;

int driver() { return 0; }

int capability(int, std::string& error) {
    error = "the kernels were compiled for the host";
    return 0;
}

}  // namespace fusedlr

// CUDA in plain C++, for machines without a GPU: included before csrc/cuda.cu, it makes its kernels run on
// the host, a block at a time and a thread at a time. Threads are fibers that only stop at barriers, and
// warps get ahead of each other as far as these let them, in an order that can be chosen: what lacks a
// barrier comes out wrong in one of them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};
extern Index threadIdx, blockIdx;

using std::isfinite;
using std::isinf;
using std::sqrt;

namespace on_host {

// all threads of the block, or those of one warp, come here before any goes on
void block_barrier();
void warp_barrier();
// x of the thread `away` lanes up in the same warp
float from_lane(float x, int away);
// all blocks, one after another; what is wrong if this launch is to fail
const char* run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

}  // namespace on_host

inline void __syncthreads() { on_host::block_barrier(); }
inline void __threadfence() {}
inline float __shfl_down_sync(unsigned, float x, int away) { return on_host::from_lane(x, away); }
inline int32_t atomicAdd(int32_t* to, int32_t x) {
    const int32_t before = *to;
    *to += x;
    return before;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}

#define __builtin_assume(unused) static_cast<void>(0)

template <class L>
const char* load_kernel(void (*)(L)) {
    return nullptr;
}

// what takes the place of a launch
template <class L>
const char* launch_kernel(void (*kernel)(L), const L& launch, unsigned blocks, unsigned threads, void*) {
    return on_host::run(blocks, threads, [&] { kernel(launch); });
}

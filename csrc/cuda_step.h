// One step on a GPU in one or two launches: what cuda_module.cpp needs of cuda.cu, which is compiled once per
// type of the parameters. No CUDA in here.
#pragma once

#include <string>

#include "gpu_tables.h"
#include "types.h"

namespace fusedlr {

// Addresses on the device, and counts, of one launch: see the kernels in cuda.cu.
struct Step {
    const TensorRow* tensors;
    const ChunkRow* chunks;
    const GroupInts* group_ints;      // then PhaseInts
    const GroupFloats* group_floats;  // then PhaseFloats, then tables
    int64_t* counters;                // (4, groups): k, skipped, skips_in_row, stale
    float* used;                      // (3, groups): lr, grad_norm, coef
    float* norms;                     // (groups,), then a partial sum per slot
    int32_t* tickets;                 // of the norm launches, of the step launches
    const float* grad_scale;
    const float* found_inf;
    const int32_t* alive;  // the generation of the tensors' layout
    int32_t now;           // the generation this launch is made for
    int32_t programs;      // chunks of all launches of the same kernel in this step
    int32_t groups, phases, count;
    int32_t first;  // row of this launch's first chunk
    // on the device, where there are more gradients than a launch can carry
    const uint64_t* gradients;
};

// null, or what CUDA says is wrong
struct Launches {
    // gradients: addresses in the order of the tensors, null where Step::gradients has them
    const char* (*norm)(const Step& step, unsigned blocks, const uintptr_t* gradients, void* stream);
    const char* (*update)(const Step& step, unsigned blocks, Type moments, bool amsgrad,
                          const uintptr_t* gradients, void* stream);
    // has the code of both loaded for these moments: CUDA loads a kernel when it is first launched, which it
    // cannot do while a graph is captured
    const char* (*load)(Type moments);
    // the most that a launch can carry
    size_t most_gradients;
};

namespace f32 {
extern const Launches launches;
}
namespace bf16 {
extern const Launches launches;
}
namespace f16 {
extern const Launches launches;
}

// where the kernels run: "cuda", or "cpu" where they were compiled for the host by the tests
extern const char* const device_type;
// what the kernels were compiled by, 13000 for CUDA 13.0, and the newest that the driver knows; 0 without one
extern const int toolkit;
int driver();
// 90 for compute capability 9.0; or what CUDA says is wrong
int capability(int device, std::string& error);

}  // namespace fusedlr

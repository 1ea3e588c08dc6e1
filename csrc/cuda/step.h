// One step on a GPU in one or two launches: what module.cpp needs of step.cu, which is compiled once per type
// of the parameters. No CUDA in here.
#pragma once

#include <string>

#include "columns.h"
#include "../types.h"

namespace fusedlr {

// Addresses on the device, and counts, of one launch: see the kernels in step.cu.
struct Step {
    const TensorRow* tensors;
    const ChunkRow* chunks;
    const GroupInts* group_ints;      // then ScopeInts, then PhaseInts
    const GroupFloats* group_floats;  // then ScopeFloats, then PhaseFloats, then tables
    const float* rates;               // (groups,): rates that are given as numbers
    int64_t* counts;                  // (4, groups): k, skipped, skips_in_row, stale
    float* used;                      // (3, groups): lr, grad_norm, coef
    float* squares;                   // (scopes,): sums of squares of the unscaled gradients
    float* partials;                  // the sum of squares of every chunk, by slot
    int32_t* tickets;                 // of the norm launches, of the step launches
    const int32_t* generation;        // of the tensors and tables, as it is now
    // what every step is given anew; gradients are null where the launch carries them
    const uint64_t* gradients;
    const int32_t* active;  // (scopes,): whether the scope makes this step
    const float* grad_scale;
    const float* found_inf;
    int32_t made_for;  // the generation that this launch is made for
    int32_t programs;  // chunks of all launches of the same kernel in this step
    int32_t groups, scopes, phases, rows;
    int32_t first;         // row of this launch's first chunk
    int32_t some_missing;  // whether the gradient of a row may be missing
};

// Launches of one type of parameters. They return null, or what CUDA says is wrong.
struct Launches {
    // the most gradients that a launch can carry
    size_t most_gradients;
    // gradients: addresses in the order of the rows, null where Step::gradients has them
    const char* (*norm)(const Step& step, unsigned blocks, const uintptr_t* gradients, void* stream);
    const char* (*update)(const Step& step, unsigned blocks, Type moments, bool amsgrad,
                          const uintptr_t* gradients, void* stream);
    // has the code of both loaded for these moments: CUDA loads a kernel when it is first launched, which it
    // cannot do while a graph is captured
    const char* (*load)(Type moments);
};

namespace f32 {
extern const Launches few, many;
}
namespace bf16 {
extern const Launches few, many;
}
namespace f16 {
extern const Launches few, many;
}

// where the kernels run: "cuda", or "cpu" where tests put a machine in the place of CUDA's runtime
extern const char* const device_type;
// what the kernels were compiled by, 13000 for CUDA 13.0, and the newest that the driver knows; 0 without one
extern const int toolkit;
int driver();
// 90 for compute capability 9.0; or what CUDA says is wrong
int capability(int device, std::string& error);

}  // namespace fusedlr

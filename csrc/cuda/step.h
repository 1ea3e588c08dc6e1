// What the kernels of step.cu are launched with; module.cpp fills it in. No CUDA in here.
#pragma once

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
    int64_t* counts;                  // (kCounts, groups)
    float* used;                      // (kUsed, groups)
    float* squares;                   // (scopes,): sums of squares of the unscaled gradients
    float* partials;                  // the sum of squares of every chunk, by slot
    int32_t* tickets;                 // of the norm launches, of the step launches
    const int32_t* generation;        // of the tensors and tables, as it is now
    const RingInts* ring;             // where the step is recorded, by kernels that record
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

// The parameters of a launch: the fewer bytes, the sooner it starts. Up to 4 KB go through any driver's fast
// path; 32,764 bytes are the most that compute capability 7.0 takes, from CUDA 12.1 on.
template <int N>
struct Launch {
    Step step;
    uint64_t gradients[N];  // addresses in the order of the rows, 0 for none; unused where Step has them
};
constexpr int kFew = (4096 - sizeof(Step)) / 8;
constexpr int kMany = (32764 - sizeof(Step)) / 8;

constexpr int kThreads = 256;  // of a block

}  // namespace fusedlr

// What step.cpp needs of kernel.cpp, which is compiled once per instruction set.
#pragma once

#include "../adamw.h"
#include "../types.h"
#include "columns.h"

namespace fusedlr {

// n elements of one tensor. The gradient is of the parameter's type; where the parameter does not have a
// tensor of the state, its address means nothing.
struct Span {
    char *p, *g, *state[kStates];
    int64_t n;
};

using SumOfSquares = double (*)(const Span& span, double factor);
using Finite = bool (*)(const Span& span);

// sums of squares, as columns.SUMS has them
struct Sums {
    double of[kSums];

    void add(const Sums& other) {
        for (int i = 0; i < kSums; ++i) of[i] += other.of[i];
    }
};

// adds the squares of changes, and of what was before, to `sums`, where the function records
using Update = void (*)(const Span& span, const Scalars<double>& scalars, Sums* sums);

struct Kernel {
    const char* name;
    // the function that sums the squares of factor * g: squares and short sums are fp32 (fp64 for fp64
    // tensors), with the same bits on every instruction set
    SumOfSquares (*sum_of_squares)(Type param);
    // the function that updates a tensor, with or without a maximum of the second moments, and a 16-bit one
    // with or without the rest of its fp32 value; what it does is recorded or not
    Update (*update)(Type param, Type state, bool amsgrad, bool master, bool record);
    // the function that looks whether all gradients are finite
    Finite (*finite)(Type param);
};

namespace baseline {
extern const Kernel kernel;
}
#ifdef FUSEDLR_X86
namespace avx2 {
extern const Kernel kernel;
}
namespace avx512 {
extern const Kernel kernel;
}
#endif

}  // namespace fusedlr

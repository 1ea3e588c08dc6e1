// What cpu.cpp needs of cpu_kernel.cpp, which is compiled once per instruction set.
#pragma once

#include "adamw.h"
#include "types.h"

namespace fusedlr {

// n elements of one tensor: parameter, gradient (of the parameter's type), moments
struct Span {
    char *p, *g, *m, *v, *top;  // top is null without amsgrad
    int64_t n;
    Type param, moments;
};

struct Kernel {
    const char* name;
    // of factor * g: squares and short sums in fp32 (fp64 for fp64), the same bits on every instruction set
    double (*sum_of_squares)(const Span& span, double factor);
    void (*update)(const Span& span, const Scalars<double>& scalars);
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

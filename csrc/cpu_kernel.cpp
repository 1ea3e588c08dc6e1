// The loops over elements. setup.py compiles this once per instruction set, FUSEDLR_ISA names the namespace.
// Plain loops for the compiler to vectorise: every element is computed the same way whatever the width.
//
// Bytes per parameter in fp32: update reads p g m v and writes p m v, 28; sum_of_squares reads g, 4.
#include "cpu_kernel.h"

#include <algorithm>

namespace fusedlr {
namespace FUSEDLR_ISA {
namespace {

template <class A, class B>
struct Wider {
    using type = float;
};
template <class B>
struct Wider<double, B> {
    using type = double;
};
template <class A>
struct Wider<A, double> {
    using type = double;
};
template <>
struct Wider<double, double> {
    using type = double;
};

// enough partial sums to hide the latency of the addition at any width
constexpr int kLanes = 16;
// fp32 sums stay this short, so that their rounding stays below that of the gradients: 64 additions per lane
constexpr int64_t kBlock = 1024;

template <class T>
double sum_of_squares(const Span& span, double factor) {
    using R = typename Wider<T, T>::type;
    const T* const g = reinterpret_cast<const T*>(span.g);
    const R f = R(factor);
    double total = 0;
    for (int64_t begin = 0; begin < span.n; begin += kBlock) {
        const int64_t end = std::min(span.n, begin + kBlock);
        R lane[kLanes] = {};
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            for (int j = 0; j < kLanes; ++j) {
                const R x = load(g[i + j]) * f;
                lane[j] += x * x;
            }
        }
        for (int j = 0; i + j < end; ++j) {
            const R x = load(g[i + j]) * f;
            lane[j] += x * x;
        }
        R sum = 0;
        for (int j = 0; j < kLanes; ++j) sum += lane[j];
        total += sum;
    }
    return total;
}

template <class P, class M, bool AMSGRAD>
void update(const Span& span, const Scalars<double>& scalars) {
    using R = typename Wider<P, M>::type;
    P* const ps = reinterpret_cast<P*>(span.p);
    const P* const gs = reinterpret_cast<const P*>(span.g);
    M* const ms = reinterpret_cast<M*>(span.m);
    M* const vs = reinterpret_cast<M*>(span.v);
    M* const tops = reinterpret_cast<M*>(span.top);
    const Scalars<R> s = rounded<R>(scalars);
    // an element depends on none but its own, whatever the tensors share
#pragma GCC ivdep
    for (int64_t i = 0; i < span.n; ++i) {
        R p = load(ps[i]), m = load(ms[i]), v = load(vs[i]);
        R top = AMSGRAD ? R(load(tops[i])) : R(0);
        adamw<R>(p, load(gs[i]), m, v, AMSGRAD ? &top : nullptr, s);
        store(ps[i], p), store(ms[i], m), store(vs[i], v);
        if (AMSGRAD) store(tops[i], top);
    }
}

template <class P, class M>
void update(const Span& span, const Scalars<double>& scalars) {
    span.top ? update<P, M, true>(span, scalars) : update<P, M, false>(span, scalars);
}

// moments are fp64, fp32 or of the parameter's type
template <class P>
void update(const Span& span, const Scalars<double>& scalars) {
    switch (span.moments) {
        case kF64:
            return update<P, double>(span, scalars);
        case kF32:
            return update<P, float>(span, scalars);
        default:
            return update<P, P>(span, scalars);
    }
}

double sum_of_squares_of(const Span& span, double factor) {
    switch (span.param) {
        case kF64:
            return sum_of_squares<double>(span, factor);
        case kF32:
            return sum_of_squares<float>(span, factor);
        case kBF16:
            return sum_of_squares<BF16>(span, factor);
        default:
            return sum_of_squares<F16>(span, factor);
    }
}

void update_of(const Span& span, const Scalars<double>& scalars) {
    switch (span.param) {
        case kF64:
            return update<double>(span, scalars);
        case kF32:
            return update<float>(span, scalars);
        case kBF16:
            return update<BF16>(span, scalars);
        default:
            return update<F16>(span, scalars);
    }
}

}  // namespace

#define FUSEDLR_NAME_(isa) #isa
#define FUSEDLR_NAME(isa) FUSEDLR_NAME_(isa)
extern const Kernel kernel;
const Kernel kernel = {FUSEDLR_NAME(FUSEDLR_ISA), sum_of_squares_of, update_of};

}  // namespace FUSEDLR_ISA
}  // namespace fusedlr

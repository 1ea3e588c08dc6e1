// The learning rate schedule for C++ and CUDA: fusedlr/schedule/phases.py under the same names, its only
// spelling here. R is double, or float where a device has no fast double; steps are int64 and reduced as
// integers.
#pragma once

#include <cmath>
#include <cstdint>

// static: every object compiled for another instruction set keeps its own copy
#ifdef __CUDACC__
#define FUSEDLR_HD static __host__ __device__ __forceinline__
#else
#define FUSEDLR_HD static inline
#endif

namespace fusedlr {

// the order of SHAPES in fusedlr/schedule/phases.py
enum Shape : int64_t {
    kConstant,
    kLinear,
    kCosine,
    kRestarts,
    kPolynomial,
    kInverseSqrt,
    kOneMinusSqrt,
    kOneMinusSqrtRise,
    kTable,
};

template <class R>
struct Phase {
    int64_t begin, end, origin;  // steps
    R from, to;                  // ratios of the peak
    int64_t shape;
    int64_t whole;  // restarts, whole half waves of a cosine, or where a table begins
    R shape_param;  // the power, the time scale, or the rest of a half wave
};

// sin(pi/2 * q/n) for q of 0 to n
template <class R>
FUSEDLR_HD R sin_quarter(R q, R n) {
#ifdef __CUDA_ARCH__
    // rounds less, and has no branch for large angles, which would take local memory
    return sinpi(q / n / 2);
#else
    return std::sin(R(1.57079632679489661923) / n * q);
#endif
}

// weights of a cosine of `whole + part` half waves, or with `whole` restarts, after e of n steps
template <class R>
FUSEDLR_HD void cosine_weights(bool restarts, int64_t whole, R part, int64_t e, int64_t n, R& w0, R& w1) {
    if (!restarts && part != 0 && sizeof(R) == 8) {
        const R angle = R(3.14159265358979323846) * ((R(whole) + part) / 2) * R(e) / R(n);
        w0 = std::cos(angle), w1 = std::sin(angle);
    } else {
        // 0.5*(1 - cos(pi*x)) = sin(pi/2 * x)**2 has period 2 in x = q/n and is even around x = 1
        int64_t q = whole * e % (restarts ? n : 2 * n);
        if (restarts || part == 0) {
            if (q > n) q = 2 * n - q;
            w0 = sin_quarter(R(n - q), R(n)), w1 = sin_quarter(R(q), R(n));
        } else {
            // the rest of a half wave is not whole, but small: in float it rounds little
            if (q > n) q -= 2 * n;
            R x = std::fabs(R(q) / R(n) + part * (R(e) / R(n)));
            if (x > 1) x = 2 - x;
            w0 = sin_quarter(1 - x, R(1)), w1 = sin_quarter(x, R(1));
        }
    }
    w0 *= w0, w1 *= w1;
}

// weights of from and to after e of the phase's n steps
template <class R>
FUSEDLR_HD void phase_weights(const Phase<R>& phase, int64_t e, const R* table, R& w0, R& w1) {
    const R c = phase.shape_param;
    const int64_t n = phase.end - phase.origin;
    const int64_t r = n - e;
    switch (phase.shape) {
        case kConstant:
            w0 = 1, w1 = 0;
            break;
        case kLinear:
            w0 = R(r) / R(n), w1 = R(e) / R(n);
            break;
        case kCosine:
        case kRestarts:
            cosine_weights(phase.shape == kRestarts, phase.whole, c, e, n, w0, w1);
            break;
        case kPolynomial:
            w0 = std::pow(R(r) / R(n), c), w1 = 1 - w0;
            break;
        case kInverseSqrt:
            w0 = 1 / std::sqrt(1 + R(e) / c), w1 = 1 - w0;
            break;
        case kOneMinusSqrt:
            w1 = std::sqrt(R(e) / R(n)), w0 = R(r) / R(n) / (1 + w1);
            break;
        case kOneMinusSqrtRise:
            w0 = std::sqrt(R(r) / R(n)), w1 = R(e) / R(n) / (1 + w0);
            break;
        default:
            w1 = table[phase.whole + e], w0 = 1 - w1;
    }
}

// the ratio of the peak at step k: the value of the last phase begun; phases[i] is a Phase<R>
template <class R, class Phases>
FUSEDLR_HD R evaluate(const Phases& phases, int64_t count, const R* table, int64_t k) {
    int64_t i = 0;
    while (i + 1 < count && k >= phases[i + 1].begin) ++i;
    const Phase<R> phase = phases[i];
    const int64_t clamped = k < phase.begin ? phase.begin : k > phase.end ? phase.end : k;
    R w0, w1;
    phase_weights(phase, clamped - phase.origin, table, w0, w1);
    return phase.from * w0 + phase.to * w1;
}

}  // namespace fusedlr

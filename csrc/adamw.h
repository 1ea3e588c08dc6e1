// One element of the AdamW step for C++ and CUDA: reference.adamw_ under the same letters, its only spelling
// here. Compile with FP contraction off: the reference rounds every product.
#pragma once

#include "schedule.h"

namespace fusedlr {

// per tensor and step, made in double where that is fast; R is the precision of the arithmetic, double for
// fp64 tensors
template <class R>
struct Scalars {
    R factor;    // unscaling times clipping, negative to maximize
    R decay;     // lr * wd
    R lr_bc1;    // lr / bc1
    R root_bc2;  // sqrt(bc2)
    R eps;
    R one_b1;      // 1 - b1
    R b2, one_b2;  // b2, 1 - b2
};

template <class R>
FUSEDLR_HD Scalars<R> rounded(const Scalars<double>& s) {
    return {R(s.factor), R(s.decay), R(s.lr_bc1), R(s.root_bc2), R(s.eps), R(s.one_b1), R(s.b2), R(s.one_b2)};
}

// 1 - b**t, which keeps its digits at small t
template <class R>
FUSEDLR_HD R bias_correction(double t, double log_b) {
    const double x = t * log_b;
    if (sizeof(R) == 8) return R(-std::expm1(x));
    // what the rounding of x took, to first order
    const R rounded = R(x), less = std::expm1(rounded);
    return -(less + (less + 1) * R(x - double(rounded)));
}

// v_max is the running maximum of v, null without amsgrad
template <class R>
FUSEDLR_HD void adamw(R& p, R g, R& m, R& v, R* v_max, const Scalars<R>& s) {
    g *= s.factor;
    p = p - s.decay * p;
    // m + (g - m)(1 - b1), or g - (g - m) b1 where 1 - b1 is 0.5 or more: starting at m would lose a g that
    // is small beside it. No branch, so that loops are vectorised; one_b1 - 1 is exact where it is used
    const bool from_m = s.one_b1 < R(0.5);
    m = (from_m ? m : g) + (g - m) * (from_m ? s.one_b1 : s.one_b1 - 1);
    v = s.b2 * v + (s.one_b2 * g) * g;
    R divisor = v;
    if (v_max) {
        // as torch.maximum: nan wins
        divisor = v <= *v_max || *v_max != *v_max ? *v_max : v;
        *v_max = divisor;
    }
    p = p - s.lr_bc1 * (m / (std::sqrt(divisor) / s.root_bc2 + s.eps));
}

}  // namespace fusedlr

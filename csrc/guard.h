// What a ZClip makes of a gradient norm, for C++ and CUDA: reference.judge and reference.moved under the same
// letters. Compile with FP contraction off: the second part of a mean is what rounding took from the first.
#pragma once

#include "schedule.h"

namespace fusedlr {

// what ZClip adds to the standard deviation before it divides
constexpr double kZEps = 1e-6;

// the rows NORMS of fusedlr/columns.py: how many norms, their mean and their variance, each as two numbers
template <class R>
struct Norms {
    R seen, mean, mean_rest, variance, variance_rest;
};

// the options of a scope's ZClip; one_alpha, 1 - alpha, is 0 where it has none
template <class R>
struct Guard {
    R warmup_steps, z_thresh, one_alpha;
};

template <class R>
struct Verdict {
    bool spike;
    R held;  // what the norm is held to: itself if it is no spike
};

template <class R>
FUSEDLR_HD Verdict<R> judge(R norm, const Norms<R>& norms, const Guard<R>& guard) {
    const R above = (norm - norms.mean) - norms.mean_rest;
    const R deviation = std::sqrt(norms.variance + norms.variance_rest);
    const R z = above / (deviation + R(kZEps));
    const bool spike = norms.seen >= guard.warmup_steps && z > guard.z_thresh;
    const R limit = norms.mean + (guard.z_thresh * guard.z_thresh * deviation / z + norms.mean_rest);
    return {spike, spike ? limit : norm};
}

// the sum of two numbers as it is rounded, and in b what the rounding took (Knuth's two-sum)
template <class R>
FUSEDLR_HD R exact_sum(R a, R& b) {
    const R total = a + b, part = total - a;
    b = (a - (total - part)) + (b - part);
    return total;
}

// the norms after one that was held to `held` has entered them
template <class R>
FUSEDLR_HD void move_norms(Norms<R>& norms, R held, const Guard<R>& guard) {
    const bool warm = norms.seen >= guard.warmup_steps;
    const R weight = warm ? guard.one_alpha : 1 / (norms.seen + 1);
    const R above = (held - norms.mean) - norms.mean_rest;
    norms.mean_rest = norms.mean_rest + weight * above;
    norms.mean = exact_sum(norms.mean, norms.mean_rest);
    const R left = (held - norms.mean) - norms.mean_rest;
    const R change = weight * (((warm ? left : above) * left - norms.variance) - norms.variance_rest);
    norms.variance_rest = norms.variance_rest + change;
    norms.variance = exact_sum(norms.variance, norms.variance_rest);
    norms.seen = norms.seen + 1;
}

}  // namespace fusedlr

// What csrc/cuda.cu makes of a schedule at many steps, and of the betas: called by cuda_spelling.py. KERNELS
// is the file with the kernels; with ROUND_SINE, schedule.h is as a GPU compiles it, for a sine that is
// rounded to nearest, down (-1) or up (1).
#include <cmath>

#ifdef ROUND_SINE
static inline float sinpi(float x) {
    const double exact = std::sin(3.14159265358979323846 * double(x));
    const float nearest = float(exact);
    return (double(nearest) - exact) * ROUND_SINE < 0 ? std::nextafterf(nearest, 2 * ROUND_SINE) : nearest;
}
#endif

#include KERNELS

#define FUSEDLR_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fusedlr;

// the tables are those of one group
FUSEDLR_EXPORT void lr_of_steps(const GroupInts* ints, const GroupFloats* floats, int32_t phases,
                                const int64_t* k, float* lr, int64_t count) {
    Step step = {};
    step.group_ints = ints, step.group_floats = floats, step.groups = 1, step.phases = phases;
    for (int64_t i = 0; i < count; ++i) lr[i] = f32::lr_at(step, *ints, *floats, k[i]);
}

// bc1 and sqrt(bc2) of tensors that have been updated `updates` times before
FUSEDLR_EXPORT void corrections(const GroupFloats* floats, const float* updates, float* bc1, float* root_bc2,
                                int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        root_bc2[i] = f32::scalars_of(updates[i], *floats, 1, 1).root_bc2;
        bc1[i] = bias_correction<float>(double(updates[i]) + 1,
                                        double(floats->log_b1_hi) + double(floats->log_b1_lo));
    }
}

// What a step on a GPU reads: the rows of the tables that fusedlr/tables.py fills. It lists the columns too; the
// module tells its own, and a test compares.
#pragma once

#include "schedule.h"

#define FUSEDLR_TENSORS(X) X(param) X(exp_avg) X(exp_avg_sq) X(top) X(step) X(numel) X(group)
#define FUSEDLR_CHUNKS(X) X(tensor) X(index) X(slot) X(group) X(leads)
#define FUSEDLR_GROUP_INTS(X) \
    X(first_phase)            \
    X(last_phase) X(lr) X(scope) X(normed) X(skip_nonfinite) X(advance) X(active) X(first_slot) X(last_slot)
#define FUSEDLR_GROUP_FLOATS(X)                                                                              \
    X(rate)                                                                                                  \
    X(log_b1_hi)                                                                                             \
    X(log_b1_lo) X(log_b2_hi) X(log_b2_lo) X(one_b1) X(b2) X(one_b2) X(eps) X(weight_decay) X(max_grad_norm) \
        X(sign)
#define FUSEDLR_PHASE_INTS(X) X(begin) X(end) X(origin) X(shape) X(whole)
#define FUSEDLR_PHASE_FLOATS(X) X(from_) X(to) X(param_hi) X(param_lo)

namespace fusedlr {

// elements per chunk
constexpr int64_t kChunk = 4096;

#define FUSEDLR_INT64(name) int64_t name;
#define FUSEDLR_INT32(name) int32_t name;
#define FUSEDLR_FLOAT(name) float name;

struct TensorRow {
    FUSEDLR_TENSORS(FUSEDLR_INT64)
};
struct ChunkRow {
    FUSEDLR_CHUNKS(FUSEDLR_INT32)
};
struct GroupInts {
    FUSEDLR_GROUP_INTS(FUSEDLR_INT64)
};
struct GroupFloats {
    FUSEDLR_GROUP_FLOATS(FUSEDLR_FLOAT)
};
struct PhaseInts {
    FUSEDLR_PHASE_INTS(FUSEDLR_INT64)
};
struct PhaseFloats {
    FUSEDLR_PHASE_FLOATS(FUSEDLR_FLOAT)
};

#undef FUSEDLR_INT64
#undef FUSEDLR_INT32
#undef FUSEDLR_FLOAT

}  // namespace fusedlr

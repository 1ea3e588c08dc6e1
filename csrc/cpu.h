// One step over all tensors of an optimizer, on addresses: reference.step_ for the CPU. No Python in here.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu_kernel.h"

namespace fusedlr {

template <class R>
struct Schedule {
    std::vector<Phase<R>> phases;
    std::vector<R> table;

    R at(int64_t k) const { return evaluate(phases.data(), int64_t(phases.size()), table.data(), k); }
};

// reference.GroupStep without its rows
struct Group {
    int64_t index;
    std::shared_ptr<const Schedule<double>> schedule;  // null: lr is given
    double lr, peak, b1, b2, eps, weight_decay;
    bool maximize, clip;
    double max_grad_norm;  // where clip
    bool skip_nonfinite, advance;
};

// what a GradScaler left, resolved to numbers
struct Signals {
    bool has_grad_scale;
    double grad_scale;
    bool found_inf;
};

// addresses of reference.Counters, each of shape (groups,)
struct Counters {
    int64_t *k, *skipped, *skips_in_row;
    double *lr, *grad_norm, *coef;
};

// the best instruction set this machine has comes first
std::vector<const Kernel*> kernels();

// Tensors of one layout: what stays the same from step to step, and the scratch of a step.
class Tensors {
  public:
    // types, elements and addresses, one per tensor; tops is empty without amsgrad, and null where a tensor
    // has none
    Tensors(const std::vector<int>& params, const std::vector<int>& moments,
            const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& p,
            const std::vector<uintptr_t>& m, const std::vector<uintptr_t>& v,
            const std::vector<uintptr_t>& tops, const std::vector<uintptr_t>& steps);

    size_t size() const { return spans_.size(); }

    // gradients: one address per tensor; groups hold counts[i] tensors each, in order
    void step(const std::vector<uintptr_t>& gradients, const Kernel& kernel,
              const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
              const Counters& counters, const Signals& signals, bool joint, int threads);

  private:
    // a piece of one tensor, the unit of work: who computes it does not change its bits
    struct Chunk {
        size_t tensor;
        int64_t begin, n;  // elements
        int64_t before;    // elements in all chunks before this one
        double squares;
    };

    struct Scope {
        size_t first, last;  // groups [first, last)
        size_t begin, end;   // their tensors
        double unscale = 1;  // 1 / grad_scale
        bool norm = false;   // whether a norm is needed
    };

    void make_scopes(const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
                     const Signals& signals, bool joint);
    void prepare(const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
                 const Counters& counters, const Signals& signals);
    double norm(const Scope& scope) const;
    Span span(const Chunk& chunk) const;
    size_t first_chunk(int64_t element) const;
    void squares(const Kernel& kernel, size_t begin, size_t end);
    void update(const Kernel& kernel, size_t begin, size_t end) const;

    std::vector<Span> spans_;
    std::vector<float*> steps_;
    std::vector<Chunk> chunks_;
    std::vector<size_t> chunk_of_;  // tensor -> its first chunk; one more at the end
    int64_t elements_ = 0;
    // of the step under way, of which there is one at a time
    std::mutex busy_;
    std::vector<Scope> scopes_;
    std::vector<const Scope*> scope_of_;    // tensor -> its scope
    std::vector<Scalars<double>> scalars_;  // per tensor
    std::vector<char> skip_;                // per tensor
};

}  // namespace fusedlr

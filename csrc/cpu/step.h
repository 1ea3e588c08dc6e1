// One step over all tensors of an optimizer, on addresses: fusedlr/reference.py for the CPU. No Python in
// here.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "../guard.h"
#include "kernel.h"

namespace fusedlr {

template <class R>
struct Schedule {
    std::vector<Phase<R>> phases;
    std::vector<R> table;

    R at(int64_t k) const { return evaluate(phases.data(), int64_t(phases.size()), table.data(), k); }
};

// one tensor, its group, and the addresses that stay from step to step
struct Row {
    size_t group;
    Type param, state;  // types of the parameter and of its moments
    int64_t size;       // elements
    uintptr_t p;
    std::array<uintptr_t, kStates> states;  // in the order of State; 0 where the tensor has none
    uintptr_t t;                            // its count of updates, a float
    int64_t place;                          // among the parameters of its group
    int64_t column;                         // in the ring, if there is one
};

// reference.GroupStep
struct Group {
    std::shared_ptr<const Schedule<double>> schedule;  // null: the rate is given
    double peak, b1, b2, eps, weight_decay;
    bool maximize;
    size_t scope;
};

// reference.Scope
struct Scope {
    bool clip;
    double max_grad_norm;  // where clip
    bool skip_nonfinite, always, by_own_norm;
    Guard<double> guard;
    bool skip_spikes;

    bool normed() const { return clip || skip_nonfinite; }
};

// what a step is given anew
struct Inputs {
    const uintptr_t* gradients;  // one address per row, 0 where there is no gradient
    const double* rates;         // one per group, used where it has no schedule
    double unscale;              // what multiplies every gradient
    bool found_inf;
    int threads;
    // whether each scope has a gradient somewhere; empty where only those of this process matter
    std::vector<bool> stepped;
    // whether each scope may make the step; empty where all may
    std::vector<bool> only;
};

// the stages that a call makes: the sums of squares of all scopes that need a norm, and all that follows
enum Stages : int { kNorm = 1, kUpdate = 2 };

// addresses of record.Ring
struct Ring {
    int64_t *steps = nullptr, *ints;  // no steps: nothing is recorded
    double *used, *sums;
    int64_t last, columns;
};

// addresses of reference.Counters, each of shape (groups,), and of the scopes' sums of squares
struct Counters {
    int64_t *k, *skipped, *skips_in_row, *nonfinite, *nonfinite_step;
    double *lr, *grad_norm, *coef, *limit;
    std::array<double*, kUsed - k_seen> norms;
    double* squares;
};

// the best instruction set this machine has comes first
std::vector<const Kernel*> kernels();

// The stages of a step over rows of one layout. An optimizer makes one step at a time.
class Stepper {
  public:
    // rows are in the order of their groups
    Stepper(std::vector<Row> rows, size_t groups, const Counters& counters, const Ring& ring,
            const Kernel& kernel);

    // takes new options; groups must be as many as before
    void assign(std::vector<Group> groups, std::vector<Scope> scopes);

    // Makes these stages, all in one parallel region. The update decides by the sums of squares that a norm
    // has left, here or in an earlier call.
    void run(int stages, const Inputs& inputs);

    size_t rows() const { return rows_.size(); }
    size_t groups() const { return groups_.size(); }
    size_t scopes() const { return scopes_.size(); }
    const Counters& counters() const { return counters_; }
    // whether the group's scope made the last step
    bool stepped(size_t group) const { return active_[groups_[group].scope]; }
    double lr_at(size_t group, int64_t k) const {
        return groups_[group].peak * groups_[group].schedule->at(k);
    }
    bool scheduled(size_t group) const { return bool(groups_[group].schedule); }

  private:
    // a piece of one tensor, the unit of work: which thread computes it does not change its bits
    struct Chunk {
        size_t row;
        int64_t begin, n;  // elements
        int64_t before;    // elements in all chunks before this one
        double squares;
        Sums sums;       // where tensors are recorded
        bool nonfinite;  // of a tensor that is skipped
    };

    struct Tensor {
        SumOfSquares sum_of_squares;
        Update update;
        Finite finite;
        bool active;   // whether this step updates it
        bool skipped;  // whether it would have
        Scalars<double> scalars;
    };

    void begin(const Inputs& inputs);
    void add_squares();
    void decide(const Inputs& inputs);
    void judge_norm(size_t scope, bool found_inf);
    void update_chunk(Chunk& chunk, const Inputs& inputs);
    void begin_recording();
    void record_group(size_t group, bool skip);
    void finish();
    bool records_tensors() const { return ring_.steps && ring_.columns; }
    bool squares_needed(const Chunk& chunk) const {
        const size_t scope = groups_[rows_[chunk.row].group].scope;
        return active_[scope] && scopes_[scope].normed();
    }
    Span span(const Chunk& chunk, uintptr_t gradient) const;
    size_t first_chunk(int64_t element) const;

    std::vector<Row> rows_;
    Counters counters_;
    Ring ring_;
    bool squared_ = false;  // whether the chunks have the squares of the gradients of the run under way
    std::vector<Group> groups_;
    std::vector<Scope> scopes_;
    std::vector<Chunk> chunks_;
    std::vector<size_t> chunk_of_;  // row -> its first chunk; one more at the end
    int64_t elements_ = 0;
    // of the step under way
    std::vector<Tensor> tensors_;              // per row
    std::vector<char> active_;                 // per scope: whether it makes this step
    std::vector<char> skip_;                   // per scope
    std::vector<double> coef_, norm_, limit_;  // per scope
    std::vector<size_t> first_group_;          // scope -> its first group, or how many there are
};

}  // namespace fusedlr

// The step of step.h. Its parallel region splits elements, not tensors: LoRA has many of unequal size.
#include "step.h"

#include <algorithm>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fusedlr {

namespace {

// small enough to share work evenly and to stay in L2 between its passes, large enough that a call per chunk
// costs nothing. 2,048 to 32,768 are within 6 % of it at 4 and 40 M parameters (Xeon, 2 threads, 2026-11-22);
// handing chunks out as threads get free is within 5 % of splitting them beforehand
constexpr int64_t kChunk = 8192;
// elements below which waking another thread costs more than it saves: two threads take 1.35 times as long as
// one at 32,768, 1.2 times at 65,536 and 0.78 times at 131,072 (the same machine)
constexpr int64_t kAlone = 98304;
// what torch.nn.utils.clip_grad_norm_ adds to the norm before it divides
constexpr double kClipEps = 1e-6;

}  // namespace

std::vector<const Kernel*> kernels() {
    std::vector<const Kernel*> found;
#ifdef FUSEDLR_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&avx512::kernel);
    if (__builtin_cpu_supports("avx2")) found.push_back(&avx2::kernel);
#endif
    found.push_back(&baseline::kernel);
    return found;
}

Stepper::Stepper(std::vector<Row> rows, size_t groups, const Counters& counters, const Ring& ring,
                 const Kernel& kernel)
    : rows_(std::move(rows)), counters_(counters), ring_(ring), groups_(groups) {
    for (const Row& row : rows_) {
        const bool amsgrad = row.states[k_max_exp_avg_sq];
        const bool master = row.states[k_param_remainder] || row.states[k_master_param];
        tensors_.push_back({kernel.sum_of_squares(row.param),
                            kernel.update(row.param, row.state, amsgrad, master, records_tensors()),
                            kernel.finite(row.param),
                            false,
                            false,
                            {}});
        chunk_of_.push_back(chunks_.size());
        for (int64_t begin = 0; begin < row.size; begin += kChunk) {
            const int64_t n = std::min(kChunk, row.size - begin);
            chunks_.push_back({chunk_of_.size() - 1, begin, n, elements_, 0, {}, false});
            elements_ += n;
        }
    }
    chunk_of_.push_back(chunks_.size());
}

void Stepper::assign(std::vector<Group> groups, std::vector<Scope> scopes) {
    groups_ = std::move(groups);
    scopes_ = std::move(scopes);
    active_.resize(scopes_.size());
    skip_.resize(scopes_.size());
    coef_.resize(scopes_.size());
    norm_.resize(scopes_.size());
    limit_.resize(scopes_.size());
    first_group_.assign(scopes_.size(), groups_.size());
    for (size_t j = groups_.size(); j-- > 0;) first_group_[groups_[j].scope] = j;
}

void Stepper::run(int stages, const Inputs& inputs) {
    begin(inputs);
    const bool norm = (stages & kNorm) &&
                      std::any_of(scopes_.begin(), scopes_.end(), [](const Scope& s) { return s.normed(); });
    const bool update = stages & kUpdate;
    squared_ = norm;
    const auto square_chunks = [&](size_t first, size_t last) {
        for (size_t c = first; norm && c < last; ++c) {
            Chunk& chunk = chunks_[c];
            const uintptr_t gradient = inputs.gradients[chunk.row];
            chunk.squares = 0;
            if (gradient && squares_needed(chunk))
                chunk.squares = tensors_[chunk.row].sum_of_squares(span(chunk, gradient), inputs.unscale);
        }
    };
    const auto decide_once = [&] {
        if (norm) add_squares();
        if (update) decide(inputs);
    };
    const auto update_chunks = [&](size_t first, size_t last) {
        for (size_t c = first; update && c < last; ++c) update_chunk(chunks_[c], inputs);
    };
    if (elements_ < kAlone || inputs.threads == 1) {
        // even a region of one thread takes 0.85 us, where 16 tensors of 512 elements take 2.2 (AMD EPYC,
        // 2026-11-26)
        square_chunks(0, chunks_.size());
        decide_once();
        update_chunks(0, chunks_.size());
        if (update) finish();
        return;
    }
#pragma omp parallel num_threads(inputs.threads)
    {
        int64_t thread = 0, threads = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
        const size_t first = first_chunk(elements_ / threads * thread);
        const size_t last =
            thread + 1 == threads ? chunks_.size() : first_chunk(elements_ / threads * (thread + 1));
        square_chunks(first, last);
#pragma omp barrier
#pragma omp single
        decide_once();
        update_chunks(first, last);
    }
    if (update) finish();
}

void Stepper::update_chunk(Chunk& chunk, const Inputs& inputs) {
    const Tensor& tensor = tensors_[chunk.row];
    if (!tensor.active && !tensor.skipped) return;
    const Span whole = span(chunk, inputs.gradients[chunk.row]);
    if (records_tensors()) {
        const size_t scope = groups_[rows_[chunk.row].group].scope;
        chunk.sums = {};
        chunk.sums.of[k_grad] = squared_ && scopes_[scope].normed()
                                    ? chunk.squares
                                    : tensor.sum_of_squares(whole, inputs.unscale);
    }
    if (tensor.skipped)
        chunk.nonfinite = !tensor.finite(whole);
    else
        tensor.update(whole, tensor.scalars, &chunk.sums);
}

// A scope that may make the step does if one of its tensors has a gradient, or if it always does.
void Stepper::begin(const Inputs& inputs) {
    for (size_t s = 0; s < scopes_.size(); ++s)
        active_[s] = scopes_[s].always || (!inputs.stepped.empty() && inputs.stepped[s]);
    for (size_t i = 0; i < rows_.size(); ++i)
        if (inputs.gradients[i]) active_[groups_[rows_[i].group].scope] = true;
    for (size_t s = 0; s < inputs.only.size(); ++s) active_[s] &= inputs.only[s];
}

// The order is that of the chunks, whichever thread has squared them.
void Stepper::add_squares() {
    std::fill(counters_.squares, counters_.squares + scopes_.size(), 0.0);
    for (size_t i = 0; i < rows_.size(); ++i) {
        double squares = 0;
        for (size_t c = chunk_of_[i]; c < chunk_of_[i + 1]; ++c) squares += chunks_[c].squares;
        // the sum of one tensor is an fp32 number, which may overflow
        counters_.squares[groups_[rows_[i].group].scope] +=
            rows_[i].param == kF64 ? squares : double(float(squares));
    }
}

// Norm, limit, coefficient and skip of a scope; a norm enters those that its ZClip has seen.
void Stepper::judge_norm(size_t s, bool found_inf) {
    const Scope& scope = scopes_[s];
    norm_[s] = scope.normed() ? std::sqrt(counters_.squares[s]) : std::numeric_limits<double>::quiet_NaN();
    const bool bad = !std::isfinite(norm_[s]);
    skip_[s] = scope.by_own_norm ? bad && (scope.skip_nonfinite || found_inf)
                                 : found_inf || (scope.skip_nonfinite && bad);
    coef_[s] = 1;
    limit_[s] = std::numeric_limits<double>::infinity();
    if (!scope.clip) return;
    double highest = limit_[s] = scope.max_grad_norm;
    const size_t first = first_group_[s];
    if (scope.guard.one_alpha > 0 && first < groups_.size()) {
        const auto& rows = counters_.norms;
        Norms<double> norms = {rows[0][first], rows[1][first], rows[2][first], rows[3][first],
                               rows[4][first]};
        const Verdict<double> verdict = judge(norm_[s], norms, scope.guard);
        limit_[s] = highest < verdict.held ? highest : verdict.held;
        if (verdict.spike) highest = limit_[s];
        skip_[s] |= verdict.spike && scope.skip_spikes;
        if (active_[s] && !skip_[s] && !bad) {
            move_norms(norms, verdict.held, scope.guard);
            rows[0][first] = norms.seen;
            rows[1][first] = norms.mean, rows[2][first] = norms.mean_rest;
            rows[3][first] = norms.variance, rows[4][first] = norms.variance_rest;
        }
    }
    coef_[s] = highest / (norm_[s] + kClipEps);
    // a coefficient that is nan stays
    if (coef_[s] > 1) coef_[s] = 1;
}

void Stepper::decide(const Inputs& inputs) {
    for (size_t s = 0; s < scopes_.size(); ++s) judge_norm(s, inputs.found_inf);
    if (ring_.steps) begin_recording();
    size_t i = 0;
    for (size_t j = 0; j < groups_.size(); ++j) {
        const Group& group = groups_[j];
        const bool skip = skip_[group.scope];
        if (!active_[group.scope]) {
            for (; i < rows_.size() && rows_[i].group == j; ++i)
                tensors_[i].active = tensors_[i].skipped = false;
            continue;
        }
        const double lr = group.schedule ? lr_at(j, counters_.k[j]) : inputs.rates[j];
        Scalars<double> s = {};
        s.factor = inputs.unscale * coef_[group.scope] * (group.maximize ? -1 : 1);
        s.decay = lr * group.weight_decay;
        s.eps = group.eps;
        s.one_b1 = 1 - group.b1;
        s.b2 = group.b2;
        s.one_b2 = 1 - group.b2;
        const double log_b1 = std::log(group.b1), log_b2 = std::log(group.b2);
        // most tensors of a group have had the same number of updates
        float last = -1;
        for (; i < rows_.size() && rows_[i].group == j; ++i) {
            tensors_[i].active = !skip && inputs.gradients[i];
            tensors_[i].skipped = skip && inputs.gradients[i];
            if (!tensors_[i].active) continue;
            const float t = *reinterpret_cast<float*>(rows_[i].t) += 1;
            if (t != last) {
                s.lr_bc1 = lr / bias_correction<double>(t, log_b1);
                s.root_bc2 = std::sqrt(bias_correction<double>(t, log_b2));
                last = t;
            }
            tensors_[i].scalars = s;
        }
        counters_.lr[j] = lr, counters_.grad_norm[j] = norm_[group.scope];
        counters_.coef[j] = coef_[group.scope], counters_.limit[j] = limit_[group.scope];
        if (ring_.steps) record_group(j, skip);
        counters_.k[j] += !skip;
        counters_.skipped[j] += skip;
        counters_.skips_in_row[j] = skip ? counters_.skips_in_row[j] + 1 : 0;
    }
}

// A row of the ring, as if no group took part.
void Stepper::begin_recording() {
    const int64_t groups = int64_t(groups_.size()), row = *ring_.steps % ring_.last;
    int64_t* const ints = ring_.ints + row * (1 + groups);
    ints[0] = *ring_.steps;
    std::fill(ints + 1, ints + 1 + groups, -1);
    double* const used = ring_.used + row * kRecorded * groups;
    std::fill(used, used + kRecorded * groups, std::numeric_limits<double>::quiet_NaN());
    double* const sums = ring_.sums + row * kSums * ring_.columns;
    std::fill(sums, sums + kSums * ring_.columns, -1.0);
}

// What the counters say of a group, before its step is counted.
void Stepper::record_group(size_t group, bool skip) {
    const size_t groups = groups_.size(), row = size_t(*ring_.steps % ring_.last);
    ring_.ints[row * (1 + groups) + 1 + group] = counters_.k[group];
    double* const used = ring_.used + row * kRecorded * groups + group;
    used[k_lr * groups] = counters_.lr[group], used[k_grad_norm * groups] = counters_.grad_norm[group];
    used[k_coef * groups] = counters_.coef[group], used[k_limit * groups] = counters_.limit[group];
    used[k_recorded_skip * groups] = skip;
}

// What is known when all chunks are done: the tensors whose gradients were not finite, and what is recorded.
void Stepper::finish() {
    for (size_t i = rows_.size(); i-- > 0;) {
        if (!tensors_[i].skipped) continue;
        const size_t group = rows_[i].group;
        for (size_t c = chunk_of_[i]; c < chunk_of_[i + 1]; ++c) {
            if (!chunks_[c].nonfinite) continue;
            // the first tensor comes last
            counters_.nonfinite[group] = rows_[i].place + 1;
            counters_.nonfinite_step[group] = counters_.k[group] + counters_.skipped[group] - 1;
        }
    }
    if (!ring_.steps) return;
    double* const row = ring_.sums + (*ring_.steps % ring_.last) * kSums * ring_.columns;
    for (size_t i = 0; records_tensors() && i < rows_.size(); ++i) {
        if (!tensors_[i].active && !tensors_[i].skipped) continue;
        Sums sums = {};
        for (size_t c = chunk_of_[i]; c < chunk_of_[i + 1]; ++c) sums.add(chunks_[c].sums);
        for (int j = 0; j < kSums; ++j) row[j * ring_.columns + rows_[i].column] = sums.of[j];
    }
    ++*ring_.steps;
}

Span Stepper::span(const Chunk& chunk, uintptr_t gradient) const {
    const Row& row = rows_[chunk.row];
    const uintptr_t param = uintptr_t(chunk.begin * size_of(row.param));
    Span span = {
        reinterpret_cast<char*>(row.p + param), reinterpret_cast<char*>(gradient + param), {}, chunk.n};
    for (int i = 0; i < kStates; ++i) {
        const int64_t bytes = kStateBytes[i] ? kStateBytes[i] : size_of(row.state);
        span.state[i] = reinterpret_cast<char*>(row.states[size_t(i)] + uintptr_t(chunk.begin * bytes));
    }
    return span;
}

size_t Stepper::first_chunk(int64_t element) const {
    const auto before = [](const Chunk& chunk, int64_t x) { return chunk.before < x; };
    return size_t(std::lower_bound(chunks_.begin(), chunks_.end(), element, before) - chunks_.begin());
}

}  // namespace fusedlr

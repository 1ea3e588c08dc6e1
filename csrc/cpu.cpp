// The step of cpu.h. Its parallel region splits elements, not tensors: LoRA has many of unequal size.
#include "cpu.h"

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

double log_or_inf(double b) { return b > 0 ? std::log(b) : -std::numeric_limits<double>::infinity(); }

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

Tensors::Tensors(const std::vector<int>& params, const std::vector<int>& moments,
                 const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& p,
                 const std::vector<uintptr_t>& m, const std::vector<uintptr_t>& v,
                 const std::vector<uintptr_t>& tops, const std::vector<uintptr_t>& steps)
    : spans_(sizes.size()),
      steps_(sizes.size()),
      scope_of_(sizes.size()),
      scalars_(sizes.size()),
      skip_(sizes.size()) {
    for (size_t i = 0; i < sizes.size(); ++i) {
        Span& span = spans_[i];
        span.n = sizes[i];
        span.param = Type(params[i]);
        span.moments = Type(moments[i]);
        span.p = reinterpret_cast<char*>(p[i]);
        span.m = reinterpret_cast<char*>(m[i]);
        span.v = reinterpret_cast<char*>(v[i]);
        span.top = tops.empty() ? nullptr : reinterpret_cast<char*>(tops[i]);
        steps_[i] = reinterpret_cast<float*>(steps[i]);
        chunk_of_.push_back(chunks_.size());
        for (int64_t begin = 0; begin < sizes[i]; begin += kChunk) {
            const int64_t n = std::min(kChunk, sizes[i] - begin);
            chunks_.push_back({i, begin, n, elements_, 0});
            elements_ += n;
        }
    }
    chunk_of_.push_back(chunks_.size());
}

void Tensors::step(const std::vector<uintptr_t>& gradients, const Kernel& kernel,
                   const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
                   const Counters& counters, const Signals& signals, bool joint, int threads) {
    const std::lock_guard<std::mutex> lock(busy_);
    for (size_t i = 0; i < size(); ++i) spans_[i].g = reinterpret_cast<char*>(gradients[i]);
    make_scopes(groups, counts, signals, joint);
    const bool norm = std::any_of(scopes_.begin(), scopes_.end(), [](const Scope& s) { return s.norm; });
    const size_t chunks = chunks_.size();
#ifdef _OPENMP
    if (threads > 1 && elements_ >= kAlone) {
        if (!norm) prepare(groups, counts, counters, signals);
#pragma omp parallel num_threads(threads)
        {
            const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
            const size_t begin = first_chunk(elements_ / team * thread);
            const size_t end = thread + 1 == team ? chunks : first_chunk(elements_ / team * (thread + 1));
            if (norm) {
                squares(kernel, begin, end);
#pragma omp barrier
#pragma omp single
                prepare(groups, counts, counters, signals);
            }
            update(kernel, begin, end);
        }
        return;
    }
#endif
    (void)threads;
    if (norm) squares(kernel, 0, chunks);
    prepare(groups, counts, counters, signals);
    update(kernel, 0, chunks);
}

void Tensors::make_scopes(const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
                          const Signals& signals, bool joint) {
    scopes_.clear();
    size_t tensor = 0;
    for (size_t i = 0; i < groups.size(); ++i) {
        const size_t end = tensor + size_t(counts[i]);
        if (joint && i > 0) {
            scopes_.back().last = i + 1;
            scopes_.back().end = end;
        } else if (joint || counts[i] > 0) {
            Scope scope = {i, i + 1, tensor, end};
            if (signals.has_grad_scale) scope.unscale = 1 / signals.grad_scale;
            scope.norm = groups[i]->clip || groups[i]->skip_nonfinite;
            scopes_.push_back(scope);
        }
        tensor = end;
    }
    for (const Scope& scope : scopes_) {
        for (size_t i = scope.begin; i < scope.end; ++i) scope_of_[i] = &scope;
    }
}

// everything between the norm and the update: decides, evaluates schedules, counts
void Tensors::prepare(const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
                      const Counters& counters, const Signals& signals) {
    for (const Scope& scope : scopes_) {
        const Group& head = *groups[scope.first];
        const double total = scope.norm ? norm(scope) : std::numeric_limits<double>::quiet_NaN();
        const bool skip = signals.found_inf || (head.skip_nonfinite && !std::isfinite(total));
        double coef = 1;
        if (head.clip) {
            coef = head.max_grad_norm / (total + kClipEps);
            // a nan stays
            if (coef > 1) coef = 1;
        }
        size_t i = scope.begin;
        for (size_t j = scope.first; j < scope.last; ++j) {
            const Group& group = *groups[j];
            const int64_t at = group.index;
            const double lr = group.schedule ? group.peak * group.schedule->at(counters.k[at]) : group.lr;
            Scalars<double> s = {};
            s.factor = scope.unscale * coef * (group.maximize ? -1 : 1);
            s.decay = lr * group.weight_decay;
            s.eps = group.eps;
            s.one_b1 = 1 - group.b1;
            s.b2 = group.b2, s.one_b2 = 1 - group.b2;
            const double log_b1 = log_or_inf(group.b1), log_b2 = log_or_inf(group.b2);
            // most tensors of a group have had the same number of updates
            float last = -1;
            for (const size_t end = i + size_t(counts[j]); i < end; ++i) {
                skip_[i] = skip;
                if (skip) continue;
                const float t = *steps_[i] += 1;
                if (t != last) {
                    s.lr_bc1 = lr / bias_correction<double>(t, log_b1);
                    s.root_bc2 = std::sqrt(bias_correction<double>(t, log_b2));
                    last = t;
                }
                scalars_[i] = s;
            }
            counters.lr[at] = lr, counters.grad_norm[at] = total, counters.coef[at] = coef;
            counters.k[at] += group.advance && !skip;
            counters.skipped[at] += skip;
            counters.skips_in_row[at] = skip ? counters.skips_in_row[at] + 1 : 0;
        }
    }
}

// sums in the order of the chunks, whichever thread made them
double Tensors::norm(const Scope& scope) const {
    double total = 0;
    for (size_t i = scope.begin; i < scope.end; ++i) {
        double squares = 0;
        for (size_t c = chunk_of_[i]; c < chunk_of_[i + 1]; ++c) squares += chunks_[c].squares;
        // the sum of one tensor is an fp32 number, which may overflow
        total += spans_[i].param == kF64 ? squares : double(float(squares));
    }
    return std::sqrt(total);
}

Span Tensors::span(const Chunk& chunk) const {
    Span span = spans_[chunk.tensor];
    const int64_t param = chunk.begin * size_of(span.param), moments = chunk.begin * size_of(span.moments);
    span.p += param, span.g += param;
    span.m += moments, span.v += moments;
    if (span.top) span.top += moments;
    span.n = chunk.n;
    return span;
}

size_t Tensors::first_chunk(int64_t element) const {
    const auto before = [](const Chunk& chunk, int64_t x) { return chunk.before < x; };
    return size_t(std::lower_bound(chunks_.begin(), chunks_.end(), element, before) - chunks_.begin());
}

void Tensors::squares(const Kernel& kernel, size_t begin, size_t end) {
    for (size_t c = begin; c < end; ++c) {
        Chunk& chunk = chunks_[c];
        const Scope* const scope = scope_of_[chunk.tensor];
        if (scope->norm) chunk.squares = kernel.sum_of_squares(span(chunk), scope->unscale);
    }
}

void Tensors::update(const Kernel& kernel, size_t begin, size_t end) const {
    for (size_t c = begin; c < end; ++c) {
        const Chunk& chunk = chunks_[c];
        if (!skip_[chunk.tensor]) kernel.update(span(chunk), scalars_[chunk.tensor]);
    }
}

}  // namespace fusedlr

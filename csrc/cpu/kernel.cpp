// The loops over elements. setup.py compiles this once per instruction set, FUSEDLR_ISA names the namespace.
// Plain loops for the compiler to vectorise: every element is computed the same way whatever the width.
//
// Bytes per parameter in fp32: update reads p g m v and writes p m v, 28; sum_of_squares reads g, 4.
#include "kernel.h"

#include <algorithm>
#include <type_traits>

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

template <class T>
bool finite(const Span& span) {
    const T* const g = reinterpret_cast<const T*>(span.g);
    int bad = 0;
    for (int64_t i = 0; i < span.n; ++i) {
        const auto x = load(g[i]);
        bad |= x - x != 0;
    }
    return !bad;
}

// what the state has of a parameter's value; Rest is void* where it has nothing
template <class P, class Rest>
Rest* rest_of(const Span& span) {
    return reinterpret_cast<Rest*>(span.state[std::is_same<P, F16>() ? k_master_param : k_param_remainder]);
}

// One element: what a step computes with for the parameter, before and after.
template <class R>
struct Seen {
    R before, after;
};

// Rest is RestOf<P> where the state has it, else void*
template <class P, class M, bool AMSGRAD, class Rest, bool RECORD>
void update(const Span& span, const Scalars<double>& scalars, Sums* sums) {
    using R = typename Wider<P, M>::type;
    P* const ps = reinterpret_cast<P*>(span.p);
    const P* const gs = reinterpret_cast<const P*>(span.g);
    M* const ms = reinterpret_cast<M*>(span.state[k_exp_avg]);
    M* const vs = reinterpret_cast<M*>(span.state[k_exp_avg_sq]);
    M* const v_maxs = reinterpret_cast<M*>(span.state[k_max_exp_avg_sq]);
    Rest* const rests = rest_of<P, Rest>(span);
    const Scalars<R> s = rounded<R>(scalars);
    const auto element = [=](int64_t i) {
        R p, m = load(ms[i]), v = load(vs[i]);
        if constexpr (std::is_same<Rest, void*>())
            p = load(ps[i]);
        else
            p = load_whole(ps[i], rests[i]);
        const R before = p;
        R v_max = AMSGRAD ? R(load(v_maxs[i])) : R(0);
        adamw<R>(p, load(gs[i]), m, v, AMSGRAD ? &v_max : nullptr, s);
        if constexpr (std::is_same<Rest, void*>()) {
            P stored;
            store(stored, p);
            ps[i] = stored, p = load(stored);
        } else {
            store_whole(ps[i], rests[i], float(p));
        }
        store(ms[i], m), store(vs[i], v);
        if (AMSGRAD) store(v_maxs[i], v_max);
        return Seen<R>{before, p};
    };
    if (!RECORD) {
        // an element depends on none but its own, whatever the tensors share
#pragma GCC ivdep
        for (int64_t i = 0; i < span.n; ++i) element(i);
        return;
    }
    for (int64_t begin = 0; begin < span.n; begin += kBlock) {
        const int64_t end = std::min(span.n, begin + kBlock);
        R changes[kLanes] = {}, befores[kLanes] = {};
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
#pragma GCC ivdep
            for (int j = 0; j < kLanes; ++j) {
                const Seen<R> x = element(i + j);
                changes[j] += (x.after - x.before) * (x.after - x.before);
                befores[j] += x.before * x.before;
            }
        }
        for (int j = 0; i + j < end; ++j) {
            const Seen<R> x = element(i + j);
            changes[j] += (x.after - x.before) * (x.after - x.before);
            befores[j] += x.before * x.before;
        }
        R change = 0, before = 0;
        for (int j = 0; j < kLanes; ++j) change += changes[j], before += befores[j];
        sums->of[k_change] += change, sums->of[k_before] += before;
    }
}

template <class P, class M, class Rest>
Update update_with(bool amsgrad, bool record) {
    if (record) return amsgrad ? update<P, M, true, Rest, true> : update<P, M, false, Rest, true>;
    return amsgrad ? update<P, M, true, Rest, false> : update<P, M, false, Rest, false>;
}

// moments are fp64, fp32 or of the parameter's type
template <class P, class Rest>
Update update_with(Type state, bool amsgrad, bool record) {
    switch (state) {
        case kF64:
            return update_with<P, double, Rest>(amsgrad, record);
        case kF32:
            return update_with<P, float, Rest>(amsgrad, record);
        default:
            return update_with<P, P, Rest>(amsgrad, record);
    }
}

template <class P>
Update update_with(Type state, bool amsgrad, bool master, bool record) {
    return master ? update_with<P, typename RestOf<P>::Type>(state, amsgrad, record)
                  : update_with<P, void*>(state, amsgrad, record);
}

Update update_for(Type param, Type state, bool amsgrad, bool master, bool record) {
    switch (param) {
        case kF64:
            return update_with<double, void*>(state, amsgrad, record);
        case kF32:
            return update_with<float, void*>(state, amsgrad, record);
        case kBF16:
            return update_with<BF16>(state, amsgrad, master, record);
        default:
            return update_with<F16>(state, amsgrad, master, record);
    }
}

// what `make` makes of an element of a type
template <class Make>
auto of_type(Type type, Make make) {
    switch (type) {
        case kF64:
            return make(double());
        case kF32:
            return make(float());
        case kBF16:
            return make(BF16());
        default:
            return make(F16());
    }
}

SumOfSquares sum_of_squares_for(Type param) {
    return of_type(param, [](auto x) -> SumOfSquares { return sum_of_squares<decltype(x)>; });
}

Finite finite_for(Type param) {
    return of_type(param, [](auto x) -> Finite { return finite<decltype(x)>; });
}

}  // namespace

#define FUSEDLR_NAME_(isa) #isa
#define FUSEDLR_NAME(isa) FUSEDLR_NAME_(isa)
extern const Kernel kernel;
const Kernel kernel = {FUSEDLR_NAME(FUSEDLR_ISA), sum_of_squares_for, update_for, finite_for};

}  // namespace FUSEDLR_ISA
}  // namespace fusedlr

// The step of fusedlr/reference.py in CUDA, with the formulas of schedule.h and adamw.h. NVRTC compiles it
// for the GPU at hand: see fusedlr/backends/gpu/kernels.py. P is the type of parameters, M that of moments;
// with MASTER the state has the rest of the parameters' fp32 values, with RECORD the step is recorded.
//
// A block has one chunk of one tensor. Its first thread finds out what holds for the chunk while the others
// fetch it. The last block of all adds up the sums of squares, or moves the counters: nothing needs the host.
//
// Bytes per parameter in fp32: the update reads p g m v and writes p m v, 28; the norm reads g, 4.
#include "step.h"

#include "../adamw.h"
#include "../guard.h"

namespace fusedlr {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffff;
// slots of a scope that one warp adds up: 2 per lane
constexpr int kWarpSlots = 64;
// slots of a larger scope that a thread has on their way at once, and rows of tensors that it counts at once
constexpr int kSlotsAtOnce = 16;
constexpr int kRowsAtOnce = 2;
// Blocks that a processor is to have room for, with moments or gradients of a type: left to itself, the
// compiler takes registers with which one block less fits.
template <class M>
constexpr int kStepBlocks = sizeof(M) == 4 ? 4 : 3;
template <class P>
constexpr int kNormBlocks = sizeof(P) == 4 ? 6 : 8;
// what torch.nn.utils.clip_grad_norm_ adds to the norm before it divides
constexpr float kClipEps = 1e-6f;
// above the places of all tensors of a group
constexpr int64_t kNoPlace = int64_t(1) << 31;

// the address of a row's gradient, 0 where it is missing
template <int N>
__device__ uint64_t gradient_of(const Launch<N>& launch, int64_t i) {
    return launch.step.gradients ? launch.step.gradients[i] : launch.gradients[i];
}

// n elements that are moved at once, by accesses of 16 bytes where there are that many
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Wide {
    T x[n];
};

// An unsigned type of so many bytes. Elements are read and written as such, by accesses that say that the
// memory is global: a pointer from a table does not, and each access would find out. They stay out of the
// first cache, because nothing is read twice.
template <int bytes>
struct Bits;
template <>
struct Bits<2> {
    using Type = unsigned short;
};
template <>
struct Bits<4> {
    using Type = unsigned;
};
template <>
struct Bits<8> {
    using Type = uint2;
};
template <>
struct Bits<16> {
    using Type = uint4;
};

template <class T>
__device__ T read_global(const T* from) {
    using Type = typename Bits<sizeof(T)>::Type;
    const Type bits = __ldcg(reinterpret_cast<const Type*>(from));
    T x;
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

template <class T>
__device__ void write_global(T* to, const T& x) {
    typename Bits<sizeof(T)>::Type bits;
    std::memcpy(&bits, &x, sizeof(T));
    __stcg(reinterpret_cast<typename Bits<sizeof(T)>::Type*>(to), bits);
}

template <class T>
__device__ T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

// a schedule's phases as schedule.h reads them
struct PhaseRows {
    const PhaseInts* ints;
    const PhaseFloats* floats;

    __device__ Phase<float> operator[](int64_t i) const {
        const PhaseInts& n = ints[i];
        const PhaseFloats& x = floats[i];
        return {n.begin, n.end, n.origin, x.from_, x.to, n.shape, n.whole, x.param_hi + x.param_lo};
    }
};

__device__ const ScopeInts* scope_ints(const Step& step) {
    return reinterpret_cast<const ScopeInts*>(step.group_ints + step.groups);
}

__device__ const ScopeFloats* scope_floats(const Step& step) {
    return reinterpret_cast<const ScopeFloats*>(step.group_floats + step.groups);
}

// what is known of a scope once its sum of squares is
struct Decision {
    float norm, coef;
    float limit;
    float held;  // what a ZClip holds the norm to
    bool skip;
};

__device__ Guard<float> guard_of(const Step& step, int64_t scope) {
    const ScopeFloats& floats = scope_floats(step)[scope];
    return {floats.warmup_steps, floats.z_thresh, floats.one_alpha};
}

__device__ Norms<float> norms_of(const Step& step, int64_t group) {
    const float* const used = step.used + group;
    const int64_t groups = step.groups;
    return {used[k_seen * groups], used[k_mean * groups], used[k_mean_rest * groups],
            used[k_variance * groups], used[k_variance_rest * groups]};
}

__device__ Decision decide(const Step& step, int64_t scope) {
    const ScopeInts ints = scope_ints(step)[scope];
    float highest = scope_floats(step)[scope].max_grad_norm;
    const float norm = ints.normed ? sqrtf(__ldcg(step.squares + scope)) : nanf("");
    const Guard<float> guard = guard_of(step, scope);
    float limit = highest != highest ? __int_as_float(0x7f800000) : highest, held = norm;
    bool spike = false;
    if (guard.one_alpha > 0) {
        const Verdict<float> verdict = judge(norm, norms_of(step, ints.first_group), guard);
        spike = verdict.spike, held = verdict.held;
        limit = highest < held ? highest : held;
        if (spike) highest = limit;
    }
    // a nan stays; without clipping the highest norm is nan
    float coef = highest / (norm + kClipEps);
    if (coef > 1 || highest != highest) coef = 1;
    // anything but 0, nan included
    const bool found = *step.found_inf != 0, bad = !isfinite(norm);
    const bool skip =
        ints.by_own_norm ? bad && (ints.skip_nonfinite || found) : found || (ints.skip_nonfinite && bad);
    return {norm, coef, limit, held, skip || (spike && ints.skip_spikes)};
}

// given: the rate as a number, used where there is neither a schedule nor a rate on the device
__device__ float lr_at(const Step& step, const GroupInts& ints, const GroupFloats& floats, float given,
                       int64_t k) {
    const auto* const phases = reinterpret_cast<const PhaseInts*>(scope_ints(step) + step.scopes);
    const auto* const levels = reinterpret_cast<const PhaseFloats*>(scope_floats(step) + step.scopes);
    const auto* const table = reinterpret_cast<const float*>(levels + step.phases);
    if (ints.first_phase < ints.last_phase) {
        const PhaseRows rows = {phases + ints.first_phase, levels + ints.first_phase};
        return floats.peak * evaluate(rows, ints.last_phase - ints.first_phase, table, k);
    }
    return ints.lr ? *pointer<const float>(uint64_t(ints.lr)) : given;
}

// t: updates made
__device__ Scalars<float> scalars_of(float t, const GroupFloats& floats, float lr, float factor) {
    const double steps = double(t) + 1;
    const float bc1 = bias_correction<float>(steps, double(floats.log_b1_hi) + double(floats.log_b1_lo));
    const float bc2 = bias_correction<float>(steps, double(floats.log_b2_hi) + double(floats.log_b2_lo));
    return {factor * floats.sign,
            lr * floats.weight_decay,
            lr / bc1,
            sqrtf(bc2),
            floats.eps,
            floats.one_b1,
            floats.b2,
            floats.one_b2};
}

// one chunk
struct Place {
    const TensorRow* row;  // null where nothing is to be updated
    uint64_t gradient;
    int64_t begin, count;  // elements of the tensor
};

template <int N>
__device__ Place place(const Launch<N>& launch, const ChunkRow& chunk) {
    // -1 is the empty chunk of a group without elements
    if (chunk.tensor < 0) return {nullptr, 0, 0, 0};
    const uint64_t gradient = gradient_of(launch, chunk.tensor);
    if (!gradient) return {nullptr, 0, 0, 0};
    const TensorRow* const row = launch.step.tensors + chunk.tensor;
    const int64_t begin = chunk.index * kChunkElements, left = row->numel - begin;
    return {row, gradient, begin, left < kChunkElements ? left : kChunkElements};
}

// the elements of a chunk that are moved `each` at a time
__device__ int wide_elements(const Place& place, uint64_t addresses, int each) {
    return addresses % 16 ? 0 : int(place.count / each * each);
}

template <class P, class M, bool AMSGRAD, bool MASTER>
struct Arrays {
    using Rest = typename RestOf<P>::Type;

    P* p;
    const P* g;
    M *m, *v, *v_max;
    Rest* rest;

    Arrays() = default;
    __device__ explicit Arrays(const Place& at)
        : p(pointer<P>(uint64_t(at.row->param)) + at.begin),
          g(pointer<const P>(at.gradient) + at.begin),
          m(pointer<M>(uint64_t(at.row->exp_avg)) + at.begin),
          v(pointer<M>(uint64_t(at.row->exp_avg_sq)) + at.begin),
          // a group without amsgrad may share the launch
          v_max(AMSGRAD && at.row->max_exp_avg_sq ? pointer<M>(uint64_t(at.row->max_exp_avg_sq)) + at.begin
                                                  : nullptr),
          rest(MASTER ? pointer<Rest>(rest_of(*at.row)) + at.begin : nullptr) {}

    // the address of what the state has of the parameter's fp32 value; a parameter has one of the two
    static __device__ uint64_t rest_of(const TensorRow& row) {
        return MASTER ? uint64_t(row.param_remainder | row.master_param) : 0;
    }
};

// what a thread has seen of the elements that it updated: sums of squares, as columns.SUMS has them
struct Observed {
    float unscale;  // what the gradients are multiplied by
    float of[kSums];

    __device__ void add_gradient(float g) {
        g *= unscale;
        of[k_grad] += g * g;
    }
    __device__ void add_change(float before, float after) {
        const float change = after - before;
        of[k_change] += change * change;
        of[k_before] += before * before;
    }
};

// n elements, in registers
template <class P, class M, bool AMSGRAD, bool MASTER, int n>
struct Elements {
    using From = Arrays<P, M, AMSGRAD, MASTER>;

    P p[n], g[n];
    M m[n], v[n], v_max[n];
    typename From::Rest rest[n];

    __device__ void read(const From& from, int i) {
        fetch(p, from.p + i), fetch(g, from.g + i), fetch(m, from.m + i), fetch(v, from.v + i);
        if (MASTER) fetch(rest, from.rest + i);
        if (AMSGRAD && from.v_max) fetch(v_max, from.v_max + i);
    }

    __device__ void write(const From& to, int i) const {
        put(to.p + i, p), put(to.m + i, m), put(to.v + i, v);
        if (MASTER) put(to.rest + i, rest);
        if (AMSGRAD && to.v_max) put(to.v_max + i, v_max);
    }

    // observed is null where nothing is recorded
    __device__ void update(const Scalars<float>& s, bool amsgrad, Observed* observed) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            // a tensor without a maximum may share the launch: it is below every v then
            float p32, m32 = load(m[i]), v32 = load(v[i]), v_max32 = -1;
            if constexpr (MASTER)
                p32 = load_whole(p[i], rest[i]);
            else
                p32 = load(p[i]);
            if (AMSGRAD && amsgrad) v_max32 = load(v_max[i]);
            const float before = p32;
            if (observed) observed->add_gradient(load(g[i]));
            adamw<float>(p32, load(g[i]), m32, v32, AMSGRAD ? &v_max32 : nullptr, s);
            if constexpr (MASTER)
                store_whole(p[i], rest[i], p32);
            else
                store(p[i], p32);
            store(m[i], m32), store(v[i], v32);
            if (AMSGRAD) store(v_max[i], v_max32);
            if (observed) observed->add_change(before, MASTER ? p32 : load(p[i]));
        }
    }

  private:
    // several at once only where that is asked for: n is 1 for tensors that are not aligned
    template <class T>
    static constexpr int each = sizeof(T) * n > 16 ? int(16 / sizeof(T)) : n;

    template <class T>
    static __device__ void fetch(T* to, const T* from) {
#pragma unroll
        for (int i = 0; i < n; i += each<T>) {
            const auto x = read_global(reinterpret_cast<const Wide<T, each<T>>*>(from + i));
            std::memcpy(to + i, &x, sizeof(x));
        }
    }
    template <class T>
    static __device__ void put(T* to, const T* from) {
#pragma unroll
        for (int i = 0; i < n; i += each<T>) {
            Wide<T, each<T>> x;
            std::memcpy(&x, from + i, sizeof(x));
            write_global(reinterpret_cast<Wide<T, each<T>>*>(to + i), x);
        }
    }
};

__device__ float warp_sum(float x) {
#pragma unroll
    for (int away = kWarp / 2; away; away /= 2) x += __shfl_down_sync(kAll, x, away);
    return x;
}

// for the first thread, always in the same order; a barrier lies between two calls
__device__ float block_sum(float x) {
    __shared__ float sums[kThreads / kWarp];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    x = warp_sum(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    if (warp == 0) x = warp_sum(lane < kThreads / kWarp ? sums[lane] : 0);
    return x;
}

// Whether all other blocks of the step have come here before; then the tickets start again. Called by the
// first thread, when all that its block has read of counters and written of partial sums it has read and
// written itself. The ticket releases these, and the fence behind the last one acquires those of the others:
// a fence in front of every ticket would empty the first cache besides.
__device__ bool is_last(int32_t* ticket, int32_t programs) {
    int32_t before;
    asm volatile("atom.global.release.gpu.add.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(ticket))
                 : "memory");
    if (before != programs - 1) return false;
    *ticket = 0;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    return true;
}

// Every `stride`-th of so many partial sums, added one after the other; other blocks have written them. A
// number of them are on their way before the first is added, and what is not there adds nothing.
template <int at_once>
__device__ float sum_slots(const float* partials, int left, int stride) {
    float sum = 0;
    for (; left > 0; left -= at_once * stride, partials += at_once * stride) {
        float x[at_once];
#pragma unroll
        for (int j = 0; j < at_once; ++j) x[j] = j * stride < left ? __ldcg(partials + j * stride) : 0;
#pragma unroll
        for (int j = 0; j < at_once; ++j) sum += x[j];
    }
    return sum;
}

// The sums of squares of all scopes, from those of their chunks. In which order depends on a scope's own
// slots alone, so that its bits are the same whatever other scopes there are.
__device__ void finish_squares(const Step& step) {
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    // scopes of few slots have a warp each
    for (int32_t scope = warp; scope < step.scopes; scope += kThreads / kWarp) {
        const ScopeInts& ints = scope_ints(step)[scope];
        const float* const partials = step.partials + ints.first_slot;
        const int slots = int(ints.last_slot - ints.first_slot);
        if (slots > kWarpSlots) continue;
        const float sum = warp_sum(sum_slots<kWarpSlots / kWarp>(partials + lane, slots - lane, kWarp));
        if (lane == 0) step.squares[scope] = sum;
    }
    // others have all threads, one after the other
    for (int32_t scope = 0; scope < step.scopes; ++scope) {
        const ScopeInts& ints = scope_ints(step)[scope];
        const float* const partials = step.partials + ints.first_slot;
        const int slots = int(ints.last_slot - ints.first_slot);
        if (slots <= kWarpSlots) continue;
        __syncthreads();
        const float sum = block_sum(sum_slots<kSlotsAtOnce>(partials + thread, slots - thread, kThreads));
        if (thread == 0) step.squares[scope] = sum;
    }
}

// whether the step of a group is skipped, as the block has said that has its first chunk
__device__ bool skipped(const Step& step, int64_t group) {
    return __ldcg(step.used + k_skip * step.groups + group) != 0;
}

// a norm enters those that the ZClip of its scope has seen
__device__ void move_norms_of(const Step& step, int64_t scope) {
    const Guard<float> guard = guard_of(step, scope);
    const bool active = step.active[scope];
    const int64_t group = scope_ints(step)[scope].first_group, groups = step.groups;
    if (!active || !(guard.one_alpha > 0)) return;
    float* const used = step.used + group;
    const bool skip = skipped(step, group);
    const float norm = __ldcg(used + k_grad_norm * groups), held = __ldcg(used + k_held * groups);
    Norms<float> norms = norms_of(step, group);
    if (skip || !isfinite(norm)) return;
    move_norms(norms, held, guard);
    used[k_seen * groups] = norms.seen;
    used[k_mean * groups] = norms.mean, used[k_mean_rest * groups] = norms.mean_rest;
    used[k_variance * groups] = norms.variance, used[k_variance_rest * groups] = norms.variance_rest;
}

// Moves the counters of the groups that made the step and of the tensors that were updated, and the norms.
// One block does it alone, so reads that do not need each other's answers are on their way together.
template <int N>
__device__ void count_step(const Launch<N>& launch) {
    const Step& step = launch.step;
    const int32_t groups = step.groups;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < groups; i += kThreads) {
        int64_t* const ks = step.counts + i;
        int64_t *const totals = ks + k_skipped * groups, *const runs = ks + k_skips_in_row * groups;
        const int64_t scope = step.group_ints[i].scope, k = *ks, total = *totals, run = *runs;
        const bool skip = skipped(step, i);
        const int64_t place = __ldcg(ks + k_found * groups);
        if (!step.active[scope]) continue;
        if (place) {
            ks[k_nonfinite * groups] = kNoPlace - place + 1;
            ks[k_nonfinite_step * groups] = k + total;
            ks[k_found * groups] = 0;
        }
        *ks = k + !skip;
        *totals = total + skip;
        *runs = skip ? run + 1 : 0;
    }
#pragma unroll 1
    for (int32_t first = threadIdx.x; first < step.rows; first += kRowsAtOnce * kThreads) {
        int32_t at[kRowsAtOnce];
        int64_t of[kRowsAtOnce];
        float* counters[kRowsAtOnce];
        float counts[kRowsAtOnce];
        bool made[kRowsAtOnce];
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) {
            // in place of a row that is not there a thread counts its first again, which comes to the same
            const int32_t i = first + j * kThreads;
            at[j] = i < step.rows ? i : first, made[j] = true;
        }
        // lanes read addresses that a launch carries one after the other: only where they must
        if (step.some_missing) {
#pragma unroll
            for (int j = 0; j < kRowsAtOnce; ++j) made[j] = gradient_of(launch, at[j]) != 0;
        }
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) {
            const TensorRow& row = step.tensors[at[j]];
            of[j] = row.group, counters[j] = pointer<float>(uint64_t(row.step));
        }
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) {
            made[j] &= !skipped(step, of[j]), counts[j] = read_global(counters[j]);
            of[j] = step.group_ints[of[j]].scope;
        }
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) made[j] &= step.active[of[j]] != 0;
        // written whether it moves or not: a branch in between would hold up the reads
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) write_global(counters[j], counts[j] + (made[j] ? 1.0f : 0.0f));
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < step.scopes; i += kThreads) move_norms_of(step, i);
}

// what holds for a chunk, found out by one thread; row is null where nothing is to be updated. A scope that
// does not make the step is skipped, and reports nothing
__device__ void prepare(const Step& step, const ChunkRow& chunk, const TensorRow* row,
                        Scalars<float>& scalars, float& unscale, bool& skip, bool& look) {
    // all that can be read at once is on its way before anything is computed
    const GroupInts ints = step.group_ints[chunk.group];
    const GroupFloats floats = step.group_floats[chunk.group];
    const float given = step.rates[chunk.group];
    const int64_t k = step.counts[chunk.group];
    const bool active = step.active[chunk.scope];
    const float scale = *step.grad_scale;
    const float t = row ? *pointer<const float>(uint64_t(row->step)) : 0;
    const Decision decision = decide(step, chunk.scope);
    const float lr = lr_at(step, ints, floats, given, k);
    if (active && chunk.first_of_group) {
        float* const used = step.used + chunk.group;
        const int64_t groups = step.groups;
        used[k_lr * groups] = lr, used[k_grad_norm * groups] = decision.norm;
        used[k_coef * groups] = decision.coef, used[k_limit * groups] = decision.limit;
        // for the last block, which counts
        used[k_held * groups] = decision.held, used[k_skip * groups] = decision.skip;
    }
    skip = decision.skip || !active;
    look = decision.skip && active && row;
    unscale = 1 / scale;
    if (row && !skip) scalars = scalars_of(t, floats, lr, unscale * decision.coef);
}

// Looks at the gradient of a chunk that is skipped: whether all of it is finite, for the last block.
template <class P>
__device__ void look_at(const Step& step, const Place& at, Observed& observed) {
    const P* const g = pointer<const P>(at.gradient) + at.begin;
    bool bad = false;
    for (int64_t i = threadIdx.x; i < at.count; i += kThreads) {
        const float x = load(read_global(g + i));
        bad |= !isfinite(x);
        observed.add_gradient(x);
    }
    // the first tensor of the group has the largest of these
    auto* const found = reinterpret_cast<long long*>(step.counts + k_found * step.groups + at.row->group);
    if (bad) atomicMax(found, (long long)(kNoPlace - at.row->place));
}

// for the last block, by the first thread: what all threads have seen of a chunk
__device__ void add_observed(const Step& step, int64_t slot, const Observed& observed) {
    float* const sums = pointer<float>(uint64_t(step.ring->chunk_sums)) + slot;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        if (i) __syncthreads();
        const float sum = block_sum(observed.of[i]);
        if (threadIdx.x == 0) sums[i * step.programs] = sum;
    }
}

// Fills the row of the ring that is this step's; before the step is counted.
template <int N>
__device__ void record_step(const Launch<N>& launch) {
    const Step& step = launch.step;
    const RingInts ring = *step.ring;
    const int64_t groups = step.groups, columns = ring.columns;
    int64_t* const steps = pointer<int64_t>(uint64_t(ring.steps));
    const int64_t number = *steps, row = number % ring.last;
    int64_t* const ints = pointer<int64_t>(uint64_t(ring.ints)) + row * (1 + groups);
    float* const used = pointer<float>(uint64_t(ring.used)) + row * kRecorded * groups;
    float* const sums = pointer<float>(uint64_t(ring.sums)) + row * kSums * columns;
    for (int64_t i = threadIdx.x; i < kSums * columns; i += kThreads) sums[i] = -1;
    for (int64_t i = threadIdx.x; i < groups; i += kThreads) {
        const bool active = step.active[step.group_ints[i].scope];
        ints[1 + i] = active ? step.counts[i] : -1;
        for (int j = 0; j < kRecorded; ++j) {
            const int from = j == k_recorded_skip ? int(k_skip) : j;
            used[j * groups + i] = active ? __ldcg(step.used + from * groups + i) : nanf("");
        }
    }
    // all have read which step it is, and rows without a tensor are marked
    __syncthreads();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const float* const chunk_sums = pointer<const float>(uint64_t(ring.chunk_sums));
    for (int32_t i = warp; columns && i < step.rows; i += kThreads / kWarp) {
        const TensorRow& tensor = step.tensors[i];
        if (!gradient_of(launch, i) || !step.active[step.group_ints[tensor.group].scope]) continue;
        const int slots = int((tensor.numel + kChunkElements - 1) / kChunkElements);
        for (int j = 0; j < kSums; ++j) {
            const float* const of_chunks = chunk_sums + j * step.programs + tensor.slot;
            const float sum = warp_sum(sum_slots<kSlotsAtOnce>(of_chunks + lane, slots - lane, kWarp));
            if (lane == 0) sums[j * columns + tensor.column] = sum;
        }
    }
    if (threadIdx.x == 0) {
        ints[0] = number;
        *steps = number + 1;
    }
}

}  // namespace

// The sum of squares of the unscaled gradients of every scope that needs a norm. Four elements after the
// other are added first, whatever their type and where they lie: equal numbers have sums of equal bits.
template <class P, int N>
__global__ void __launch_bounds__(kThreads, kNormBlocks<P>)
    norm_kernel(const __grid_constant__ Launch<N> launch) {
    constexpr int kEach = 16 / sizeof(P), kRounds = kChunkElements / kEach / kThreads;
    const Step& step = launch.step;
    const int thread = threadIdx.x;
    const ChunkRow chunk = step.chunks[step.first + blockIdx.x];
    // a replay of tensors that are gone: all blocks of the step see the same
    if (*step.generation != step.made_for) return;
    const Place at = place(launch, chunk);
    // nothing of a scope that does not make the step is read
    const int count = scope_ints(step)[chunk.scope].normed && step.active[chunk.scope] ? int(at.count) : 0;
    const int wide = count ? wide_elements(at, at.gradient, kEach) : 0;
    const P* const g = pointer<const P>(at.gradient) + at.begin;
    const float factor = 1 / *step.grad_scale;
    // all on its way before the first is added
    Wide<P, kEach> fetched[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const int i = (r * kThreads + thread) * kEach;
        if (i < wide) fetched[r] = read_global(reinterpret_cast<const Wide<P, kEach>*>(g + i));
    }
    float sums[2] = {};
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const int first = (r * kThreads + thread) * kEach;
#pragma unroll
        for (int h = 0; h < kEach / 4; ++h) {
            const int i = first + 4 * h;
            float squares = 0;
            if (first < wide) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float x = load(fetched[r].x[4 * h + j]) * factor;
                    squares += x * x;
                }
            } else {
#pragma unroll 1
                for (int j = i; j < i + 4 && j < count; ++j) {
                    const float x = load(read_global(g + j)) * factor;
                    squares += x * x;
                }
            }
            sums[kEach == 4 ? r % 2 : h] += squares;
        }
    }
    float sum;
    if constexpr (kEach == 4) {
        sum = sums[0] + sums[1];
    } else {
        // as of fp32 gradients, each thread adds what lies half of all fours apart
        __shared__ float fours[2 * kThreads];
        fours[2 * thread] = sums[0], fours[2 * thread + 1] = sums[1];
        __syncthreads();
        sum = fours[thread] + fours[thread + kThreads];
    }
    sum = block_sum(sum);
    __shared__ bool last;
    if (thread == 0) {
        step.partials[chunk.slot] = sum;
        last = is_last(step.tickets, step.programs);
    }
    __syncthreads();
    if (last) finish_squares(step);
}

// one optimizer step on the tensors of a bucket; the last block of all buckets counts it
template <class P, class M, bool AMSGRAD, bool MASTER, bool RECORD, int N>
__global__ void __launch_bounds__(kThreads, RECORD ? 2 : kStepBlocks<M>)
    step_kernel(const __grid_constant__ Launch<N> launch) {
    // 16 bytes of a moment, so that the accesses of neighbours touch
    constexpr int kEach = 16 / sizeof(M);
    const Step& step = launch.step;
    const int thread = threadIdx.x;
    const ChunkRow chunk = step.chunks[step.first + blockIdx.x];
    if (*step.generation != step.made_for) {
        if (step.first == 0 && blockIdx.x == 0 && thread == 0) ++step.counts[k_stale * step.groups];
        return;
    }
    __shared__ Scalars<float> scalars;
    __shared__ float unscale;
    __shared__ bool skip, look, last;
    const Place at = place(launch, chunk);
    // the first thread fetches its own elements after prepare(): it has no registers for both at once
    if (thread == 0) prepare(step, chunk, at.row, scalars, unscale, skip, look);
    Arrays<P, M, AMSGRAD, MASTER> arrays = {};
    Elements<P, M, AMSGRAD, MASTER, kEach> elements;
    const int count = int(at.count);
    int wide = 0, i = thread * kEach;
    if (count) {
        arrays = Arrays<P, M, AMSGRAD, MASTER>(at);
        const uint64_t moments =
            at.row->exp_avg | at.row->exp_avg_sq | (AMSGRAD ? at.row->max_exp_avg_sq : 0);
        const uint64_t rest = Arrays<P, M, AMSGRAD, MASTER>::rest_of(*at.row);
        wide = wide_elements(at, at.gradient | at.row->param | moments | rest, kEach);
        // on the way while the first thread computes
        if (i < wide) elements.read(arrays, i);
    }
    __syncthreads();
    Observed observed = {unscale, {}};
    if (look) {
        look_at<P>(step, at, observed);
        // before the ticket; sums bring a barrier of their own
        if (!RECORD) __syncthreads();
    }
    // counters have been read; without RECORD nobody waits for what is written from here on
    if (!RECORD && thread == 0) last = is_last(step.tickets + 1, step.programs);
    Observed* const observer = RECORD ? &observed : nullptr;
    if (!skip) {
        const Scalars<float> s = scalars;
        while (i < wide) {
            elements.update(s, arrays.v_max, observer);
            elements.write(arrays, i);
            i += kThreads * kEach;
            if (i < wide) elements.read(arrays, i);
        }
        for (int j = wide + thread; j < count; j += kThreads) {
            Elements<P, M, AMSGRAD, MASTER, 1> one;
            one.read(arrays, j);
            one.update(s, arrays.v_max, observer);
            one.write(arrays, j);
        }
    }
    if (RECORD) {
        add_observed(step, chunk.slot, observed);
        if (thread == 0) last = is_last(step.tickets + 1, step.programs);
    }
    __syncthreads();
    if (!last) return;
    if (RECORD) record_step(launch);
    count_step(launch);
}

}  // namespace fusedlr

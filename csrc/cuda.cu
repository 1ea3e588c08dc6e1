// The step of fusedlr/reference.py in CUDA, with the formulas of schedule.h and adamw.h. setup.py compiles
// this once per type of the parameters, FUSEDLR_TYPE, in namespace FUSEDLR_NAME.
//
// A block has one chunk of one tensor. Its first thread finds out what holds for the chunk while the others
// fetch it. The last block of all adds up the norms, or moves the counters: nothing needs the host.
//
// Bytes per parameter in fp32: the update reads p g m v and writes p m v, 28; the norm reads g, 4.
#include "cuda_step.h"

#include "adamw.h"

namespace fusedlr {
namespace FUSEDLR_NAME {
namespace {

using P = FUSEDLR_TYPE;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffff;
// what torch.nn.utils.clip_grad_norm_ adds to the norm before it divides
constexpr float kClipEps = 1e-6f;

// The parameters of a launch: the fewer bytes, the sooner it starts. Up to 4 KB go through any driver's fast
// path; 32,764 bytes are the most that compute capability 7.0 takes, from CUDA 12.1 on.
template <int N>
struct Launch {
    Step step;
    uint64_t gradients[N];

    __device__ uint64_t gradient(int64_t i) const {
        return step.gradients ? step.gradients[i] : gradients[i];
    }
};
constexpr int kFew = (4096 - sizeof(Step)) / 8;
constexpr int kMany = (32764 - sizeof(Step)) / 8;

// n elements that are moved at once, by accesses of 16 bytes where there are that many
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Wide {
    T x[n];
};

template <class T>
__device__ T* global(uint64_t address) {
    T* const pointer = reinterpret_cast<T*>(address);
    // or each access would find out what kind of memory it is
    __builtin_assume(__isGlobal(pointer));
    return pointer;
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

// what is known of a group once its norm is
struct Decision {
    float norm, coef;
    bool skip;
};

__device__ Decision decide(const Step& step, const GroupInts& ints, const GroupFloats& floats) {
    const float norm = ints.normed ? __ldcg(step.norms + ints.scope) : nanf("");
    const float limit = floats.max_grad_norm;
    // a nan stays; without clipping the limit is nan
    float coef = limit / (norm + kClipEps);
    if (coef > 1 || limit != limit) coef = 1;
    // anything but 0, nan included
    const bool skip = *step.found_inf != 0 || (ints.skip_nonfinite && !isfinite(norm));
    return {norm, coef, skip};
}

__device__ float lr_at(const Step& step, const GroupInts& ints, const GroupFloats& floats, int64_t k) {
    const auto* const phases = reinterpret_cast<const PhaseInts*>(step.group_ints + step.groups);
    const auto* const levels = reinterpret_cast<const PhaseFloats*>(step.group_floats + step.groups);
    const auto* const table = reinterpret_cast<const float*>(levels + step.phases);
    if (ints.first_phase < ints.last_phase) {
        const PhaseRows rows = {phases + ints.first_phase, levels + ints.first_phase};
        return floats.rate * evaluate(rows, ints.last_phase - ints.first_phase, table, k);
    }
    return ints.lr ? *global<const float>(uint64_t(ints.lr)) : floats.rate;
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

// --- one chunk

struct Place {
    const TensorRow* row;
    uint64_t gradient;
    int64_t begin, count;  // elements of the tensor
};

template <int N>
__device__ Place place(const Launch<N>& launch, const ChunkRow& chunk) {
    // -1 is the empty chunk of a group without elements
    if (chunk.tensor < 0) return {nullptr, 0, 0, 0};
    const TensorRow* const row = launch.step.tensors + chunk.tensor;
    const int64_t begin = chunk.index * kChunk, left = row->numel - begin;
    return {row, launch.gradient(chunk.tensor), begin, left < kChunk ? left : kChunk};
}

// the elements of a chunk that are moved `each` at a time
__device__ int wide_elements(const Place& place, uint64_t addresses, int each) {
    return addresses % 16 ? 0 : int(place.count / each * each);
}

template <class M, bool AMSGRAD>
struct Arrays {
    P* p;
    const P* g;
    M *m, *v, *top;

    Arrays() = default;
    __device__ explicit Arrays(const Place& at)
        : p(global<P>(uint64_t(at.row->param)) + at.begin),
          g(global<const P>(at.gradient) + at.begin),
          m(global<M>(uint64_t(at.row->exp_avg)) + at.begin),
          v(global<M>(uint64_t(at.row->exp_avg_sq)) + at.begin),
          // a group without amsgrad may share the launch
          top(AMSGRAD && at.row->top ? global<M>(uint64_t(at.row->top)) + at.begin : nullptr) {}
};

// n elements, in registers
template <class M, bool AMSGRAD, int n>
struct Elements {
    P p[n], g[n];
    M m[n], v[n], top[n];

    __device__ void read(const Arrays<M, AMSGRAD>& from, int i) {
        copy(p, from.p + i), copy(g, from.g + i), copy(m, from.m + i), copy(v, from.v + i);
        if (AMSGRAD && from.top) copy(top, from.top + i);
    }

    __device__ void write(const Arrays<M, AMSGRAD>& to, int i) const {
        copy(to.p + i, p), copy(to.m + i, m), copy(to.v + i, v);
        if (AMSGRAD && to.top) copy(to.top + i, top);
    }

    __device__ void update(const Scalars<float>& s, bool amsgrad) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            // below every second moment where there is no largest one
            float x = load(p[i]), first = load(m[i]), second = load(v[i]), largest = -1;
            if (AMSGRAD && amsgrad) largest = load(top[i]);
            adamw<float>(x, load(g[i]), first, second, AMSGRAD ? &largest : nullptr, s);
            store(p[i], x), store(m[i], first), store(v[i], second);
            if (AMSGRAD) store(top[i], largest);
        }
    }

  private:
    template <class T>
    static __device__ void copy(T* to, const T* from) {
        if (n == 1)
            *to = *from;
        else
            *reinterpret_cast<Wide<T, n>*>(to) = *reinterpret_cast<const Wide<T, n>*>(from);
    }
};

// --- one block

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
// written itself.
__device__ bool is_last(int32_t* ticket, int32_t programs) {
    __threadfence();
    if (atomicAdd(ticket, 1) != programs - 1) return false;
    *ticket = 0;
    __threadfence();
    return true;
}

// partial sums from `first` on, every `stride`-th; other blocks have written them
__device__ float sum_slots(const float* partials, int64_t first, int64_t last, int stride) {
    float sum = 0;
    for (int64_t i = first; i < last; i += stride) sum += __ldcg(partials + i);
    return sum;
}

// the norms of all scopes, from the partial sums of their chunks
__device__ void finish_norms(const Step& step) {
    const float* const partials = step.norms + step.groups;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // all groups together
    if (step.group_ints[0].last_slot - step.group_ints[0].first_slot == step.programs) {
        const float sum = block_sum(sum_slots(partials, threadIdx.x, step.programs, kThreads));
        if (threadIdx.x == 0) step.norms[0] = sqrtf(sum);
        return;
    }
    // or each group by itself, a warp for each
    for (int32_t scope = warp; scope < step.groups; scope += kThreads / kWarp) {
        const GroupInts& ints = step.group_ints[scope];
        const float sum = warp_sum(sum_slots(partials, ints.first_slot + lane, ints.last_slot, kWarp));
        if (lane == 0) step.norms[scope] = sqrtf(sum);
    }
}

// moves the counters of all groups and of the tensors that were updated
__device__ void count_step(const Step& step) {
    const int32_t groups = step.groups;
    for (int32_t i = threadIdx.x; i < groups; i += kThreads) {
        const GroupInts& ints = step.group_ints[i];
        if (!ints.active) continue;
        const bool skip = decide(step, ints, step.group_floats[i]).skip;
        int64_t *const k = step.counters + i, *const skipped = k + groups, *const in_row = skipped + groups;
        *k += skip ? 0 : ints.advance;
        *skipped += skip;
        *in_row = skip ? *in_row + 1 : 0;
    }
    for (int32_t i = threadIdx.x; i < step.count; i += kThreads) {
        const TensorRow& row = step.tensors[i];
        const bool skip = decide(step, step.group_ints[row.group], step.group_floats[row.group]).skip;
        if (!skip) *global<float>(uint64_t(row.step)) += 1;
    }
}

// what holds for a chunk, found out by one thread; row is null where the chunk has no elements
__device__ void prepare(const Step& step, const ChunkRow& chunk, const TensorRow* row,
                        Scalars<float>& scalars, bool& skip) {
    // all that can be read at once is on its way before anything is computed
    const GroupInts ints = step.group_ints[chunk.group];
    const GroupFloats floats = step.group_floats[chunk.group];
    const int64_t k = step.counters[chunk.group];
    const float scale = *step.grad_scale;
    const float t = row ? *global<const float>(uint64_t(row->step)) : 0;
    const Decision decision = decide(step, ints, floats);
    const float lr = lr_at(step, ints, floats, k);
    if (chunk.leads) {
        float* const used = step.used + chunk.group;
        used[0] = lr, used[step.groups] = decision.norm, used[2 * step.groups] = decision.coef;
    }
    skip = decision.skip;
    if (row && !skip) scalars = scalars_of(t, floats, lr, 1 / scale * decision.coef);
}

// --- the kernels

// the L2 norm of the unscaled gradients of every scope that needs one
template <int N>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Launch<N> launch) {
    constexpr int kEach = 16 / sizeof(P), kRounds = kChunk / kEach / kThreads;
    const Step& step = launch.step;
    const int thread = threadIdx.x;
    const ChunkRow chunk = step.chunks[step.first + blockIdx.x];
    // a replay of tensors that are gone: all blocks of the step see the same
    if (*step.alive != step.now) return;
    const Place at = place(launch, chunk);
    const int count = step.group_ints[chunk.group].normed ? int(at.count) : 0;
    const int wide = count ? wide_elements(at, at.gradient, kEach) : 0;
    const P* const g = global<const P>(at.gradient) + at.begin;
    const float factor = 1 / *step.grad_scale;
    // all on its way before the first is added
    Wide<P, kEach> some[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const int i = (r * kThreads + thread) * kEach;
        if (i < wide) some[r] = *reinterpret_cast<const Wide<P, kEach>*>(g + i);
    }
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        if ((r * kThreads + thread) * kEach >= wide) break;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const float x = load(some[r].x[j]) * factor;
            sum += x * x;
        }
    }
    for (int i = wide + thread; i < count; i += kThreads) {
        const float x = load(g[i]) * factor;
        sum += x * x;
    }
    sum = block_sum(sum);
    __shared__ bool last;
    if (thread == 0) {
        step.norms[step.groups + chunk.slot] = sum;
        last = is_last(step.tickets, step.programs);
    }
    __syncthreads();
    if (last) finish_norms(step);
}

// one optimizer step on the tensors of a bucket; the last block of all buckets counts it
template <int N, class M, bool AMSGRAD>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const __grid_constant__ Launch<N> launch) {
    // 16 bytes of a moment, so that the accesses of neighbours touch
    constexpr int kEach = 16 / sizeof(M);
    const Step& step = launch.step;
    const int thread = threadIdx.x;
    const ChunkRow chunk = step.chunks[step.first + blockIdx.x];
    if (*step.alive != step.now) {
        if (step.first == 0 && blockIdx.x == 0 && thread == 0) ++step.counters[3 * step.groups];
        return;
    }
    __shared__ Scalars<float> scalars;
    __shared__ bool skip, last;
    const Place at = place(launch, chunk);
    // it reads its own elements afterwards, having no registers for both
    if (thread == 0) prepare(step, chunk, at.row, scalars, skip);
    Arrays<M, AMSGRAD> arrays = {};
    Elements<M, AMSGRAD, kEach> some;
    const int count = int(at.count);
    int wide = 0, i = thread * kEach;
    if (count) {
        arrays = Arrays<M, AMSGRAD>(at);
        const uint64_t moments = at.row->exp_avg | at.row->exp_avg_sq | (AMSGRAD ? at.row->top : 0);
        wide = wide_elements(at, at.gradient | at.row->param | moments, kEach);
        // on the way while the first thread computes
        if (i < wide) some.read(arrays, i);
    }
    __syncthreads();
    // counters have been read; nobody waits for what is written from here on
    if (thread == 0) last = is_last(step.tickets + 1, step.programs);
    if (!skip) {
        const Scalars<float> s = scalars;
        while (i < wide) {
            some.update(s, arrays.top);
            some.write(arrays, i);
            i += kThreads * kEach;
            if (i < wide) some.read(arrays, i);
        }
        for (int j = wide + thread; j < count; j += kThreads) {
            Elements<M, AMSGRAD, 1> one;
            one.read(arrays, j);
            one.update(s, arrays.top);
            one.write(arrays, j);
        }
    }
    __syncthreads();
    if (last) count_step(step);
}

// --- from the host

#ifdef __CUDACC__
template <class L>
const char* launch_kernel(void (*kernel)(L), const L& launch, unsigned blocks, unsigned threads,
                          void* stream) {
    void* arguments[] = {const_cast<L*>(&launch)};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// has its code loaded, which a launch while a CUDA graph is captured could not
template <class L>
const char* load_kernel(void (*kernel)(L)) {
    cudaFuncAttributes unused;
    const cudaError_t error = cudaFuncGetAttributes(&unused, reinterpret_cast<const void*>(kernel));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

template <int N>
void fill(Launch<N>& launch, const Step& step, const uintptr_t* gradients) {
    launch.step = step;
    if (gradients) std::memcpy(launch.gradients, gradients, size_t(step.count) * 8);
}

template <int N>
const char* norm(const Step& step, unsigned blocks, const uintptr_t* gradients, void* stream) {
    Launch<N> launch;
    fill(launch, step, gradients);
    return launch_kernel(norm_kernel<N>, launch, blocks, kThreads, stream);
}

template <int N>
auto step_kernel_for(Type moments, bool amsgrad) {
    if (moments == kF32) return amsgrad ? step_kernel<N, float, true> : step_kernel<N, float, false>;
    return amsgrad ? step_kernel<N, P, true> : step_kernel<N, P, false>;
}

template <int N>
const char* update(const Step& step, unsigned blocks, Type moments, bool amsgrad, const uintptr_t* gradients,
                   void* stream) {
    Launch<N> launch;
    fill(launch, step, gradients);
    return launch_kernel(step_kernel_for<N>(moments, amsgrad), launch, blocks, kThreads, stream);
}

template <int N>
const char* load_all(Type moments) {
    const char* error = load_kernel(norm_kernel<N>);
    for (const bool amsgrad : {false, true})
        if (!error) error = load_kernel(step_kernel_for<N>(moments, amsgrad));
    return error;
}

const char* load_of(Type moments) {
    const char* const error = load_all<kFew>(moments);
    return error ? error : load_all<kMany>(moments);
}

bool few(const Step& step, const uintptr_t* gradients) { return !gradients || step.count <= kFew; }

const char* norm_of(const Step& step, unsigned blocks, const uintptr_t* gradients, void* stream) {
    return few(step, gradients) ? norm<kFew>(step, blocks, gradients, stream)
                                : norm<kMany>(step, blocks, gradients, stream);
}

const char* update_of(const Step& step, unsigned blocks, Type moments, bool amsgrad,
                      const uintptr_t* gradients, void* stream) {
    return few(step, gradients) ? update<kFew>(step, blocks, moments, amsgrad, gradients, stream)
                                : update<kMany>(step, blocks, moments, amsgrad, gradients, stream);
}

}  // namespace

extern const Launches launches;
const Launches launches = {norm_of, update_of, load_of, kMany};

}  // namespace FUSEDLR_NAME
}  // namespace fusedlr

// Every loop of the C++ kernel on memory of exactly the size it may touch, for the sanitizers to watch.
#include <cstdio>
#include <cstdlib>

#include "cpu/step.h"

using namespace fusedlr;

namespace {

// who races does so whatever the type
#ifdef FEW
constexpr Type kParams[] = {kF32};
#else
constexpr Type kParams[] = {kF64, kF32, kBF16, kF16};
#endif

// two for each of nine shapes, two before and after, one that is skipped, one more
constexpr int kSteps = 22;

// on the heap and no byte longer than its elements, so that one step too far is seen
struct Memory {
    explicit Memory(int64_t bytes) : data(static_cast<char*>(std::calloc(bytes ? size_t(bytes) : 1, 1))) {}
    ~Memory() { std::free(data); }
    Memory(const Memory&) = delete;
    char* data;
};

// one phase of every shape, the first of them after a step
Schedule<double> every_shape() {
    Schedule<double> schedule;
    for (int64_t shape = kConstant; shape <= kTable; ++shape) {
        const int64_t whole = shape == kRestarts ? 2 : shape == kTable || shape == kCosine ? 1 : 0;
        const double shape_param = shape == kCosine ? 0.4 : 2;
        const int64_t begin = 1 + 2 * shape;
        schedule.phases.push_back({begin, begin + 2, begin, 0.25, 1, shape, whole, shape_param});
    }
    // read from `whole` on: the two steps of the phase and its end
    schedule.table = {-1, 0.5, 0.25, 1};
    return schedule;
}

// tensors start `offset` elements into what malloc aligned
void run(const Kernel& kernel, Type param, Type moments, bool amsgrad, bool joint, int threads, int offset) {
    // together more than one thread takes on its own
    const std::vector<int64_t> sizes = {0, 1, 3, 15, 16, 17, 1023, 1025, 8192, 8193, 90001};
    const size_t n = sizes.size();
    std::vector<std::unique_ptr<Memory>> memory;
    const auto allocate = [&](int64_t elements, int64_t size) {
        memory.push_back(std::make_unique<Memory>((elements + offset) * size));
        return reinterpret_cast<uintptr_t>(memory.back()->data + offset * size);
    };
    std::vector<Row> rows;
    std::vector<uintptr_t> gradients;
    for (size_t i = 0; i < n; ++i) {
        rows.push_back({i < 5 ? size_t(0) : size_t(2),
                        param,
                        moments,
                        sizes[i],
                        allocate(sizes[i], size_of(param)),
                        {},
                        allocate(1, sizeof(float)),
                        int64_t(i),
                        int64_t(n - 1 - i)});
        for (int j = 0; j < kStates; ++j) {
            const bool of_other =
                (j == k_param_remainder && param != kBF16) || (j == k_master_param && param != kF16);
            // what an option asks for: the largest moment, the rest of a 16-bit parameter's fp32 value
            const bool optional = j != k_exp_avg && j != k_exp_avg_sq;
            if (!of_other && (amsgrad || !optional))
                rows.back().states[size_t(j)] =
                    allocate(sizes[i], kStateBytes[j] ? kStateBytes[j] : size_of(moments));
        }
        gradients.push_back(allocate(sizes[i], size_of(param)));
    }
    std::vector<int64_t> k(3), skipped(3), in_row(3), nonfinite(3), nonfinite_step(3);
    std::vector<double> lr(3), norm(3), coef(3), limit(3), squares(3);
    std::vector<std::vector<double>> norms(kUsed - k_seen, std::vector<double>(3));
    Counters counters = {
        k.data(),      skipped.data(), in_row.data(), nonfinite.data(), nonfinite_step.data(),
        lr.data(),     norm.data(),    coef.data(),   limit.data(),     {},
        squares.data()};
    for (size_t i = 0; i < norms.size(); ++i) counters.norms[i] = norms[i].data();
    // some record, into a ring of fewer steps than there are
    constexpr size_t kLast = 5;
    std::vector<int64_t> steps(1), ints(kLast * 4);
    std::vector<double> used(kLast * kRecorded * 3), sums(kLast * kSums * n);
    Ring ring;
    if (threads != 2)
        ring = {steps.data(), ints.data(), used.data(), sums.data(), int64_t(kLast), int64_t(n)};
    Stepper stepper(rows, 3, counters, ring, kernel);
    const auto schedule = std::make_shared<Schedule<double>>(every_shape());
    const size_t of_last = joint ? 0 : 2;
    const Group first = {schedule, 0.1, 0.9, 0.999, 1e-8, 0.1, false, 0};
    const Group none = {nullptr, 0, 0, 0, 1e-8, 0.1, true, size_t(!joint)};
    const Group last = {nullptr, 0, 0, 0, 1e-8, 0.1, true, of_last};
    // a ZClip that looks at every norm but the first
    const Scope clipped = {true, 1.0, true, joint, false, {1, 2.5, 0.5}}, plain = {false, 0, false, false};
    stepper.assign({first, none, last},
                   joint ? std::vector<Scope>{clipped} : std::vector<Scope>{clipped, plain, plain});
    const std::vector<double> rates = {0, 0.1, 0.1};
    for (int i = 0; i < kSteps; ++i) {
        const std::vector<uintptr_t> missing(n);
        const Inputs inputs = {gradients.data(), rates.data(), i % 2 ? 1 : 0.25, i == 3, threads};
        // every other step stage by stage
        if (i % 2) {
            stepper.run(kNorm, inputs);
            stepper.run(kUpdate, inputs);
        } else {
            stepper.run(kNorm | kUpdate, inputs);
        }
        // a step without gradients reads and writes no tensor
        if (!joint) stepper.run(kNorm | kUpdate, {missing.data(), rates.data(), 1, false, threads});
    }
    if (ring.steps && steps[0] != (joint ? kSteps : 2 * kSteps)) std::abort();
    if (k[0] != kSteps - 1 || k[1] != (joint ? kSteps - 1 : 0) || lr[0] != 0.1) std::abort();
}

}  // namespace

int main() {
    for (const Kernel* kernel : kernels()) {
        for (const Type param : kParams) {
            for (const Type moments : {kF64, kF32, param}) {
                for (const bool flag : {false, true}) {
                    run(*kernel, param, moments, flag, !flag, 1, 1);
                    run(*kernel, param, moments, flag, flag, 2, 0);
                    run(*kernel, param, moments, !flag, flag, 3, 1);
                }
            }
        }
        std::puts(kernel->name);
    }
}

// Every loop of the C++ kernel on memory of exactly the size it may touch, for the sanitizers to watch.
#include <cstdio>
#include <cstdlib>

#include "cpu.h"

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
        const double shape_param = shape == kTable ? 1 : shape == kCosine ? 0.7 : 2;
        const int64_t begin = 1 + 2 * shape;
        schedule.phases.push_back({begin, begin + 2, begin, 0.25, 1, shape, shape_param});
    }
    // read from shape_param on: the two steps of the phase and its end
    schedule.table = {-1, 0.5, 0.25, 1};
    return schedule;
}

// tensors start `offset` elements into what malloc aligned
void run(const Kernel& kernel, Type param, Type moments, bool amsgrad, bool joint, int threads, int offset) {
    // together more than one thread takes on its own
    const std::vector<int64_t> sizes = {0, 1, 3, 15, 16, 17, 1023, 1025, 8192, 8193, 90001};
    const size_t n = sizes.size();
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<uintptr_t> columns[6];
    for (const int64_t size : sizes) {
        for (int i = 0; i < 6; ++i) {
            const int64_t element = i < 2   ? size_of(param)
                                    : i < 5 ? size_of(moments)
                                            : int64_t(sizeof(float));
            const int64_t n = i < 5 ? size : 1;
            memory.push_back(std::make_unique<Memory>((n + offset) * element));
            columns[i].push_back(reinterpret_cast<uintptr_t>(memory.back()->data + offset * element));
        }
    }
    if (!amsgrad) columns[4].clear();
    Tensors tensors(std::vector<int>(n, param), std::vector<int>(n, moments), sizes, columns[0], columns[2],
                    columns[3], columns[4], columns[5]);
    const auto schedule = std::make_shared<Schedule<double>>(every_shape());
    const Group first = {0, schedule, 0, 0.1, 0.9, 0.999, 1e-8, 0.1, false, true, 1.0, true, true};
    const Group none = {1, nullptr, 0.1, 0, 0, 0, 1e-8, 0.1, true, false, 0, false, false};
    const Group last = {2, nullptr, 0.1, 0, 0, 0, 1e-8, 0.1, true, false, 0, false, true};
    std::vector<int64_t> k(3), skipped(3), in_row(3);
    std::vector<double> lr(3), norm(3), coef(3);
    const Counters counters = {k.data(), skipped.data(), in_row.data(), lr.data(), norm.data(), coef.data()};
    for (int i = 0; i < kSteps; ++i) {
        tensors.step(columns[1], kernel, {&first, &none, &last}, {5, 0, int64_t(n) - 5}, counters,
                     {i % 2 == 0, 4.0, i == 3}, joint, threads);
    }
    if (k[0] != kSteps - 1 || k[1] != 0 || lr[0] != 0.1) std::abort();
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

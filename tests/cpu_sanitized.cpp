// Every loop of the C++ kernel on memory of exactly the size it may touch, for the sanitizers to watch.
#include <cstdio>
#include <cstdlib>

#include "cpu.h"

using namespace fusedlr;

namespace {

// on the heap and no byte longer than its elements, so that one step too far is seen
struct Memory {
    explicit Memory(int64_t bytes) : data(static_cast<char*>(std::calloc(bytes ? size_t(bytes) : 1, 1))) {}
    ~Memory() { std::free(data); }
    Memory(const Memory&) = delete;
    char* data;
};

void run(const Kernel& kernel, Type param, Type moments, bool amsgrad, bool joint, int threads) {
    const std::vector<int64_t> sizes = {0, 1, 3, 15, 16, 17, 1023, 1025, 8192, 8193, 70001};
    const size_t n = sizes.size();
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<uintptr_t> columns[6];
    for (const int64_t size : sizes) {
        const int64_t bytes[6] = {size * size_of(param),   size * size_of(param),   size * size_of(moments),
                                  size * size_of(moments), size * size_of(moments), 4};
        for (int i = 0; i < 6; ++i) {
            memory.push_back(std::make_unique<Memory>(bytes[i]));
            columns[i].push_back(reinterpret_cast<uintptr_t>(memory.back()->data));
        }
    }
    if (!amsgrad) columns[4].clear();
    Tensors tensors(std::vector<int>(n, param), std::vector<int>(n, moments), sizes, columns[0], columns[2],
                    columns[3], columns[4], columns[5]);
    auto schedule = std::make_shared<Schedule<double>>();
    schedule->phases = {
        {0, 5, 0, 0, 1, kLinear, 0}, {5, 9, 5, 1, 0, kCosine, 0.5}, {9, 10, 9, 0, 1, kTable, 0}};
    schedule->table = {0.5, 0.25};
    const Group first = {0, schedule, 0, 0.1, 0.9, 0.999, 1e-8, 0.1, false, true, 1.0, true, true};
    const Group none = {1, nullptr, 0.1, 0, 0, 0, 1e-8, 0.1, true, false, 0, false, false};
    const Group last = {2, nullptr, 0.1, 0, 0, 0, 1e-8, 0.1, true, false, 0, false, true};
    std::vector<int64_t> k(3), skipped(3), in_row(3);
    std::vector<double> lr(3), norm(3), coef(3);
    const Counters counters = {k.data(), skipped.data(), in_row.data(), lr.data(), norm.data(), coef.data()};
    for (int i = 0; i < 12; ++i) {
        tensors.place_gradients(columns[1]);
        tensors.step(kernel, {&first, &none, &last}, {5, 0, int64_t(n) - 5}, counters,
                     {i % 2 == 0, 4.0, i == 3}, joint, threads);
    }
}

}  // namespace

int main() {
    for (const Kernel* kernel : kernels()) {
        for (const Type param : {kF64, kF32, kBF16, kF16}) {
            for (const Type moments : {kF64, kF32, param}) {
                for (const bool flag : {false, true}) {
                    run(*kernel, param, moments, flag, !flag, 1);
                    run(*kernel, param, moments, flag, flag, 2);
                }
            }
        }
        std::puts(kernel->name);
    }
}

// The machine as a library: PTX in, launches on the memory of this process, reports out. Called by
// machine.py; and, as CUDA's driver, by csrc/cuda/, whose launches are the project's own.
#include <memory>
#include <mutex>
#include <set>

#include "execute.h"

namespace {

std::vector<std::unique_ptr<Module>> modules;
std::map<std::string, const Function*> active;  // what launches find by a kernel's name
std::map<const Function*, std::vector<std::unique_ptr<Block>>> pools;  // blocks that have run, by kernel
std::set<std::string> functions;  // names that cuModuleGetFunction has given handles of
std::string last_error, text;
using Callback = void (*)();
Callback before_launch;
long launches_until_failure = -1;
std::mutex one_at_a_time;

int launch(const std::string& name, u32 blocks, u32 threads, const void* parameters, size_t bytes,
           int dynamic) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    auto found = active.find(name);
    if (found == active.end()) {
        last_error = "no kernel " + name;
        return 1;
    }
    if (launches_until_failure >= 0 && launches_until_failure-- == 0) {
        last_error = "this launch is to fail";
        return 1;
    }
    if (before_launch) before_launch();
    running = found->second;
    blocks_of_launch = blocks, threads_of_launch = threads;
    if (running->threads && u32(running->threads) != threads) {
        last_error = "wrong number of threads";
        return 1;
    }
    params.assign(static_cast<const uint8_t*>(parameters), static_cast<const uint8_t*>(parameters) + bytes);
    if (int(bytes) != running->param_bytes) {
        last_error = "wrong number of bytes of parameters";
        return 1;
    }
    std::sort(allocations.begin(), allocations.end(), [](const Allocation& a, const Allocation& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end > b.end;
    });
    std::vector<Allocation> kept;
    for (auto& a : allocations) {
        if (a.begin == a.end) continue;
        if (!kept.empty() && a.begin < kept.back().end) {
            if (a.end <= kept.back().end) continue;
            reports.add(OTHER, "overlap", [&] { return "allocations overlap: " + names[a.name]; });
            continue;
        }
        kept.push_back(std::move(a));
    }
    allocations = std::move(kept);
    for (auto& a : allocations) {
        if (settings.races) a.cells.assign((a.end - a.begin + u64(a.granule) - 1) / u64(a.granule), Cell());
        a.defined = nullptr;
        if (a.tracked) {
            auto& d = defined_at[a.begin];
            if (d.size() != a.end - a.begin) d.assign(a.end - a.begin, 0);
            a.defined = &d;
        }
    }
    readers.clear(), atomic_words.clear();
    atomic_words.reserve(kAtomicWords);
    caches.assign(running->code.size(), Cache());
    rng_state = (settings.seed + 1) * 0x9e3779b97f4a7c15ull ^ u64(++stats.launches) * 0x2545f4914f6cdd1dull;
    if (!rng_state) rng_state = 1;
    Machine machine;
    machine.dynamic_shared = dynamic;
    machine.pool = std::move(pools[running]);
    try {
        machine.launch();
    } catch (const std::exception& e) {
        last_error = e.what();
        return 1;
    }
    // blocks are kept by kernel, as their registers are most of what there is to allocate
    if (pools.size() > 40) pools.clear();
    pools[running] = std::move(machine.pool);
    if (pools[running].size() > 8) pools[running].resize(8);
    return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int machine_load(const char* ptx) {
    try {
        modules.push_back(parse(ptx));
        return int(modules.size()) - 1;
    } catch (const std::exception& e) {
        last_error = e.what();
        return -1;
    }
}
// Launches find the kernels of this module from now on: by their names, or its only one by an alias.
API void machine_activate(int module, const char* alias) {
    for (auto& f : modules[size_t(module)]->functions)
        active[alias && *alias ? std::string(alias) : f->name] = f.get();
}
// Forget a module, whose kernels are found no more.
API void machine_unload(int module) {
    for (auto& f : modules[size_t(module)]->functions)
        for (auto at = active.begin(); at != active.end();)
            at = at->second == f.get() ? active.erase(at) : std::next(at);
    pools.clear();
    modules[size_t(module)].reset();
}
API const char* machine_error() { return last_error.c_str(); }
API void machine_clear_allocs() { allocations.clear(), names.clear(); }
API void machine_alloc(uint64_t address, uint64_t bytes, int granule, int tracked, const char* name) {
    names.push_back(name);
    Allocation a = {address, address + bytes, granule, int(names.size()) - 1, tracked != 0, {}, nullptr};
    allocations.push_back(std::move(a));
}
API void machine_forget(uint64_t address) { defined_at.erase(address); }
API void machine_settings(uint64_t seed, int approx, int resident, int burst, int split, int order,
                          int races) {
    settings.seed = seed, settings.approx = approx, settings.resident = resident, settings.burst = burst;
    settings.split = split, settings.order = order, settings.races = races != 0;
}
// The launch after so many more fails, once.
API void machine_fail_after(long launches) { launches_until_failure = launches; }
// By kernel: its instructions that have run in some launch, and all it has.
API const char* machine_coverage() {
    text.clear();
    for (auto& [name, f] : active) {
        long ran = std::count(f->ran.begin(), f->ran.end(), 1);
        // the last one stands for falling off the end
        text += name + " " + std::to_string(ran) + " " + std::to_string(f->code.size() - 1) + "\n";
    }
    return text.c_str();
}
API void machine_before_launch(Callback callback) { before_launch = callback; }
// 0 if there is no such kernel
API int machine_param_bytes(const char* name) {
    auto found = active.find(name);
    return found == active.end() ? 0 : found->second->param_bytes;
}
API int machine_launch(const char* name, uint32_t blocks, uint32_t threads, const void* parameters,
                       uint64_t bytes, int dynamic) {
    return launch(name, blocks, threads, parameters, bytes, dynamic);
}
API void machine_reset_reports() { reports = Reports(); }
API const char* machine_reports() {
    text.clear();
    for (auto& [kind, what] : reports.first) text += std::string(kKindNames[kind]) + ": " + what + "\n";
    return text.c_str();
}
API void machine_stats(long* out) {
    out[0] = stats.launches, out[1] = stats.instructions, out[2] = stats.generic, out[3] = stats.wide,
    out[4] = stats.narrow;
    out[5] = stats.divergent_bars, out[6] = stats.approx;
}

// What csrc/cuda/driver.cpp calls of CUDA's driver: one device, whose memory is this process's. A function is
// its kernel's name, and it runs whichever kernel of that name is active when it is launched.

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* version) {
    *version = 13050;
    return 0;
}
API int cuGetErrorName(int, const char** name) {
    *name = "an error of the machine";
    return 0;
}
API int cuGetErrorString(int, const char** text) {
    *text = last_error.c_str();
    return 0;
}
API int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return 0;
}
// of compute capability 9.0
API int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 9 : 0;
    return 0;
}
API int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = &functions;
    return 0;
}
API int cuCtxGetCurrent(void** context) { return cuDevicePrimaryCtxRetain(context, 0); }
API int cuCtxSetCurrent(void*) { return 0; }
API int cuModuleLoadData(void** module, const void*) { return cuDevicePrimaryCtxRetain(module, 0); }
API int cuModuleGetFunction(const void** function, void*, const char* name) {
    *function = &*functions.insert(name).first;
    return 0;
}
API int cuFuncGetAttribute(int* value, int, const void*) {
    *value = 0;
    return 0;
}
API int cuLaunchKernel(const void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned dynamic, void*,
                       void** parameters, void**) {
    const std::string& name = *static_cast<const std::string*>(function);
    auto kernel = active.find(name);
    if (kernel == active.end()) {
        last_error = "not loaded: " + name;
        return 98;
    }
    return launch(name, grid_x * grid_y * grid_z, block_x * block_y * block_z, parameters[0],
                  size_t(kernel->second->param_bytes), int(dynamic))
               ? 719
               : 0;
}

#include "driver.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>

namespace fusedlr {
namespace {

Driver loaded = {};
bool is_loaded = false;
std::mutex loading;

template <class F>
void find(void* library, F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + name);
}

// under the lock
void open(const char* name) {
    void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("there is no CUDA driver: ") + dlerror());
    Driver d = {};
    find(library, d.cuInit, "cuInit");
    find(library, d.cuDriverGetVersion, "cuDriverGetVersion");
    find(library, d.cuGetErrorName, "cuGetErrorName");
    find(library, d.cuGetErrorString, "cuGetErrorString");
    find(library, d.cuDeviceGet, "cuDeviceGet");
    find(library, d.cuDeviceGetAttribute, "cuDeviceGetAttribute");
    find(library, d.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(library, d.cuCtxGetCurrent, "cuCtxGetCurrent");
    find(library, d.cuCtxSetCurrent, "cuCtxSetCurrent");
    find(library, d.cuModuleLoadData, "cuModuleLoadData");
    find(library, d.cuModuleGetFunction, "cuModuleGetFunction");
    find(library, d.cuFuncGetAttribute, "cuFuncGetAttribute");
    find(library, d.cuLaunchKernel, "cuLaunchKernel");
    loaded = d, is_loaded = true;
}

}  // namespace

void open_driver(const char* library) {
    const std::lock_guard<std::mutex> lock(loading);
    if (!is_loaded) open(library);
}

const Driver& driver() {
    if (!is_loaded) open_driver("libcuda.so.1");
    return loaded;
}

void check(int error, const char* what) {
    if (!error) return;
    const char *name = nullptr, *text = nullptr;
    driver().cuGetErrorName(error, &name);
    driver().cuGetErrorString(error, &text);
    throw std::runtime_error(std::string("CUDA could not ") + what + ": " + (name ? name : "unknown error") +
                             (text ? std::string(", ") + text : ""));
}

void use_device(int ordinal) {
    const Driver& d = driver();
    Context context = nullptr;
    if (!d.cuCtxGetCurrent(&context) && context) return;
    check(d.cuInit(0), "start its driver");
    int device = 0;
    check(d.cuDeviceGet(&device, ordinal), "find the device");
    check(d.cuDevicePrimaryCtxRetain(&context, device), "make a context");
    check(d.cuCtxSetCurrent(context), "make a context current");
}

}  // namespace fusedlr

// What the launches need of CUDA's driver, which is looked for when it is first needed: a module that is
// imported where there is none says so when it is asked to launch. No header of CUDA's is needed.
#pragma once

#include <cstdint>
#include <string>

namespace fusedlr {

// names and types as in CUDA's cuda.h, but for what points to nothing that is looked at here
using Context = void*;
using Function = void*;
using Stream = void*;

struct Driver {
    int (*cuInit)(unsigned flags);
    int (*cuDriverGetVersion)(int* version);
    int (*cuGetErrorName)(int error, const char** name);
    int (*cuGetErrorString)(int error, const char** text);
    int (*cuDeviceGet)(int* device, int ordinal);
    int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
    int (*cuDevicePrimaryCtxRetain)(Context* context, int device);
    int (*cuCtxGetCurrent)(Context* context);
    int (*cuCtxSetCurrent)(Context context);
    int (*cuModuleLoadData)(void** module, const void* image);
    int (*cuModuleGetFunction)(Function* function, void* module, const char* name);
    int (*cuFuncGetAttribute)(int* value, int attribute, Function function);
    int (*cuLaunchKernel)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                          Stream stream, void** parameters, void** extra);
};

// Loads the library, or says why it cannot: a std::runtime_error. The first that has been opened stays.
void open_driver(const char* library);
// the driver that has been opened, or else the system's
const Driver& driver();
// throws a std::runtime_error with what the driver says of an error; `what` could not be done
void check(int error, const char* what);

// makes the primary context of a device current in this thread where none is, as CUDA's runtime does
void use_device(int ordinal);

}  // namespace fusedlr

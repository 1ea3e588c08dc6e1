// What the driver says of itself and of the devices. Nothing here needs one: the runtime looks for it at the
// first call.
#include "step.h"

namespace fusedlr {

extern const char* const device_type;
extern const int toolkit;
const char* const device_type = "cuda";
const int toolkit = CUDART_VERSION;

int driver() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int capability(int device, std::string& error) {
    int major = 0, minor = 0;
    cudaError_t said = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (said == cudaSuccess) said = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (said == cudaSuccess) return 10 * major + minor;
    // or the next call that looks would find it
    cudaGetLastError();
    error = cudaGetErrorString(said);
    return 0;
}

}  // namespace fusedlr

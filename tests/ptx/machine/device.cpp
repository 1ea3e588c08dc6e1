// What csrc/cuda/device.cu says on a GPU: here the device is the CPU, whose memory the machine works on.
#include <string>

namespace fusedlr {

extern const char* const device_type;
extern const int toolkit;
const char* const device_type = "cpu";
const int toolkit = 0;

int driver() { return 0; }

int capability(int, std::string& error) {
    error = "the kernels run on the machine of tests/ptx";
    return 0;
}

}  // namespace fusedlr

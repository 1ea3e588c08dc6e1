// The Python module fusedlr._cuda: loads compiled kernels and launches them. Addresses, numbers and a stream
// in, no tensors. Called by fusedlr/backends/gpu/cuda.py alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "driver.h"
#include "step.h"

namespace py = pybind11;
using namespace fusedlr;

namespace fusedlr {
extern const char* const sources;
}

namespace {

// as cuda.h numbers them
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kFunctionRegisters = 4;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// 90 for compute capability 9.0
int capability(int ordinal) {
    const Driver& d = driver();
    check(d.cuInit(0), "start its driver");
    int device = 0, major = 0, minor = 0;
    check(d.cuDeviceGet(&device, ordinal), "find the device");
    check(d.cuDeviceGetAttribute(&major, kCapabilityMajor, device), "say what the device is");
    check(d.cuDeviceGetAttribute(&minor, kCapabilityMinor, device), "say what the device is");
    return 10 * major + minor;
}

// Handles of the kernels in an image, which stay loaded: graphs may have captured launches of them.
std::vector<uintptr_t> load(int ordinal, const std::string& image, const std::vector<std::string>& names) {
    use_device(ordinal);
    const Driver& d = driver();
    void* module = nullptr;
    check(d.cuModuleLoadData(&module, image.c_str()), "load the kernels");
    std::vector<uintptr_t> found;
    for (const std::string& name : names) {
        Function function = nullptr;
        check(d.cuModuleGetFunction(&function, module, name.c_str()), "find a kernel");
        // has its code loaded, which a launch while a CUDA graph is captured could not
        int registers = 0;
        check(d.cuFuncGetAttribute(&registers, kFunctionRegisters, function), "load a kernel");
        found.push_back(reinterpret_cast<uintptr_t>(function));
    }
    return found;
}

// the launches of either kernel on tensors of one kind
struct Bucket {
    Function norm, update;
    int32_t first;
    unsigned blocks;
};

using BucketRow = std::tuple<uintptr_t, uintptr_t, int32_t, unsigned>;

// The launches of a step: all that stays the same while nothing but gradients, active scopes and a scaler's
// signals change.
class Launcher {
  public:
    Launcher(uintptr_t tensors, uintptr_t chunks, uintptr_t ints, uintptr_t floats, uintptr_t rates,
             uintptr_t counts, uintptr_t used, uintptr_t squares, uintptr_t partials, uintptr_t tickets,
             uintptr_t generation, uintptr_t ring, int32_t made_for, int32_t programs, int32_t groups,
             int32_t scopes, int32_t phases, int32_t rows, bool normed, const std::vector<BucketRow>& buckets,
             bool few, bool table, int device)
        : normed_(normed), few_(few), table_(table), device_(device) {
        step_.tensors = pointer<const TensorRow>(tensors);
        step_.chunks = pointer<const ChunkRow>(chunks);
        step_.group_ints = pointer<const GroupInts>(ints);
        step_.group_floats = pointer<const GroupFloats>(floats);
        step_.rates = pointer<const float>(rates);
        step_.counts = pointer<int64_t>(counts);
        step_.used = pointer<float>(used);
        step_.squares = pointer<float>(squares);
        step_.partials = pointer<float>(partials);
        step_.tickets = pointer<int32_t>(tickets);
        step_.generation = pointer<const int32_t>(generation);
        step_.ring = pointer<const RingInts>(ring);
        step_.made_for = made_for, step_.programs = programs, step_.rows = rows;
        step_.groups = groups, step_.scopes = scopes, step_.phases = phases;
        if (!table && rows > (few ? kFew : kMany))
            throw std::invalid_argument("a launch cannot carry so many gradients");
        for (const auto& [norm, update, first, blocks] : buckets)
            buckets_.push_back({pointer<void>(norm), pointer<void>(update), first, blocks});
    }

    // The launches of a step, or of one of its stages. gradients: where their addresses lie, one per row, on
    // the device if there is a table, else on the host
    template <bool norm, bool update>
    void launch(uintptr_t gradients, uintptr_t active, uintptr_t grad_scale, uintptr_t found_inf,
                uintptr_t stream) const {
        Step step = step_;
        step.active = pointer<const int32_t>(active);
        step.grad_scale = pointer<const float>(grad_scale);
        step.found_inf = pointer<const float>(found_inf);
        if (few_)
            launch_all<norm, update, kFew>(step, gradients, stream);
        else
            launch_all<norm, update, kMany>(step, gradients, stream);
    }

  private:
    template <bool norm, bool update, int N>
    void launch_all(const Step& step, uintptr_t gradients, uintptr_t stream) const {
        // filled in while Python waits: another thread may go on to the next step while the driver does not
        // return
        Launch<N> launch;
        launch.step = step;
        if (table_) {
            launch.step.gradients = pointer<const uint64_t>(gradients);
            launch.step.some_missing = 1;
        } else {
            const auto* const addresses = pointer<const uint64_t>(gradients);
            std::memcpy(launch.gradients, addresses, size_t(step.rows) * 8);
            launch.step.some_missing = int32_t(std::count(addresses, addresses + step.rows, uint64_t(0)));
        }
        const py::gil_scoped_release release;
        use_device(device_);
        for (const bool squares : {true, false}) {
            if (squares ? !norm || !normed_ : !update) continue;
            for (const Bucket& bucket : buckets_) {
                launch.step.first = bucket.first;
                void* parameters[] = {&launch};
                check(driver().cuLaunchKernel(squares ? bucket.norm : bucket.update, bucket.blocks, 1, 1,
                                              kThreads, 1, 1, 0, pointer<void>(stream), parameters, nullptr),
                      "launch the step");
            }
        }
    }

    Step step_ = {};
    bool normed_, few_, table_;
    int device_;
    std::vector<Bucket> buckets_;
};

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    py::class_<Launcher>(module, "Launcher", py::module_local())
        .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t, uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t, int32_t, int32_t, int32_t,
                      int32_t, bool, const std::vector<BucketRow>&, bool, bool, int>(),
             py::kw_only(), py::arg("tensors"), py::arg("chunks"), py::arg("ints"), py::arg("floats"),
             py::arg("rates"), py::arg("counts"), py::arg("used"), py::arg("squares"), py::arg("partials"),
             py::arg("tickets"), py::arg("generation"), py::arg("ring"), py::arg("made_for"),
             py::arg("programs"), py::arg("groups"), py::arg("scopes"), py::arg("phases"), py::arg("rows"),
             py::arg("normed"), py::arg("buckets"), py::arg("few"), py::arg("table"), py::arg("device"))
        .def("norm", &Launcher::launch<true, false>)
        .def("update", &Launcher::launch<false, true>)
        .def("step", &Launcher::launch<true, true>);
    module.def("open_driver", [](const std::string& library) { open_driver(library.c_str()); });
    module.def("driver_version", [] {
        int version = 0;
        check(driver().cuDriverGetVersion(&version), "say its version");
        return version;
    });
    module.def("capability", &capability);
    module.def("load", [](int ordinal, const py::bytes& image, const std::vector<std::string>& names) {
        const std::string copy = image;
        const py::gil_scoped_release release;
        return load(ordinal, copy, names);
    });
    module.attr("few") = kFew;
    module.attr("many") = kMany;
    module.attr("sources") = sources;
}

// The Python module fusedlr._cuda: addresses, numbers and a stream in, no tensors. Called by
// fusedlr/cuda_step.py alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cuda.h"

namespace py = pybind11;
using namespace fusedlr;

namespace fusedlr {
extern const char* const sources;
}

namespace {

// a launch of either kernel: tensors of one kind
struct Bucket {
    const Launches* launches;
    Type moments;
    bool amsgrad;
    int32_t first;
    unsigned blocks;
};

using BucketRow = std::tuple<int, int, bool, int32_t, unsigned>;

const Launches* launches_for(int param, int moments) {
    if (moments != param && moments != kF32)
        throw std::invalid_argument("there is no kernel for these moments");
    switch (param) {
        case kF32:
            return &f32::launches;
        case kBF16:
            return &bf16::launches;
        case kF16:
            return &f16::launches;
        default:
            throw std::invalid_argument("there is no kernel for this type of parameters");
    }
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The launches of one step: all that stays the same while nothing but gradients change.
class Launcher {
  public:
    Launcher(uintptr_t tensors, uintptr_t chunks, uintptr_t ints, uintptr_t floats, uintptr_t counters,
             uintptr_t used, uintptr_t norms, uintptr_t tickets, uintptr_t grad_scale, uintptr_t found_inf,
             uintptr_t alive, int32_t now, int32_t programs, int32_t groups, int32_t phases, int32_t count,
             const std::vector<BucketRow>& buckets, bool normed)
        : step_{pointer<const TensorRow>(tensors),
                pointer<const ChunkRow>(chunks),
                pointer<const GroupInts>(ints),
                pointer<const GroupFloats>(floats),
                pointer<int64_t>(counters),
                pointer<float>(used),
                pointer<float>(norms),
                pointer<int32_t>(tickets),
                pointer<const float>(grad_scale),
                pointer<const float>(found_inf),
                pointer<const int32_t>(alive),
                now,
                programs,
                groups,
                phases,
                count,
                0,
                nullptr},
          normed_(normed) {
        for (const auto& [param, moments, amsgrad, first, blocks] : buckets)
            buckets_.push_back({launches_for(param, moments), Type(moments), amsgrad, first, blocks});
    }

    // addresses of gradients, in the order of the tensors
    void step(const std::vector<uintptr_t>& gradients, uintptr_t stream) const {
        if (gradients.size() != size_t(step_.count))
            throw std::invalid_argument("one gradient per tensor is needed");
        run(step_, gradients.data(), stream);
    }

    // the same, by the address of those addresses: as a Watch keeps them
    void step_at(uintptr_t gradients, uintptr_t stream) const {
        const auto* const first = pointer<const uintptr_t>(gradients);
        // another thread may go on to the next step while this one waits for the driver
        const std::vector<uintptr_t> copied(first, first + step_.count);
        run(step_, copied.data(), stream);
    }

    // the same, with the addresses in a table on the device
    void step_with_table(uintptr_t gradients, uintptr_t stream) const {
        Step step = step_;
        step.gradients = pointer<const uint64_t>(gradients);
        run(step, nullptr, stream);
    }

  private:
    void run(Step step, const uintptr_t* gradients, uintptr_t stream) const {
        const char* error = nullptr;
        {
            const py::gil_scoped_release release;
            void* const queue = pointer<void>(stream);
            for (size_t i = 0; normed_ && !error && i < buckets_.size(); ++i) {
                step.first = buckets_[i].first;
                error = buckets_[i].launches->norm(step, buckets_[i].blocks, gradients, queue);
            }
            for (size_t i = 0; !error && i < buckets_.size(); ++i) {
                const Bucket& bucket = buckets_[i];
                step.first = bucket.first;
                error = bucket.launches->update(step, bucket.blocks, bucket.moments, bucket.amsgrad,
                                                gradients, queue);
            }
        }
        if (error) throw std::runtime_error(std::string("the CUDA kernel was not launched: ") + error);
    }

    Step step_;
    bool normed_;
    std::vector<Bucket> buckets_;
};

#define FUSEDLR_COLUMN(name) columns.append(#name);
#define FUSEDLR_TABLE(name, table)                               \
    {                                                            \
        py::list columns;                                        \
        table(FUSEDLR_COLUMN) tables[name] = py::tuple(columns); \
    }

py::dict columns_of_tables() {
    py::dict tables;
    FUSEDLR_TABLE("TENSORS", FUSEDLR_TENSORS)
    FUSEDLR_TABLE("CHUNKS", FUSEDLR_CHUNKS)
    FUSEDLR_TABLE("GROUP_INTS", FUSEDLR_GROUP_INTS)
    FUSEDLR_TABLE("GROUP_FLOATS", FUSEDLR_GROUP_FLOATS)
    FUSEDLR_TABLE("PHASE_INTS", FUSEDLR_PHASE_INTS)
    FUSEDLR_TABLE("PHASE_FLOATS", FUSEDLR_PHASE_FLOATS)
    tables["CHUNK"] = kChunk;
    return tables;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    py::class_<Launcher>(module, "Launcher", py::module_local())
        .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t, int32_t, int32_t, int32_t,
                      const std::vector<BucketRow>&, bool>(),
             py::arg("tensors"), py::arg("chunks"), py::arg("ints"), py::arg("floats"), py::arg("counters"),
             py::arg("used"), py::arg("norms"), py::arg("tickets"), py::arg("grad_scale"),
             py::arg("found_inf"), py::arg("alive"), py::arg("now"), py::arg("programs"), py::arg("groups"),
             py::arg("phases"), py::arg("count"), py::arg("buckets"), py::arg("normed"))
        .def("step", &Launcher::step, py::arg("gradients"), py::arg("stream"))
        .def("step_at", &Launcher::step_at, py::arg("gradients"), py::arg("stream"))
        .def("step_with_table", &Launcher::step_with_table, py::arg("gradients"), py::arg("stream"));
    module.def("driver", &driver);
    module.def("capability", [](int device) {
        std::string error;
        const int found = capability(device, error);
        if (!error.empty()) throw std::runtime_error(error);
        return found;
    });
    module.attr("device_type") = device_type;
    module.attr("toolkit") = toolkit;
    module.attr("archs") = FUSEDLR_ARCHS;
    module.attr("most_gradients") = f32::launches.most_gradients;
    module.attr("tables") = columns_of_tables();
    module.attr("sources") = sources;
}

// The Python module fusedlr._cuda: addresses, numbers and a stream in, no tensors. Called by
// fusedlr/backends/gpu/cuda.py alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "step.h"

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

// few: whether the smaller launches can carry the gradients
const Launches* launches_for(int param, int moments, bool few) {
    if (moments != param && moments != kF32)
        throw std::invalid_argument("there is no kernel for these moments");
    switch (param) {
        case kF32:
            return few ? &f32::few : &f32::many;
        case kBF16:
            return few ? &bf16::few : &bf16::many;
        case kF16:
            return few ? &f16::few : &f16::many;
        default:
            throw std::invalid_argument("there is no kernel for this type of parameters");
    }
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA could not launch the step: ") + error);
}

// The launches of a step: all that stays the same while nothing but gradients, active scopes and a scaler's
// signals change.
class Launcher {
  public:
    Launcher(uintptr_t tensors, uintptr_t chunks, uintptr_t ints, uintptr_t floats, uintptr_t rates,
             uintptr_t counts, uintptr_t used, uintptr_t squares, uintptr_t partials, uintptr_t tickets,
             uintptr_t generation, int32_t made_for, int32_t programs, int32_t groups, int32_t scopes,
             int32_t phases, int32_t rows, bool normed, const std::vector<BucketRow>& buckets, bool table,
             bool load)
        : normed_(normed), table_(table) {
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
        step_.made_for = made_for, step_.programs = programs, step_.rows = rows;
        step_.groups = groups, step_.scopes = scopes, step_.phases = phases;
        if (!table && size_t(rows) > f32::many.most_gradients)
            throw std::invalid_argument("a launch cannot carry so many gradients");
        const bool few = table || size_t(rows) <= f32::few.most_gradients;
        for (const auto& [param, moments, amsgrad, first, blocks] : buckets) {
            buckets_.push_back({launches_for(param, moments, few), Type(moments), amsgrad, first, blocks});
            if (load) check(buckets_.back().launches->load(Type(moments)));
        }
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
        // copied: another thread may go on to the next step while this one waits for the driver
        std::vector<uintptr_t> carried;
        if (table_) {
            step.gradients = pointer<const uint64_t>(gradients);
        } else {
            const auto* const first = pointer<const uintptr_t>(gradients);
            carried.assign(first, first + step.rows);
        }
        step.some_missing = table_ || std::count(carried.begin(), carried.end(), uintptr_t(0));
        const uintptr_t* const addresses = table_ ? nullptr : carried.data();
        void* const queue = pointer<void>(stream);
        const char* error = nullptr;
        {
            const py::gil_scoped_release release;
            for (size_t i = 0; norm && normed_ && !error && i < buckets_.size(); ++i) {
                step.first = buckets_[i].first;
                error = buckets_[i].launches->norm(step, buckets_[i].blocks, addresses, queue);
            }
            for (size_t i = 0; update && !error && i < buckets_.size(); ++i) {
                const Bucket& bucket = buckets_[i];
                step.first = bucket.first;
                error = bucket.launches->update(step, bucket.blocks, bucket.moments, bucket.amsgrad,
                                                addresses, queue);
            }
        }
        check(error);
    }

  private:
    Step step_ = {};
    bool normed_, table_;
    std::vector<Bucket> buckets_;
};

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    py::class_<Launcher>(module, "Launcher", py::module_local())
        .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t,
                      bool, const std::vector<BucketRow>&, bool, bool>(),
             py::kw_only(), py::arg("tensors"), py::arg("chunks"), py::arg("ints"), py::arg("floats"),
             py::arg("rates"), py::arg("counts"), py::arg("used"), py::arg("squares"), py::arg("partials"),
             py::arg("tickets"), py::arg("generation"), py::arg("made_for"), py::arg("programs"),
             py::arg("groups"), py::arg("scopes"), py::arg("phases"), py::arg("rows"), py::arg("normed"),
             py::arg("buckets"), py::arg("table"), py::arg("load"))
        .def("norm", &Launcher::launch<true, false>)
        .def("update", &Launcher::launch<false, true>)
        .def("step", &Launcher::launch<true, true>);
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
    module.attr("most_gradients") = f32::many.most_gradients;
    module.attr("sources") = sources;
}

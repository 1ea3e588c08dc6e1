// The part of DLPack's C ABI (major version 1) that is read here: how torch (2.10 and newer) describes a
// tensor to another library, by torch.Tensor.__dlpack_c_exchange_api__. Names and layout are the standard's.
#pragma once

#include <cstdint>

namespace dlpack {

struct Device {
    int32_t device_type, device_id;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;  // in elements; null where ndim is 0
    uint64_t byte_offset;
};

struct ExchangeAPI {
    uint32_t major, minor;
    ExchangeAPI* older;
    void *allocator, *managed_from_object, *managed_to_object;
    // fills out for as long as the object lives; -1 with a Python error if it has no plain memory
    int (*tensor_from_object)(void* object, Tensor* out);
    int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace dlpack

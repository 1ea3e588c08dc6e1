// Types of tensors, and how 16-bit numbers become fp32 and back.
#pragma once

#include <cstring>

#include "schedule.h"

namespace fusedlr {

// the order of TYPES in fusedlr/backends/compiled.py
enum Type : int { kF64, kF32, kBF16, kF16 };

FUSEDLR_HD int64_t size_of(Type type) { return type == kF64 ? 8 : type == kF32 ? 4 : 2; }

struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

FUSEDLR_HD uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

FUSEDLR_HD float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

FUSEDLR_HD double load(double x) { return x; }
FUSEDLR_HD float load(float x) { return x; }
FUSEDLR_HD float load(BF16 x) { return float_of(uint32_t(x.bits) << 16); }

FUSEDLR_HD float load(F16 x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    const uint32_t exponent = 0x7c00u << 13;
    const uint32_t shifted = uint32_t(x.bits & 0x7fffu) << 13;
    const uint32_t rebiased = shifted + ((127u - 15u) << 23);
    // subnormal: as a normal number with the hidden bit set, which is then taken off
    const uint32_t subnormal = bits_of(float_of(rebiased + (1u << 23)) - float_of(113u << 23));
    const uint32_t special = rebiased + ((128u - 16u) << 23);  // inf and nan
    const uint32_t magnitude = (shifted & exponent) == exponent ? special
                               : (shifted & exponent) == 0      ? subnormal
                                                                : rebiased;
    return float_of(magnitude | uint32_t(x.bits & 0x8000u) << 16);
#endif
}

// to nearest, ties to even, as torch rounds; nan becomes torch's nan

FUSEDLR_HD void store(double& to, double x) { to = x; }
FUSEDLR_HD void store(float& to, float x) { to = x; }
FUSEDLR_HD void store(float& to, double x) { to = float(x); }

FUSEDLR_HD void store(BF16& to, float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to.bits = uint16_t(x != x ? 0x7fc0u : nearest);
}

FUSEDLR_HD void store(F16& to, float x) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    // below the smallest normal number the addition rounds at the right place
    const uint32_t magic = (127u - 15u + 23u - 10u + 1u) << 23;
    const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(magic)) - magic;
    const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t nearest = magnitude >= (127u + 16u) << 23 ? special
                             : magnitude < 113u << 23        ? subnormal
                                                             : normal;
    to.bits = uint16_t(nearest | (bits >> 16 & 0x8000u));
#endif
}

// The fp32 value of a 16-bit parameter, of which the state has the rest: reference.fp32_value and
// split_value. For bf16 that is the low half of the bits; the parameter is the value rounded to nearest, ties
// away from zero.
struct Low16 {
    uint16_t bits;
};

// what the state may have of the fp32 value of a parameter of type P; of an fp32 one it has nothing
template <class P>
struct RestOf {
    using Type = Low16;
};
template <>
struct RestOf<F16> {
    using Type = float;
};

FUSEDLR_HD float load_whole(BF16 x, Low16 low) {
    // a zero that was assigned from outside has no number below it
    const uint32_t borrow = uint32_t(low.bits >> 15) & uint32_t((x.bits & 0x7fffu) != 0);
    return float_of((uint32_t(x.bits) - borrow) << 16 | low.bits);
}

FUSEDLR_HD void store_whole(BF16& to, Low16& low, float x) {
    const uint32_t bits = bits_of(x);
    to.bits = uint16_t(x != x ? 0x7fc0u : (bits + 0x8000u) >> 16);
    low.bits = uint16_t(x != x ? 0u : bits);
}

// for fp16 it is the value; one that does not round to the parameter has been replaced from outside
FUSEDLR_HD float load_whole(F16 x, float master) {
    F16 rounded;
    store(rounded, master);
    const float own = load(x);
    return load(rounded) == own ? master : own;
}

FUSEDLR_HD void store_whole(F16& to, float& master, float x) {
    store(to, x);
    master = x;
}

// 16-bit parameters with fp64 moments are computed in double
FUSEDLR_HD void store(BF16& to, double x) { store(to, float(x)); }
FUSEDLR_HD void store(F16& to, double x) { store(to, float(x)); }

}  // namespace fusedlr

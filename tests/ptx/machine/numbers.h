// Numbers as PTX has them: conversions, rounding, comparisons. Registers are 64 bits wide and hold a value's
// bits. Part of machine.cpp.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "state.h"

namespace {

float as_float(u64 x) {
    u32 y = u32(x);
    float f;
    std::memcpy(&f, &y, 4);
    return f;
}
u64 bits_of(float f) {
    u32 y;
    std::memcpy(&y, &f, 4);
    return y;
}
double as_double(u64 x) {
    double d;
    std::memcpy(&d, &x, 8);
    return d;
}
u64 bits_of(double d) {
    u64 x;
    std::memcpy(&x, &d, 8);
    return x;
}
// Every nan that an instruction makes has one pattern, as in hardware.
u64 one_nan(float f) { return f != f ? 0x7fffffffu : bits_of(f); }
u64 one_nan(double d) { return d != d ? 0x7fffffffffffffffull : bits_of(d); }
float flush(float f, bool ftz) {
    return ftz && f != 0 && std::fabs(f) < 1.17549435e-38f ? std::copysign(0.0f, f) : f;
}

float from_f16(u32 h) {
    u32 sign = (h & 0x8000u) << 16, e = h >> 10 & 31, m = h & 1023;
    float v;
    if (e == 0)
        v = std::ldexp(float(m), -24);
    else if (e == 31)
        v = m ? NAN : INFINITY;
    else
        v = std::ldexp(float(m + 1024), int(e) - 25);
    u32 bits = u32(bits_of(v)) & 0x7fffffffu;
    return as_float(bits | sign);
}
u32 to_f16(float x) {
    if (x != x) return 0x7fff;
    u32 sign = u32(bits_of(x)) >> 16 & 0x8000u;
    double a = std::fabs(double(x));
    if (a >= 65520.0) return sign | 0x7c00;
    // in units of the last place, to even
    int e;
    std::frexp(a, &e);
    int shift = std::max(e - 11, -24);
    double q = std::nearbyint(std::ldexp(a, -shift));
    if (a == 0) return sign;
    u32 n = u32(q);
    if (shift == -24)
        return sign | n;  // the patterns of subnormal numbers lead up to those of the first normal ones
    if (n == 2048) n = 1024, ++shift;
    return sign | (u32(shift + 25) << 10) | (n - 1024);
}
float from_bf16(u32 h) { return as_float(u64(h & 0xffff) << 16); }
u32 to_bf16(float x) {
    if (x != x) return 0x7fff;
    u32 b = u32(bits_of(x));
    u32 low = b & 0xffff, high = b >> 16;
    if (low > 0x8000 || (low == 0x8000 && (high & 1))) ++high;
    return high & 0xffff;
}

// What an approximate instruction may return: `exact`, up to so many ulp off, as the settings say.
float approximately(double exact, float argument, int ulps) {
    ++stats.approx;
    float x = float(exact);
    if (x != x || std::isinf(x) || x == 0) return x;
    int by = 0;
    if (settings.approx == 1) by = ulps;
    if (settings.approx == 2) by = -ulps;
    if (settings.approx == 3) by = int((bits_of(argument) * 2654435761u >> 16) % (2 * ulps + 1)) - ulps;
    for (; by > 0; --by) x = std::nextafter(x, INFINITY);
    for (; by < 0; ++by) x = std::nextafter(x, -INFINITY);
    return x;
}

template <class T>
u64 saturating(double x) {
    if (x != x) return 0;
    double lo = double(std::numeric_limits<T>::min()), hi = double(std::numeric_limits<T>::max());
    if (x <= lo) return u64(std::numeric_limits<T>::min());
    if (x >= hi) return u64(std::numeric_limits<T>::max());
    return u64(T(x));
}

double rounded(double x, Round r) {
    switch (r) {
        case RNI:
            return std::nearbyint(x);
        case RZI:
            return std::trunc(x);
        case RMI:
            return std::floor(x);
        case RPI:
            return std::ceil(x);
        default:
            throw std::runtime_error("rounding");
    }
}

int64_t sign_extended(u64 x, Type t) {
    switch (bytes_of(t)) {
        case 1:
            return int8_t(x);
        case 2:
            return int16_t(x);
        case 4:
            return int32_t(x);
        default:
            return int64_t(x);
    }
}
u64 zero_extended(u64 x, int bytes) {
    return bytes >= 8 ? x : bytes == 0 ? (x & 1) : x & ((1ull << (8 * bytes)) - 1);
}

u64 convert(const Instruction& i, u64 x, u64 y) {
    Type to = i.ty, from = i.ty2;
    if (to == F16X2 || to == BF16X2) {
        if (from != F32 || i.round != RN) throw std::runtime_error("cvt");
        auto half = [&](u64 v) { return to == F16X2 ? to_f16(as_float(v)) : to_bf16(as_float(v)); };
        return u64(half(x)) << 16 | half(y);
    }
    bool from_fp = from == F32 || from == F64 || from == F16 || from == BF16;
    bool to_fp = to == F32 || to == F64 || to == F16 || to == BF16;
    if (!from_fp && !to_fp) {
        u64 v = is_signed(from) ? u64(sign_extended(x, from)) : zero_extended(x, bytes_of(from));
        return zero_extended(v, bytes_of(to));
    }
    if (!from_fp) {
        if (i.round != RN) throw std::runtime_error("cvt");
        if (to == F32)
            return is_signed(from) ? bits_of(float(sign_extended(x, from)))
                                   : bits_of(float(zero_extended(x, bytes_of(from))));
        if (to == F64)
            return is_signed(from) ? bits_of(double(sign_extended(x, from)))
                                   : bits_of(double(zero_extended(x, bytes_of(from))));
        throw std::runtime_error("cvt");
    }
    double v = from == F32   ? double(flush(as_float(x), i.ftz))
               : from == F64 ? as_double(x)
               : from == F16 ? double(from_f16(u32(x)))
                             : double(from_bf16(u32(x)));
    if (!to_fp) {
        double r = rounded(v, i.round);
        switch (to) {
            case S32:
                return zero_extended(saturating<int32_t>(r), 4);
            case U32:
                return saturating<uint32_t>(r);
            case S64:
                return saturating<int64_t>(r);
            default:
                throw std::runtime_error("cvt");
        }
    }
    if (i.round != NOROUND && i.round != RN) v = rounded(v, i.round);
    if (to == from && from == F32) return v != v ? 0x7fffffffu : bits_of(flush(float(v), i.ftz));
    if (to == F32) return one_nan(float(v));
    if (to == F64) return one_nan(v);
    if (from != F32) throw std::runtime_error("cvt");
    return to == F16 ? to_f16(float(v)) : to_bf16(float(v));
}

template <class T>
bool compared(Comparison c, T a, T b) {
    bool nan = a != a || b != b;
    switch (c) {
        case EQ:
            return !nan && a == b;
        case NE:
            return !nan && a != b;
        case LT:
        case LO:
            return a < b;
        case LE:
        case LS:
            return a <= b;
        case GT:
        case HI:
            return a > b;
        case GE:
        case HS:
            return a >= b;
        case EQU:
            return nan || a == b;
        case NEU:
            return nan || a != b;
        case LTU:
            return nan || a < b;
        case LEU:
            return nan || a <= b;
        case GTU:
            return nan || a > b;
        case GEU:
            return nan || a >= b;
        case NUM:
            return !nan;
        case NOT_A_NUMBER:
            return nan;
    }
    return false;
}

bool compare(const Instruction& i, Type t, u64 a, u64 b) {
    switch (t) {
        case F32:
            return compared(i.cmp, flush(as_float(a), i.ftz), flush(as_float(b), i.ftz));
        case F64:
            return compared(i.cmp, as_double(a), as_double(b));
        case F16:
            return compared(i.cmp, from_f16(u32(a)), from_f16(u32(b)));
        case BF16:
            return compared(i.cmp, from_bf16(u32(a)), from_bf16(u32(b)));
        default:
            break;
    }
    bool sign = is_signed(t) && i.cmp != LO && i.cmp != LS && i.cmp != HI && i.cmp != HS;
    if (sign) return compared(i.cmp, sign_extended(a, t), sign_extended(b, t));
    return compared(i.cmp, zero_extended(a, bytes_of(t)), zero_extended(b, bytes_of(t)));
}

template <class T>
T minimum(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}
template <class T>
T maximum(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
}

}  // namespace

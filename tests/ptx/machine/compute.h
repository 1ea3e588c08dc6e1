// The instructions that only compute: registers in, registers out. Part of machine.cpp.
#pragma once

#include "checks.h"
#include "numbers.h"

namespace {

const u64* values_of(Warp& w, const Operand& o) {
    return o.kind == Operand::REG ? w.values.data() + size_t(o.idx) * kWarp
                                  : running->lanes_of_consts.data() + size_t(o.idx) * kWarp;
}
u32 undefined_lanes(Warp& w, const Operand& o) { return o.kind == Operand::REG ? w.undefined[o.idx] : 0; }

// every lane in `m`, and the same with what the instruction leaves in its first register
#define LANES for (u32 left = m, lane; left && (lane = u32(__builtin_ctz(left)), true); left &= left - 1)
#define EACH(expression)                                                   \
    {                                                                      \
        u64* d = &w.values[size_t(i.d[0]) * kWarp];                        \
        if (m == ~0u)                                                      \
            for (int lane = 0; lane < kWarp; ++lane) d[lane] = expression; \
        else                                                               \
            LANES d[lane] = expression;                                    \
        done();                                                            \
    }

// One instruction for the lanes in `m`. A result is undefined where something it was made of is.
void compute(Warp& w, const Instruction& i, u32 m, u32 pc) {
    const u64 *x = nullptr, *y = nullptr, *z = nullptr;
    u32 bad = 0;
    if (i.ns > 0) x = values_of(w, i.s[0]), bad |= undefined_lanes(w, i.s[0]);
    if (i.ns > 1) y = values_of(w, i.s[1]), bad |= undefined_lanes(w, i.s[1]);
    if (i.ns > 2) z = values_of(w, i.s[2]), bad |= undefined_lanes(w, i.s[2]);
    auto done = [&] { w.undefined[i.d[0]] = (w.undefined[i.d[0]] & ~m) | (bad & m); };
    const Type t = i.ty;
    const int n = bytes_of(t);
    switch (i.op) {
        case ADD:
            if (t == F32)
                EACH(one_nan(flush(flush(as_float(x[lane]), i.ftz) + flush(as_float(y[lane]), i.ftz), i.ftz)))
            else if (t == F64)
                EACH(one_nan(as_double(x[lane]) + as_double(y[lane])))
            else if (n == 4)
                EACH(u64(u32(x[lane] + y[lane])))
            else if (n == 8)
                EACH(x[lane] + y[lane])
            else
                EACH(zero_extended(x[lane] + y[lane], n))
            break;
        case SUB:
            if (t == F32)
                EACH(one_nan(flush(flush(as_float(x[lane]), i.ftz) - flush(as_float(y[lane]), i.ftz), i.ftz)))
            else if (t == F64)
                EACH(one_nan(as_double(x[lane]) - as_double(y[lane])))
            else
                EACH(zero_extended(x[lane] - y[lane], n))
            break;
        case FMUL:
            if (t == F32)
                EACH(one_nan(flush(flush(as_float(x[lane]), i.ftz) * flush(as_float(y[lane]), i.ftz), i.ftz)))
            else
                EACH(one_nan(as_double(x[lane]) * as_double(y[lane])))
            break;
        case FMA:
            if (t == F32)
                EACH(one_nan(flush(std::fma(flush(as_float(x[lane]), i.ftz), flush(as_float(y[lane]), i.ftz),
                                            flush(as_float(z[lane]), i.ftz)),
                                   i.ftz)))
            else
                EACH(one_nan(std::fma(as_double(x[lane]), as_double(y[lane]), as_double(z[lane]))))
            break;
        case DIV:
            if (t == F32)
                EACH(one_nan(flush(flush(as_float(x[lane]), i.ftz) / flush(as_float(y[lane]), i.ftz), i.ftz)))
            else if (t == F64)
                EACH(one_nan(as_double(x[lane]) / as_double(y[lane])))
            else
                throw std::runtime_error("integer division");
            break;
        case REM:
            LANES if (zero_extended(y[lane], n) == 0) {
                reports.add(OTHER, running->name + "/rem" + std::to_string(pc),
                            [&] { return where(pc) + ": the rest of a division by 0"; });
                m &= ~(1u << lane);
            }
            if (is_signed(t))
                EACH(zero_extended(sign_extended(y[lane], t) == -1
                                       ? 0
                                       : u64(sign_extended(x[lane], t) % sign_extended(y[lane], t)),
                                   n))
            else
                EACH(zero_extended(x[lane], n) % zero_extended(y[lane], n))
            break;
        case RCP:
            if (t == F32)
                EACH(one_nan(flush(1.0f / flush(as_float(x[lane]), i.ftz), i.ftz)))
            else
                EACH(one_nan(1.0 / as_double(x[lane])))
            break;
        case RCP_APPROX:
            EACH(one_nan(flush(
                approximately(1.0 / double(flush(as_float(x[lane]), i.ftz)), as_float(x[lane]), 1), i.ftz)))
            break;
        case SQRT:
            if (t == F32)
                EACH(one_nan(flush(std::sqrt(flush(as_float(x[lane]), i.ftz)), i.ftz)))
            else
                EACH(one_nan(std::sqrt(as_double(x[lane]))))
            break;
        case EX2_APPROX:
            // of whole numbers it is a power of two
            EACH(one_nan(
                flush(approximately(std::exp2(double(flush(as_float(x[lane]), i.ftz))), as_float(x[lane]),
                                    std::nearbyint(as_float(x[lane])) == as_float(x[lane]) ? 0 : 2),
                      i.ftz)))
            break;
        case LG2_APPROX:
            EACH(one_nan(
                flush(approximately(std::log2(double(flush(as_float(x[lane]), i.ftz))), as_float(x[lane]), 2),
                      i.ftz)))
            break;
        case MUL_LO:
            EACH(zero_extended(x[lane] * y[lane], n)) break;
        case MUL_HI:
            if (n != 4) throw std::runtime_error("mul.hi");
            if (is_signed(t))
                EACH(zero_extended(u64(sign_extended(x[lane], t) * sign_extended(y[lane], t)) >> 32, 4))
            else
                EACH((x[lane] * y[lane]) >> 32)
            break;
        case MUL_WIDE:
            if (is_signed(t))
                EACH(zero_extended(u64(sign_extended(x[lane], t) * sign_extended(y[lane], t)), 2 * n))
            else
                EACH(zero_extended(zero_extended(x[lane], n) * zero_extended(y[lane], n), 2 * n))
            break;
        case MAD_LO:
            EACH(zero_extended(x[lane] * y[lane] + z[lane], n)) break;
        case MAD_WIDE:
            if (is_signed(t))
                EACH(zero_extended(u64(sign_extended(x[lane], t) * sign_extended(y[lane], t)) + z[lane],
                                   2 * n))
            else
                EACH(zero_extended(zero_extended(x[lane], n) * zero_extended(y[lane], n) + z[lane], 2 * n))
            break;
        case MIN:
            if (t == F32)
                EACH(one_nan(minimum(flush(as_float(x[lane]), i.ftz), flush(as_float(y[lane]), i.ftz))))
            else if (t == F64)
                throw std::runtime_error("min.f64");
            else if (is_signed(t))
                EACH(zero_extended(u64(std::min(sign_extended(x[lane], t), sign_extended(y[lane], t))), n))
            else
                EACH(std::min(zero_extended(x[lane], n), zero_extended(y[lane], n)))
            break;
        case MAX:
            if (t == F32)
                EACH(one_nan(maximum(flush(as_float(x[lane]), i.ftz), flush(as_float(y[lane]), i.ftz))))
            else if (t == F64)
                throw std::runtime_error("max.f64");
            else if (is_signed(t))
                EACH(zero_extended(u64(std::max(sign_extended(x[lane], t), sign_extended(y[lane], t))), n))
            else
                EACH(std::max(zero_extended(x[lane], n), zero_extended(y[lane], n)))
            break;
        case ABS:
            if (t == F32)
                EACH(bits_of(flush(std::fabs(as_float(x[lane])), i.ftz)))
            else if (t == F64)
                EACH(bits_of(std::fabs(as_double(x[lane]))))
            else
                EACH(zero_extended(u64(std::abs(sign_extended(x[lane], t))), n))
            break;
        case NEG:
            if (t == F32)
                EACH(bits_of(flush(as_float(x[lane] ^ 0x80000000u), i.ftz)))
            else if (t == F64)
                EACH(x[lane] ^ 0x8000000000000000ull)
            else
                EACH(zero_extended(0 - x[lane], n))
            break;
        case NOT:
            EACH(zero_extended(~x[lane], t == PRED ? 0 : n)) break;
        case AND:
            EACH(x[lane] & y[lane]) break;
        case OR:
            EACH(x[lane] | y[lane]) break;
        case XOR:
            EACH(x[lane] ^ y[lane]) break;
        case SHL:
            EACH(u32(y[lane]) >= u32(8 * n) ? 0 : zero_extended(x[lane] << u32(y[lane]), n)) break;
        case SHR:
            if (is_signed(t))
                EACH(zero_extended(u64(sign_extended(x[lane], t) >> std::min(u32(y[lane]), u32(8 * n - 1))),
                                   n))
            else
                EACH(u32(y[lane]) >= u32(8 * n) ? 0 : zero_extended(x[lane], n) >> u32(y[lane]))
            break;
        case SETP: {
            u64* d = &w.values[size_t(i.d[0]) * kWarp];
            if (t == F16X2 || t == BF16X2) {
                Type half = t == F16X2 ? F16 : BF16;
                u64* e = i.nd > 1 ? &w.values[size_t(i.d[1]) * kWarp] : nullptr;
                if (i.bop) throw std::runtime_error("setp");
                LANES {
                    bool low = compare(i, half, x[lane] & 0xffff, y[lane] & 0xffff),
                         high = compare(i, half, x[lane] >> 16, y[lane] >> 16);
                    d[lane] = low;
                    if (e) e[lane] = high;
                }
                if (e) w.undefined[i.d[1]] = (w.undefined[i.d[1]] & ~m) | (bad & m);
            } else if (!i.bop && (t == S32 || t == S64) && i.cmp <= GE) {
                int64_t a = 0, c = 0;
                LANES {
                    a = sign_extended(x[lane], t), c = sign_extended(y[lane], t);
                    d[lane] = i.cmp == EQ   ? a == c
                              : i.cmp == NE ? a != c
                              : i.cmp == LT ? a < c
                              : i.cmp == LE ? a <= c
                              : i.cmp == GT ? a > c
                                            : a >= c;
                }
            } else
                LANES {
                    bool r = compare(i, t, x[lane], y[lane]);
                    if (i.bop == 1) r = r && (z[lane] & 1);
                    if (i.bop == 2) r = r || (z[lane] & 1);
                    if (i.bop == 3) r = r != bool(z[lane] & 1);
                    d[lane] = r;
                }
            done();
            break;
        }
        case SELP: {
            u32 px = undefined_lanes(w, i.s[0]), py = undefined_lanes(w, i.s[1]),
                pz = undefined_lanes(w, i.s[2]);
            u32 first = 0;
            for (int l = 0; l < kWarp; ++l) first |= u32(z[l] & 1) << l;
            bad = pz | (first & px) | (~first & py);
            EACH(z[lane] & 1 ? x[lane] : y[lane])
            break;
        }
        case BFE: {
            auto bits = [](u64 v, u64 at, u64 n) {
                return (at & 255) >= 32
                           ? 0
                           : (v & 0xffffffffu) >> (at & 255) &
                                 (n & 255 ? (n & 255) >= 32 ? 0xffffffffull : (1ull << (n & 255)) - 1 : 0ull);
            };
            EACH(bits(x[lane], y[lane], z[lane]))
            break;
        }
        case PRMT: {
            // every byte is one of eight, or its sign
            auto chosen = [](u64 low, u64 high, u64 by) {
                const u64 bytes = (low & 0xffffffffu) | high << 32;
                u64 r = 0;
                for (int i = 0; i < 4; ++i) {
                    const u64 nibble = by >> (4 * i) & 15, byte = bytes >> (8 * (nibble & 7)) & 255;
                    r |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
                }
                return r;
            };
            EACH(chosen(x[lane], y[lane], z[lane]))
            break;
        }
        case MOV:
            EACH(x[lane]) break;
        case PACK: {
            int half = n * 4;
            EACH(zero_extended(x[lane], half / 8) | zero_extended(y[lane], half / 8) << half)
            break;
        }
        case UNPACK: {
            int half = n * 4;
            u64 kept[kWarp];
            LANES kept[lane] = x[lane];
            for (int v = 0; v < 2; ++v) {
                if (i.d[v] < 0) continue;
                u64* d = &w.values[size_t(i.d[v]) * kWarp];
                LANES d[lane] = zero_extended(kept[lane] >> (v * half), half / 8);
                w.undefined[i.d[v]] = (w.undefined[i.d[v]] & ~m) | (bad & m);
            }
            break;
        }
        case CVT:
            EACH(convert(i, x[lane], y ? y[lane] : 0)) break;
        default:
            throw std::runtime_error("not implemented");
    }
}

}  // namespace

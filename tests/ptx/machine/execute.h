// Blocks, warps and lanes, interleaved by a seed, and the instructions that touch memory or each other. Part
// of machine.cpp.
#pragma once

#include <memory>

#include "compute.h"
#include "ordering.h"

namespace {

// of warps in a launch: several times what the largest of the suite takes
constexpr long kMostInstructions = 40 * 1000 * 1000;

// One launch, from the first block to the last.
struct Machine {
    std::vector<std::unique_ptr<Block>> pool,
        resident;  // those whose memory can be used again, and those that run
    std::vector<Warp*> ready;
    int dynamic_shared = 0;  // bytes
    const long last_instruction = stats.instructions + kMostInstructions;

    void start(u32 id) {
        std::unique_ptr<Block> b;
        if (pool.empty())
            b = std::make_unique<Block>();
        else
            b = std::move(pool.back()), pool.pop_back();
        b->reader_at.clear();
        b->id = id, b->barrier_clock = 1, b->arrived = 0, b->alive = int(threads_of_launch);
        b->threads.assign(threads_of_launch, Thread());
        size_t bytes = size_t(running->shared_static + dynamic_shared);
        b->shared.assign(bytes, 0xcd), b->shared_defined.assign(bytes, 0),
            b->shared_cells.assign(bytes, Cell());
        b->warps.resize((threads_of_launch + kWarp - 1) / kWarp);
        for (size_t i = 0; i < b->warps.size(); ++i) {
            Warp& w = b->warps[i];
            w.block = b.get(), w.index = int(i);
            w.values.resize(size_t(running->regs) * kWarp);
            w.undefined.assign(size_t(running->regs), ~0u);
            u32 n = std::min<u32>(kWarp, threads_of_launch - u32(i) * kWarp);
            w.alive = n == 32 ? ~0u : (1u << n) - 1;
            w.bar = w.shfl = 0;
            std::fill(w.pc, w.pc + kWarp, 0);
            auto set = [&](int reg, const std::function<u64(int)>& value) {
                if (reg < 0) return;
                for (int l = 0; l < kWarp; ++l) w.values[size_t(reg) * kWarp + size_t(l)] = value(l);
                w.undefined[reg] = 0;
            };
            set(running->tid_reg, [&](int l) { return u64(i) * kWarp + u64(l); });
            set(running->lane_reg, [&](int l) { return u64(l); });
            set(running->ctaid_reg, [&](int) { return u64(id); });
            set(running->ntid_reg, [&](int) { return u64(threads_of_launch); });
            set(running->nctaid_reg, [&](int) { return u64(blocks_of_launch); });
            w.listed = false;
        }
        resident.push_back(std::move(b));
        for (auto& w : resident.back()->warps) list(w);
    }

    void list(Warp& w) {
        if (!w.listed && w.ready()) w.listed = true, ready.push_back(&w);
    }

    // Opens the barrier if all threads that are left have come to it: they all know then what each of them
    // knew.
    void maybe_release(Block& b) {
        if (b.arrived == 0 || b.arrived < b.alive) return;
        u32 most = 0, acquired[kAtomicWords] = {}, observed[kAtomicWords] = {};
        for (auto& t : b.threads) {
            most = std::max(most, t.clock);
            for (size_t l = 0; l < atomic_words.size(); ++l)
                acquired[l] = std::max(acquired[l], t.acquired[l]),
                observed[l] = std::max(observed[l], t.observed[l]);
        }
        b.barrier_clock = most + 1;
        int first_pc = -1;
        bool apart = false;
        for (auto& w : b.warps) {
            int own = -1;
            for (int l = 0; l < kWarp; ++l) {
                if (!(w.bar >> l & 1)) continue;
                if (own >= 0 && own != w.bar_pc[l])
                    sync_error(u32(own), b.id << 10 | u32(w.index * kWarp + l),
                               "a warp's threads wait at different barriers");
                own = w.bar_pc[l];
                if (first_pc >= 0 && first_pc != own) apart = true;
                first_pc = own;
            }
        }
        if (b.alive < int(threads_of_launch))
            sync_error(u32(first_pc), b.id << 10, "a barrier that some threads have passed by exiting");
        stats.divergent_bars += apart;
        for (auto& t : b.threads) {
            t.clock = b.barrier_clock;
            for (size_t l = 0; l < atomic_words.size(); ++l)
                t.acquired[l] = acquired[l], t.observed[l] = observed[l];
        }
        b.arrived = 0;
        for (auto& w : b.warps) w.bar = 0, list(w);
    }

    // What an atomic leaves where `old` was. 32-bit numbers keep their sign where their type has one.
    static u64 combined(const Instruction& i, u64 old, u64 x) {
        const bool is_signed = i.ty == S32 || i.ty == S64;
        const auto less = [&](u64 a, u64 b) {
            return is_signed ? sign_extended(a, i.ty) < sign_extended(b, i.ty) : a < b;
        };
        switch (i.mode) {
            case A_ADD:
                return old + x;
            case A_EXCH:
                return x;
            case A_OR:
                return old | x;
            case A_AND:
                return old & x;
            case A_MAX:
                return less(old, x) ? x : old;
            default:
                return less(x, old) ? x : old;
        }
    }

    void atom(Warp& w, const Instruction& i, u32 m, u32 pc) {
        Block& b = *w.block;
        const u64 *base = values_of(w, i.base), *value = values_of(w, i.s[0]);
        u32 bad = (undefined_lanes(w, i.base) | undefined_lanes(w, i.s[0])) & m;
        for (u32 left = m; left; left &= left - 1) {
            int lane = __builtin_ctz(left);
            u32 tid = b.id << 10 | u32(w.index * kWarp + lane);
            if (bad >> lane & 1) {
                undefined(pc, tid, "operand of an atomic");
                continue;
            }
            u64 address = base[lane] + u64(i.off);
            const int bytes = bytes_of(i.ty);
            Allocation* a = checked(address, bytes, pc, tid);
            if (!a || !aligned(address, bytes, pc, tid)) continue;
            u64 old = 0;
            std::memcpy(&old, reinterpret_cast<const void*>(address), size_t(bytes));
            const u64 now = combined(i, old, zero_extended(value[lane], bytes));
            std::memcpy(reinterpret_cast<void*>(address), &now, size_t(bytes));
            Thread& t = b.threads[tid & 1023];
            if (settings.races) {
                Cell& c = a->cells[(address - a->begin) / u64(a->granule)];
                if (c.writer != kNone && c.writer != tid &&
                    !happens_before(b, t, tid, c.writer, c.write_clock))
                    race(RACE, "atomic/write ", pc, c.write_pc, tid, c.writer, a, address);
                if (c.more >= 0) {
                    for (auto& r : readers[c.more].of)
                        if (!readers_before(b, t, tid, r))
                            race(RACE, "atomic/read ", pc, r.pc, tid, r.thread, a, address);
                } else if (c.reader != kNone && (c.read_by_many || c.reader != tid) &&
                           !readers_before(
                               b, t, tid,
                               {c.reader >> 10, c.read_clock, c.reader, c.read_pc, c.read_by_many}))
                    race(RACE, "atomic/read ", pc, c.read_pc, tid, c.reader, a, address);
                int l = word_of(c);
                bool narrow = i.scope == CTA;
                for (auto& d : atomic_words[l].operations)
                    if ((d.narrow || narrow) && d.thread >> 10 != b.id &&
                        !happens_before(b, t, tid, d.thread, d.clock)) {
                        race(RACE, "atomics of the block's scope ", pc, d.pc, tid, d.thread, a, address);
                        break;
                    }
                u32 upto = u32(atomic_words[l].log.size());
                if (!narrow && (i.sem == ACQUIRE || i.sem == ACQ_REL))
                    acquire(t, l, upto);
                else if (!narrow)
                    t.pending[l] = std::max(t.pending[l], upto);
                atomic_words[l].operations.push_back({tid, t.clock, pc, narrow});
                t.observed[l] = u32(atomic_words[l].operations.size());
                if (!narrow && (i.sem == RELEASE || i.sem == ACQ_REL)) {
                    release(l, tid, b.barrier_clock, t.clock, t.acquired, t.observed);
                    ++t.clock;
                } else if (!narrow && t.fenced)
                    release(l, tid, t.fence_barrier, t.fence_clock, t.fence_acquired, t.fence_observed);
            }
            if (i.nd) {
                w.values[size_t(i.d[0]) * kWarp + size_t(lane)] = old;
                w.undefined[i.d[0]] &= ~(1u << lane);
            }
        }
    }

    void fence(Warp& w, const Instruction& i, u32 m) {
        // a fence of the block's scope orders nothing between blocks, and what it orders within one is not
        // modelled
        if (i.scope == CTA) return;
        Block& b = *w.block;
        for (u32 left = m; left; left &= left - 1) {
            Thread& t = b.threads[size_t(w.index * kWarp + __builtin_ctz(left))];
            for (size_t l = 0; l < atomic_words.size(); ++l)
                if (t.pending[l]) acquire(t, int(l), t.pending[l]), t.pending[l] = 0;
            t.fenced = true, t.fence_barrier = b.barrier_clock, t.fence_clock = t.clock++;
            std::memcpy(t.fence_acquired, t.acquired, sizeof t.acquired),
                std::memcpy(t.fence_observed, t.observed, sizeof t.observed);
        }
    }

    // for lanes that have all come to it
    void shuffle(Warp& w, const Instruction& i, u32 m) {
        const u64 *a = values_of(w, i.s[0]), *bb = values_of(w, i.s[1]), *cc = values_of(w, i.s[2]);
        u32 pa = undefined_lanes(w, i.s[0]);
        u64 result[kWarp];
        u32 valid = 0, bad = 0;
        for (u32 left = m; left; left &= left - 1) {
            int lane = __builtin_ctz(left);
            int by = int(bb[lane] & 31), clamp = int(cc[lane] & 31), seg = int(cc[lane] >> 8 & 31);
            int most = (lane & seg) | (clamp & ~seg), least = lane & seg, j = lane;
            bool in = false;
            switch (i.mode) {
                case UP:
                    j = lane - by, in = j >= most;
                    break;
                case DOWN:
                    j = lane + by, in = j <= most;
                    break;
                case BFLY:
                    j = lane ^ by, in = j <= most;
                    break;
                case IDX:
                    j = least | (by & ~seg), in = j <= most;
                    break;
            }
            if (!in) j = lane;
            result[lane] = a[j];
            if (in) valid |= 1u << lane;
            if (!(m >> j & 1) || (pa >> j & 1)) bad |= 1u << lane;
        }
        for (u32 left = m; left; left &= left - 1) {
            int lane = __builtin_ctz(left);
            w.values[size_t(i.d[0]) * kWarp + size_t(lane)] = result[lane];
            if (i.nd > 1) w.values[size_t(i.d[1]) * kWarp + size_t(lane)] = valid >> lane & 1;
        }
        w.undefined[i.d[0]] = (w.undefined[i.d[0]] & ~m) | (bad & m);
        if (i.nd > 1) w.undefined[i.d[1]] &= ~m;
    }

    // Whether all lanes that the shuffle names have come to it.
    bool arrive_at_shuffle(Warp& w, const Instruction& i, u32 m, u32 pc) {
        u32 tid = w.block->id << 10 | u32(w.index * kWarp + __builtin_ctz(m));
        const u64* members = values_of(w, i.s[3]);
        u32 member = u32(members[__builtin_ctz(m)]);
        if (undefined_lanes(w, i.s[3]) & m) undefined(pc, tid, "member mask");
        if ((m & member) != m) sync_error(pc, tid, "a shuffle by threads its mask does not name");
        if (member & ~w.alive) {
            sync_error(pc, tid, "a shuffle with threads that have exited");
            member &= w.alive;
        }
        u32 here = m;
        for (int l = 0; l < kWarp; ++l)
            if (w.shfl >> l & 1) {
                if (w.pc[l] == int(pc)) here |= 1u << l;
            }
        if ((here & member) == member) {
            w.shfl &= ~here;
            shuffle(w, i, here);
            for (int l = 0; l < kWarp; ++l)
                if (here >> l & 1) w.pc[l] = int(pc) + 1;
            return true;
        }
        w.shfl |= m;
        for (int l = 0; l < kWarp; ++l)
            if (m >> l & 1) w.pc[l] = int(pc);
        return false;
    }

    // The short way for lanes that all read the same address, which nobody has written in this launch:
    // whether it could be taken.
    bool load_for_all(Warp& w, const Instruction& i, u32 m, u32 pc, const u64* base, int n) {
        int first = __builtin_ctz(m), bytes = n * i.vec;
        for (u32 left = m; left; left &= left - 1)
            if (base[__builtin_ctz(left)] != base[first]) return false;
        Block& b = *w.block;
        u32 tid = b.id << 10 | u32(w.index * kWarp + first);
        u64 address = base[first] + u64(i.off);
        const uint8_t* from_here = reinterpret_cast<const uint8_t*>(address);
        Allocation* a = nullptr;
        if (i.space == PARAM) {
            if (address + u64(bytes) > params.size() || (address & u64(bytes - 1))) return false;
            from_here = &params[address];
        } else {
            Cache& c = caches[pc];
            if (!(address >= c.begin && address < c.end)) {
                a = find(address);
                if (!a) return false;
                c = {a->begin, a->end, a};
            }
            a = c.alloc;
            if (a->defined || address + u64(bytes) > a->end || (address & u64(bytes - 1))) return false;
        }
        if (settings.races && a) {
            size_t from = (address - a->begin) / u64(a->granule),
                   last = (address + u64(bytes) - 1 - a->begin) / u64(a->granule);
            for (size_t c = from; c <= last; ++c)
                if (a->cells[c].writer != kNone || a->cells[c].atom >= 0) return false;
            for (size_t c = from; c <= last; ++c) note_reader(b, tid, a->cells[c], pc, true);
        }
        for (int v = 0; v < i.vec; ++v) {
            u64 x = 0;
            std::memcpy(&x, from_here + v * n, size_t(n));
            if (is_signed(i.ty)) x = u64(sign_extended(x, i.ty));
            x = zero_extended(x, running->width[i.d[v]]);
            u64* d = &w.values[size_t(i.d[v]) * kWarp];
            for (u32 left = m; left; left &= left - 1) d[__builtin_ctz(left)] = x;
            w.undefined[i.d[v]] &= ~m;
        }
        return true;
    }

    void load(Warp& w, const Instruction& i, u32 m, u32 pc) {
        Block& b = *w.block;
        const u64* base = values_of(w, i.base);
        int n = bytes_of(i.ty), bytes = n * i.vec;
        u32 bad_address = undefined_lanes(w, i.base) & m, bad[4] = {};
        if (i.space == GENERIC) stats.generic += __builtin_popcount(m);
        if (i.space <= GLOBAL) (bytes == 16 ? stats.wide : stats.narrow) += __builtin_popcount(m);
        if ((i.space <= GLOBAL || i.space == PARAM) && !bad_address && (m & (m - 1)) &&
            load_for_all(w, i, m, pc, base, n))
            return;
        for (u32 left = m; left; left &= left - 1) {
            int lane = __builtin_ctz(left);
            u32 tid = b.id << 10 | u32(w.index * kWarp + lane);
            u64 value[4] = {};
            u32 undef = 0;
            if (bad_address >> lane & 1) {
                undefined(pc, tid, "address");
                undef = 15;
            } else {
                u64 address = base[lane] + u64(i.off);
                if (i.space == PARAM) {
                    if (address + u64(bytes) > params.size()) {
                        reports.add(OUT_OF_BOUNDS, running->name + "/param" + std::to_string(pc), [&] {
                            return who(tid) + " " + where(pc) + " reads parameters at " +
                                   std::to_string(address);
                        });
                        undef = 15;
                    } else if (aligned(address, bytes, pc, tid))
                        for (int v = 0; v < i.vec; ++v)
                            std::memcpy(&value[v], &params[address + u64(v * n)], size_t(n));
                } else if (i.space == SHARED) {
                    address &= 0xffffffff;
                    if (address + u64(bytes) > b.shared.size()) {
                        reports.add(OUT_OF_BOUNDS, running->name + "/shared" + std::to_string(pc), [&] {
                            return who(tid) + " " + where(pc) + " reads shared+" + std::to_string(address);
                        });
                        undef = 15;
                    } else if (aligned(address, bytes, pc, tid)) {
                        for (int v = 0; v < i.vec; ++v) {
                            std::memcpy(&value[v], &b.shared[address + u64(v * n)], size_t(n));
                            for (int k = 0; k < n; ++k)
                                if (!b.shared_defined[address + u64(v * n + k)]) undef |= 1u << v;
                        }
                        if (settings.races)
                            for (int k = 0; k < bytes; ++k)
                                if (!on_read(b, tid, b.shared_cells[address + u64(k)], pc, nullptr,
                                             address + u64(k)))
                                    undef |= 1u << (k / n);
                    }
                } else {
                    Allocation* a = checked(address, bytes, pc, tid);
                    if (!a || !aligned(address, bytes, pc, tid))
                        undef = 15;
                    else {
                        for (int v = 0; v < i.vec; ++v)
                            std::memcpy(&value[v], reinterpret_cast<const void*>(address + u64(v * n)),
                                        size_t(n));
                        if (a->defined)
                            for (int k = 0; k < bytes; ++k)
                                if (!(*a->defined)[address - a->begin + u64(k)]) undef |= 1u << (k / n);
                        if (settings.races) {
                            size_t first = (address - a->begin) / u64(a->granule),
                                   last = (address + u64(bytes) - 1 - a->begin) / u64(a->granule);
                            for (size_t c = first; c <= last; ++c)
                                // a value that a race decides must not matter
                                if (!on_read(b, tid, a->cells[c], pc, a, address)) undef |= 15;
                        }
                    }
                }
            }
            for (int v = 0; v < i.vec; ++v) {
                u64 x = is_signed(i.ty) ? u64(sign_extended(value[v], i.ty)) : value[v];
                w.values[size_t(i.d[v]) * kWarp + size_t(lane)] = zero_extended(x, running->width[i.d[v]]);
                if (undef >> v & 1) bad[v] |= 1u << lane;
            }
        }
        for (int v = 0; v < i.vec; ++v) w.undefined[i.d[v]] = (w.undefined[i.d[v]] & ~m) | bad[v];
    }

    void store(Warp& w, const Instruction& i, u32 m, u32 pc) {
        Block& b = *w.block;
        const u64* base = values_of(w, i.base);
        int n = bytes_of(i.ty), bytes = n * i.vec;
        u32 bad = undefined_lanes(w, i.base) & m, bad_value = 0;
        for (int v = 0; v < i.vec; ++v) bad_value |= undefined_lanes(w, i.s[v]) & m;
        if (i.space == GENERIC) stats.generic += __builtin_popcount(m);
        if (i.space <= GLOBAL) (bytes == 16 ? stats.wide : stats.narrow) += __builtin_popcount(m);
        for (u32 left = m; left; left &= left - 1) {
            int lane = __builtin_ctz(left);
            u32 tid = b.id << 10 | u32(w.index * kWarp + lane);
            if (bad >> lane & 1) {
                undefined(pc, tid, "address");
                continue;
            }
            if (bad_value >> lane & 1) undefined(pc, tid, "value stored");
            u64 address = base[lane] + u64(i.off);
            uint8_t now[32];
            for (int v = 0; v < i.vec; ++v) std::memcpy(now + v * n, &values_of(w, i.s[v])[lane], size_t(n));
            if (i.space == SHARED) {
                address &= 0xffffffff;
                if (address + u64(bytes) > b.shared.size()) {
                    reports.add(OUT_OF_BOUNDS, running->name + "/shared" + std::to_string(pc), [&] {
                        return who(tid) + " " + where(pc) + " writes shared+" + std::to_string(address);
                    });
                    continue;
                }
                if (!aligned(address, bytes, pc, tid)) continue;
                bool same = !std::memcmp(&b.shared[address], now, size_t(bytes));
                std::memcpy(&b.shared[address], now, size_t(bytes));
                for (int k = 0; k < bytes; ++k) {
                    b.shared_defined[address + u64(k)] = 1;
                    if (settings.races)
                        on_write(b, tid, b.shared_cells[address + u64(k)], pc, nullptr, address + u64(k),
                                 same);
                }
            } else {
                Allocation* a = checked(address, bytes, pc, tid);
                if (!a || !aligned(address, bytes, pc, tid)) continue;
                bool same = !std::memcmp(reinterpret_cast<const void*>(address), now, size_t(bytes));
                std::memcpy(reinterpret_cast<void*>(address), now, size_t(bytes));
                if (a->defined)
                    for (int k = 0; k < bytes; ++k) (*a->defined)[address - a->begin + u64(k)] = 1;
                if (settings.races) {
                    size_t first = (address - a->begin) / u64(a->granule),
                           last = (address + u64(bytes) - 1 - a->begin) / u64(a->granule);
                    for (size_t c = first; c <= last; ++c)
                        on_write(b, tid, a->cells[c], pc, a, address, same);
                }
            }
        }
    }

    // Lanes that are at the same instruction go on together, until the budget is used up, or they go
    // different ways, or wait, or come to where others of their warp are.
    void run(Warp& w, u32 mask, int pc, int budget, int stop_at) {
        Block& b = *w.block;
        auto leave = [&](int at) {
            for (u32 left = mask; left; left &= left - 1) w.pc[__builtin_ctz(left)] = at;
        };
        while (budget-- > 0) {
            if (pc >= stop_at) break;
            const Instruction& i = running->code[size_t(pc)];
            if (++stats.instructions > last_instruction) throw std::runtime_error("the kernel does not end");
            running->ran[size_t(pc)] = 1;
            u32 m = mask;
            if (i.pred >= 0) {
                const u64* p = &w.values[size_t(i.pred) * kWarp];
                u32 on = 0;
                for (int l = 0; l < kWarp; ++l) on |= u32((p[l] & 1) != u64(i.pneg)) << l;
                if (w.undefined[i.pred] & mask)
                    undefined(u32(pc),
                              b.id << 10 | u32(w.index * kWarp + __builtin_ctz(w.undefined[i.pred] & mask)),
                              "predicate");
                m &= on;
                if (i.op != BRA && !m) {
                    ++pc;
                    continue;
                }
            }
            switch (i.op) {
                case NOP:
                    break;
                case LD:
                    load(w, i, m, u32(pc));
                    break;
                case ST:
                    store(w, i, m, u32(pc));
                    break;
                case ATOM:
                    atom(w, i, m, u32(pc));
                    break;
                case FENCE:
                    fence(w, i, m);
                    break;
                case SHFL:
                    if (m != mask) sync_error(u32(pc), b.id << 10, "a predicated shuffle");
                    if (!arrive_at_shuffle(w, i, m, u32(pc))) return;
                    ++pc;
                    // others that had waited can go on too
                    if (w.ready() != mask) {
                        leave(pc);
                        return;
                    }
                    continue;
                case BAR:
                    if (m != mask) sync_error(u32(pc), b.id << 10, "a predicated barrier");
                    LANES w.bar_pc[lane] = pc;
                    leave(pc + 1);
                    w.bar |= mask;
                    b.arrived += __builtin_popcount(mask);
                    maybe_release(b);
                    return;
                case BRA: {
                    u32 rest = mask & ~m;
                    if (!rest) {
                        pc = i.target;
                        continue;
                    }
                    if (!m) break;
                    LANES w.pc[lane] = i.target;
                    for (u32 left = rest; left; left &= left - 1) w.pc[__builtin_ctz(left)] = pc + 1;
                    return;
                }
                case BRX: {
                    const u64* x = values_of(w, i.s[0]);
                    if (undefined_lanes(w, i.s[0]) & m) undefined(u32(pc), b.id << 10, "index of a branch");
                    bool alike = true;
                    int first = -1;
                    LANES {
                        u32 index = u32(x[lane]);
                        if (index >= i.targets.size()) {
                            reports.add(OTHER, running->name + "/brx" + std::to_string(pc),
                                        [&] { return where(u32(pc)) + ": no such target"; });
                            index = 0;
                        }
                        w.pc[lane] = i.targets[index];
                        if (first >= 0 && w.pc[lane] != first) alike = false;
                        first = w.pc[lane];
                    }
                    if (!alike) return;
                    pc = first;
                    continue;
                }
                case RET: {
                    leave(pc);
                    w.alive &= ~m;
                    b.alive -= __builtin_popcount(m);
                    if (b.arrived) maybe_release(b);
                    if (m == mask) return;
                    mask &= ~m;
                    break;
                }
                default:
                    compute(w, i, m, u32(pc));
            }
            ++pc;
        }
        leave(pc);
    }

    void launch() {
        std::vector<u32> order(blocks_of_launch);
        for (u32 i = 0; i < blocks_of_launch; ++i) order[i] = i;
        if (settings.order == 1) std::reverse(order.begin(), order.end());
        if (settings.order == 2)
            for (u32 i = blocks_of_launch; i > 1; --i) std::swap(order[i - 1], order[rng() % i]);
        size_t next = 0;
        u32 victim = settings.order == 2 && blocks_of_launch > 1 ? u32(rng() % blocks_of_launch) : kNone;
        for (;;) {
            while (next < order.size() && int(resident.size()) < settings.resident) start(order[next++]);
            if (ready.empty()) {
                if (resident.empty()) break;
                for (auto& b : resident)
                    for (auto& w : b->warps)
                        if (w.alive) {
                            sync_error(u32(w.pc[__builtin_ctz(w.alive)]), b->id << 10,
                                       "threads wait for ever");
                            return;
                        }
                break;
            }
            size_t at = settings.resident == 1 && !settings.split ? ready.size() - 1 : rng() % ready.size();
            Warp& w = *ready[at];
            // one block is held back, so that the others overtake it
            if (w.block->id == victim && ready.size() > 1 && rng() % 8) continue;
            u32 can = w.ready();
            if (can) {
                int lane, budget = settings.burst > 1 ? 1 + int(rng() % u64(settings.burst)) : 1,
                          stop = int(running->code.size());
                bool take_apart = settings.split && int(rng() % 100) < settings.split;
                if (take_apart) {
                    u32 k = u32(rng() % u64(__builtin_popcount(can))), left = can;
                    while (k--) left &= left - 1;
                    lane = __builtin_ctz(left);
                } else {
                    // the threads that are furthest behind
                    lane = __builtin_ctz(can);
                    for (int l = 0; l < kWarp; ++l)
                        if ((can >> l & 1) && w.pc[l] < w.pc[lane]) lane = l;
                }
                u32 mask = 0;
                for (int l = 0; l < kWarp; ++l)
                    if ((can >> l & 1) && w.pc[l] == w.pc[lane]) mask |= 1u << l;
                if (take_apart)
                    mask &= u32(rng()) | 1u << lane;
                else
                    for (int l = 0; l < kWarp; ++l)
                        if ((can >> l & 1) && !(mask >> l & 1)) stop = std::min(stop, w.pc[l]);
                run(w, mask, w.pc[lane], budget, stop);
            }
            if (!w.ready()) {
                // lanes that waited at a barrier may have joined the list meanwhile, at its end
                ready[at] = ready.back(), ready.pop_back();
                w.listed = false;
                Block* b = w.block;
                if (b->alive == 0)
                    for (size_t k = 0; k < resident.size(); ++k)
                        if (resident[k].get() == b) {
                            for (size_t r = ready.size(); r-- > 0;)
                                if (ready[r]->block == b) ready[r] = ready.back(), ready.pop_back();
                            pool.push_back(std::move(resident[k]));
                            resident[k] = std::move(resident.back()), resident.pop_back();
                            break;
                        }
            }
        }
    }
};

}  // namespace

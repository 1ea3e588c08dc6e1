// Who may know what: happens-before as the PTX memory model has it, and the races that it leaves.
//
// Within a block, barriers order. Between blocks, an edge leads from a thread that makes a fence (or a
// release) and then an atomic on some word, through the chain of atomics on that word, to a thread that makes
// an atomic and then a fence (or an acquire). Relaxed atomics by themselves order nothing, nor do shuffles.
// What is not ordered and touches the same bytes, not both reading, is a race. Part of machine.cpp.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "state.h"

namespace {

struct AtomicWord {
    // What whoever acquires this entry knows: of the writer's block what came before its barrier, of the
    // writer itself what came before its clock, and what the writer had acquired itself.
    struct Entry {
        u32 block, barrier_clock, thread, clock;
        u32 acquired[kAtomicWords], observed[kAtomicWords];  // the most of all entries so far
    };
    std::vector<Entry> log;
    std::unordered_map<u32, std::vector<u32>> by_block;  // indices into `log`
    struct Operation {
        u32 thread, clock, pc;
        bool narrow;  // of the block's scope: atomic towards its own block alone
    };
    std::vector<Operation> operations;
    bool broken = false;  // whether a plain store has ended the chain of atomics
};
std::vector<AtomicWord> atomic_words;

// Whether what `thread` did at `clock` happened before what thread `tid`, `t` of block `b`, does now.
bool happens_before(Block& b, const Thread& t, u32 tid, u32 thread, u32 clock) {
    if (thread == tid) return true;
    u32 block = thread >> 10;
    if (block == b.id && clock < b.barrier_clock) return true;
    for (size_t l = 0; l < atomic_words.size(); ++l) {
        if (!t.acquired[l]) continue;
        auto found = atomic_words[l].by_block.find(block);
        if (found == atomic_words[l].by_block.end()) continue;
        for (u32 e : found->second) {
            if (e >= t.acquired[l]) break;
            const auto& entry = atomic_words[l].log[e];
            if (clock < entry.barrier_clock || (entry.thread == thread && clock <= entry.clock)) return true;
        }
    }
    return false;
}

// The same of a block's latest reads.
bool readers_before(Block& b, const Thread& t, u32 tid, const Readers::Of& r) {
    if (!r.many) return happens_before(b, t, tid, r.thread, r.clock);
    if (r.block == b.id) return r.clock < b.barrier_clock;
    for (size_t l = 0; l < atomic_words.size(); ++l) {
        auto found = atomic_words[l].by_block.find(r.block);
        if (found == atomic_words[l].by_block.end()) continue;
        for (u32 e : found->second) {
            if (e >= t.acquired[l]) break;
            if (r.clock < atomic_words[l].log[e].barrier_clock) return true;
        }
    }
    return false;
}

void race(Kind kind, const char* what, u32 pc, u32 other_pc, u32 tid, u32 thread, const Allocation* a,
          u64 address) {
    std::string key = running->name + "/" + what + std::to_string(pc) + "/" + std::to_string(other_pc) + "/" +
                      std::to_string(kind) + ((tid ^ thread) >> 10 ? "/blocks/" : "/threads/") +
                      (a ? names[a->name] : "shared");
    reports.add(kind, key, [&] {
        return running->name + ": " + std::string(what) +
               ((tid ^ thread) >> 10 ? "between blocks " : "in a block ") + "on " +
               (a ? place(a, address) : "shared+" + std::to_string(address)) + ": " + who(tid) + " " +
               where(pc) + " against " + who(thread) + " " + where(other_pc);
    });
}

// Whether all atomics on a cell's word happened before; if not, `thread` and `pc` are of one that did not.
bool atoms_before(Block& b, Thread& t, u32 tid, Cell& c, u32& thread, u32& pc) {
    AtomicWord& loc = atomic_words[c.atom];
    u32 seen = t.observed[c.atom];
    for (u32 i = seen; i < loc.operations.size(); ++i)
        if (!happens_before(b, t, tid, loc.operations[i].thread, loc.operations[i].clock)) {
            thread = loc.operations[i].thread, pc = loc.operations[i].pc;
            return false;
        }
    return true;
}

// Reads by one thread, or by several of its block at once.
void note_reader(Block& b, u32 tid, Cell& c, u32 pc, bool many) {
    Thread& t = b.threads[tid & 1023];
    u32 block = b.id;
    if (c.more < 0) {
        // what was read before the block's last barrier is ordered before this read
        if (c.reader == kNone || (!many && !c.read_by_many && c.reader == tid) ||
            (c.reader >> 10 == block && c.read_clock < b.barrier_clock)) {
            c.reader = tid, c.read_clock = t.clock, c.read_pc = pc, c.read_by_many = many;
            return;
        }
        if (c.reader >> 10 == block) {
            c.reader = tid, c.read_clock = std::max(c.read_clock, t.clock), c.read_pc = pc,
            c.read_by_many = true;
            return;
        }
        c.more = int(readers.size());
        readers.push_back({});
        readers.back().of.push_back({c.reader >> 10, c.read_clock, c.reader, c.read_pc, c.read_by_many});
    }
    auto& of = readers[c.more].of;
    if (b.reader_at.size() <= size_t(c.more)) b.reader_at.resize(size_t(c.more) + 16, kNone);
    u32& at = b.reader_at[c.more];
    if (at >= of.size() || of[at].block != block) {
        at = kNone;
        if (of.size() < 8)
            for (u32 i = 0; i < of.size(); ++i)
                if (of[i].block == block) at = i;
        if (at == kNone) {
            at = u32(of.size());
            of.push_back({block, t.clock, tid, pc, many});
            return;
        }
    }
    auto& it = of[at];
    if (it.clock < b.barrier_clock || (!many && !it.many && it.thread == tid))
        it = {block, t.clock, tid, pc, many};
    else
        it = {block, std::max(it.clock, t.clock), tid, pc, true};
}

// Whether what is read was decided by what happened before: else there is a report.
bool on_read(Block& b, u32 tid, Cell& c, u32 pc, const Allocation* a, u64 address) {
    Thread& t = b.threads[tid & 1023];
    bool sound = true;
    if (c.writer != kNone && c.writer != tid && !happens_before(b, t, tid, c.writer, c.write_clock))
        race(RACE, "read/write ", pc, c.write_pc, tid, c.writer, a, address), sound = false;
    u32 thread, other_pc;
    if (c.atom >= 0 && !atoms_before(b, t, tid, c, thread, other_pc))
        race(RACE, "read/atomic ", pc, other_pc, tid, thread, a, address), sound = false;
    note_reader(b, tid, c, pc, false);
    return sound;
}

// `same`: what is written is there already.
void on_write(Block& b, u32 tid, Cell& c, u32 pc, const Allocation* a, u64 address, bool same) {
    Thread& t = b.threads[tid & 1023];
    if (c.writer != kNone && c.writer != tid && !happens_before(b, t, tid, c.writer, c.write_clock))
        race(same ? SAME_VALUE_RACE : RACE, "write/write ", pc, c.write_pc, tid, c.writer, a, address);
    if (c.more >= 0) {
        for (auto& r : readers[c.more].of)
            if (!readers_before(b, t, tid, r)) {
                race(RACE, "write/read ", pc, r.pc, tid, r.thread, a, address);
                break;
            }
        readers[c.more].of.clear();
    } else if (c.reader != kNone && (c.read_by_many || c.reader != tid) &&
               !readers_before(b, t, tid,
                               {c.reader >> 10, c.read_clock, c.reader, c.read_pc, c.read_by_many}))
        race(RACE, "write/read ", pc, c.read_pc, tid, c.reader, a, address);
    u32 thread, other_pc;
    if (c.atom >= 0) {
        if (!atoms_before(b, t, tid, c, thread, other_pc))
            race(RACE, "write/atomic ", pc, other_pc, tid, thread, a, address);
        atomic_words[c.atom].broken = true;
    }
    c.writer = tid, c.write_clock = t.clock, c.write_pc = pc;
    if (c.more < 0) c.reader = kNone;
}

// The index of a cell's atomic word.
int word_of(Cell& c) {
    if (c.atom >= 0 && !atomic_words[c.atom].broken) return c.atom;
    if (atomic_words.size() == kAtomicWords) throw std::runtime_error("too many atomic locations");
    atomic_words.push_back({});
    return c.atom = int(atomic_words.size()) - 1;
}

// The first `upto` entries of a word's log.
void acquire(Thread& t, int l, u32 upto) {
    t.acquired[l] = std::max(t.acquired[l], upto);
    if (!upto) return;
    const auto& e = atomic_words[l].log[upto - 1];
    for (int k = 0; k < kAtomicWords; ++k)
        t.acquired[k] = std::max(t.acquired[k], e.acquired[k]),
        t.observed[k] = std::max(t.observed[k], e.observed[k]);
}

// A new entry, by a thread that knows this.
void release(int l, u32 tid, u32 barrier_clock, u32 clock, const u32* acquired, const u32* observed) {
    auto& loc = atomic_words[l];
    AtomicWord::Entry e = {tid >> 10, barrier_clock, tid, clock, {}, {}};
    for (int k = 0; k < kAtomicWords; ++k) {
        e.acquired[k] = acquired[k], e.observed[k] = observed[k];
        if (!loc.log.empty())
            e.acquired[k] = std::max(e.acquired[k], loc.log.back().acquired[k]),
            e.observed[k] = std::max(e.observed[k], loc.log.back().observed[k]);
    }
    loc.by_block[tid >> 10].push_back(u32(loc.log.size()));
    loc.log.push_back(e);
}

}  // namespace

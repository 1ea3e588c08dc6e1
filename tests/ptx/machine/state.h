// The state of a launch: what it may touch, and where its blocks, warps and threads are. Part of machine.cpp.
//
// A thread is named by one number: its block's, times 1024, plus its own. Its clock counts its fences and the
// barriers of its block, and so tells which of its accesses came before them.
#pragma once

#include <sstream>

#include "ptx.h"
#include "reports.h"

namespace {

// What the race detector knows of a few neighbouring bytes: who wrote them last, and who has read them since.
struct Cell {
    u32 writer = kNone, write_clock = 0, write_pc = 0;
    u32 reader = kNone, read_clock = 0, read_pc = 0;
    bool read_by_many = false;  // by several threads of the reader's block
    int more = -1;              // index into `readers`, once two blocks have read
    int atom = -1;              // index into `atomic_words`, once an atomic was used here
};

// The latest reads of a cell, one entry for each block.
struct Readers {
    struct Of {
        u32 block, clock, thread, pc;
        bool many;
    };
    std::vector<Of> of;
};

// Memory that a launch may touch.
struct Allocation {
    u64 begin, end;
    int granule;   // bytes of a cell
    int name;      // index into `names`
    bool tracked;  // whether its bytes are undefined until they are written
    std::vector<Cell> cells;
    std::vector<uint8_t>* defined = nullptr;  // by byte, where it is tracked
};

std::vector<std::string> names;
std::vector<Allocation> allocations;
std::map<u64, std::vector<uint8_t>> defined_at;  // of tracked allocations, from launch to launch
std::vector<Readers> readers;

// What a thread knows of others. Everything that is written to an atomic word has a place in its log; a
// thread that has acquired the first n entries knows what their writers knew when they released them.
struct Thread {
    u32 clock = 1;
    bool fenced = false;  // whether it has made a fence, which releases what its later atomics publish
    u32 fence_barrier = 0, fence_clock = 0;  // its block's barrier clock, and its own, at that fence
    // by atomic word: entries acquired, operations seen, and entries that the next fence will acquire
    u32 acquired[kAtomicWords] = {}, observed[kAtomicWords] = {}, pending[kAtomicWords] = {};
    u32 fence_acquired[kAtomicWords] = {}, fence_observed[kAtomicWords] = {};  // the first two at that fence
};

struct Block;

// 32 threads, its lanes; each has a program counter of its own. Sets of lanes are masks of 32 bits.
struct Warp {
    Block* block;
    int index;
    std::vector<u64> values;     // by register and lane
    std::vector<u32> undefined;  // by register: lanes whose value is undefined
    int pc[kWarp];
    u32 alive, bar, shfl;  // lanes that have not exited, that wait at a barrier, that wait at a shuffle
    int bar_pc[kWarp];     // the barrier a lane waits at
    bool listed;           // whether the scheduler has it among those that can go on

    u32 ready() const { return alive & ~bar & ~shfl; }
};

struct Block {
    u32 id;
    std::vector<Warp> warps;
    std::vector<Thread> threads;
    std::vector<uint8_t> shared, shared_defined;
    std::vector<Cell> shared_cells;
    u32 barrier_clock;  // what the block's threads did at earlier clocks happened before its last barrier
    int alive, arrived;
    std::vector<u32> reader_at;  // by index into `readers`: where this block's entry was last
};

// How threads are interleaved, and what is checked.
struct Settings {
    u64 seed = 0;
    int approx =
        0;  // ex2, lg2 and rcp.approx: 0 nearest, 1 an ulp or two up, 2 down, 3 by a hash of the argument
    int resident = 8;   // blocks that run at once
    int burst = 64;     // the most instructions that a warp does before it is another one's turn
    int split = 0;      // of 100 turns, those in which only some lanes of a warp go on
    int order = 0;      // in which blocks start: 0 as they are numbered, 1 backwards, 2 shuffled
    bool races = true;  // whether races are looked for
};
Settings settings;

struct Stats {
    long launches = 0, instructions = 0;  // of warps
    long generic = 0, wide = 0,
         narrow = 0;          // accesses: by generic addresses; to global memory, of 16 bytes or fewer
    long divergent_bars = 0;  // barriers that warps met at different places of the program
    long approx = 0;          // instructions whose last bit PTX leaves open
} stats;

// xorshift: the same interleaving for the same seed
u64 rng_state;
u64 rng() {
    rng_state ^= rng_state << 13, rng_state ^= rng_state >> 7, rng_state ^= rng_state << 17;
    return rng_state;
}

const Function* running;
std::vector<uint8_t> params;  // of the launch
u32 blocks_of_launch, threads_of_launch;

// an instruction, a thread and an address in words
std::string where(u32 pc) {
    if (pc >= running->code.size()) return "?";
    int line = running->code[pc].line;
    std::string s = line < int(running->lines->size()) ? (*running->lines)[size_t(line)] : "";
    size_t a = s.find_first_not_of(" \t");
    s = a == std::string::npos ? "" : s.substr(a);
    for (char& c : s)
        if (c == '\t') c = ' ';
    return "line " + std::to_string(line + 1) + " `" + s + "`";
}

std::string who(u32 thread) {
    return "block " + std::to_string(thread >> 10) + " thread " + std::to_string(thread & 1023);
}

std::string place(const Allocation* a, u64 address) {
    std::ostringstream out;
    if (a)
        out << names[a->name] << "+" << address - a->begin;
    else
        out << "0x" << std::hex << address;
    return out.str();
}

}  // namespace

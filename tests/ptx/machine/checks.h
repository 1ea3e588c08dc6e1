// Whether an access is inside memory, aligned and of something defined. Part of machine.cpp.
#pragma once

#include "state.h"

namespace {

Allocation* find(u64 address) {
    size_t lo = 0, hi = allocations.size();
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (allocations[mid].begin <= address)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == 0) return nullptr;
    Allocation& a = allocations[lo - 1];
    return address < a.end ? &a : nullptr;
}

// The allocation that an instruction touched last: it mostly is the one it touches next.
struct Cache {
    u64 begin = 1, end = 0;
    Allocation* alloc = nullptr;
};
std::vector<Cache> caches;

// The allocation that holds these bytes, or null with a report.
Allocation* checked(u64 address, int bytes, u32 pc, u32 tid) {
    Cache& c = caches[pc];
    Allocation* a = c.alloc;
    if (!(address >= c.begin && address < c.end)) {
        a = find(address);
        if (a) c = {a->begin, a->end, a};
    }
    if (!a || address + u64(bytes) > a->end) {
        reports.add(OUT_OF_BOUNDS, running->name + "/bounds" + std::to_string(pc), [&] {
            std::string near;
            if (a)
                near = ", behind the end of " + names[a->name] + " (" + std::to_string(a->end - a->begin) +
                       " bytes)";
            else {
                size_t i = 0;
                while (i < allocations.size() && allocations[i].begin <= address) ++i;
                if (i > 0)
                    near = ", " + std::to_string(address - allocations[i - 1].end) + " past " +
                           names[allocations[i - 1].name];
            }
            return who(tid) + " " + where(pc) + " at " + place(a, address) + near;
        });
        return nullptr;
    }
    return a;
}

bool aligned(u64 address, int bytes, u32 pc, u32 tid) {
    // a power of two
    if ((address & u64(bytes - 1)) == 0) return true;
    reports.add(MISALIGNED, running->name + "/misaligned" + std::to_string(pc), [&] {
        return who(tid) + " " + where(pc) + " at " + place(find(address), address) +
               ", which is no multiple of " + std::to_string(bytes);
    });
    return false;
}

void undefined(u32 pc, u32 tid, const char* what) {
    reports.add(UNDEFINED, running->name + "/undefined" + what + std::to_string(pc),
                [&] { return who(tid) + " " + where(pc) + ": undefined " + what; });
}

void sync_error(u32 pc, u32 tid, const std::string& what) {
    reports.add(SYNC, running->name + "/sync" + what + std::to_string(pc),
                [&] { return who(tid) + " " + where(pc) + ": " + what; });
}

}  // namespace

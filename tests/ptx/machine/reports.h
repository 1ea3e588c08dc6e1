// What the machine finds wrong, each fault once per pair of instructions. Part of machine.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// no thread, no entry
constexpr u32 kNone = 0xffffffff;
// words of memory that a launch may use atomics on; the kernels use two
constexpr int kAtomicWords = 8;
constexpr int kWarp = 32;
enum Kind { RACE, SAME_VALUE_RACE, OUT_OF_BOUNDS, MISALIGNED, UNDEFINED, SYNC, OTHER, KINDS };
const char* const kKindNames[] = {
    "race", "same-value race", "out of bounds", "misaligned", "undefined", "sync", "other"};

struct Reports {
    std::map<std::string, long> counts;               // by what tells faults apart
    std::vector<std::pair<Kind, std::string>> first;  // each in words, where it was first seen
    void add(Kind kind, const std::string& key, const std::function<std::string()>& text) {
        if (counts[key]++ == 0) first.push_back({kind, text()});
    }
};
Reports reports;

}  // namespace

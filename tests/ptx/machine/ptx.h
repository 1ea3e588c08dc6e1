// PTX as instructions: what parse.cpp makes of its text. Everything that is not known is an error, never a
// guess.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

enum Type : uint8_t {
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    BF16,
    F16X2,
    BF16X2,
    F32,
    F64,
    PRED,
    NO_TYPE
};
constexpr int kBytes[] = {1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 4, 4, 8, 0, 0};
inline int bytes_of(Type t) { return kBytes[t]; }
inline bool is_signed(Type t) { return t >= S8 && t <= S64; }

enum Op : uint8_t {
    ADD,
    SUB,
    MUL_LO,
    MUL_HI,
    MUL_WIDE,
    MAD_LO,
    MAD_WIDE,
    FMUL,
    FMA,
    DIV,
    REM,
    RCP,
    RCP_APPROX,
    SQRT,
    EX2_APPROX,
    LG2_APPROX,
    MIN,
    MAX,
    ABS,
    NEG,
    NOT,
    AND,
    OR,
    XOR,
    SHL,
    SHR,
    SETP,
    SELP,
    BFE,
    PRMT,
    MOV,
    PACK,
    UNPACK,
    CVT,
    CVTA,
    LD,
    ST,
    ATOM,
    BRA,
    BRX,
    RET,
    BAR,
    FENCE,
    SHFL,
    NOP,
};
enum Space : uint8_t { GENERIC, GLOBAL, SHARED, PARAM, LOCAL, CONST };
enum Comparison : uint8_t {
    EQ,
    NE,
    LT,
    LE,
    GT,
    GE,
    LO,
    LS,
    HI,
    HS,
    EQU,
    NEU,
    LTU,
    LEU,
    GTU,
    GEU,
    NUM,
    NOT_A_NUMBER
};
enum Semantics : uint8_t { WEAK, RELAXED, ACQUIRE, RELEASE, ACQ_REL, SEQ };
enum Scope : uint8_t { CTA, GPU, SYS };
enum Round : uint8_t { RN, RZ, RM, RP, RNI, RZI, RMI, RPI, NOROUND };
enum ShflMode : uint8_t { UP, DOWN, BFLY, IDX };
enum AtomOp : uint8_t { A_ADD, A_MIN, A_MAX, A_EXCH, A_CAS, A_AND, A_OR, A_XOR, A_INC };

struct Operand {
    enum Kind : uint8_t { NONE, REG, CONST } kind = NONE;
    int idx = -1;
};

struct Instruction {
    Op op = NOP;
    Type ty = NO_TYPE, ty2 = NO_TYPE;  // ty2: what a cvt reads
    int pred = -1;                     // the register it depends on, if it depends on one
    bool pneg = false, ftz = false, sat = false, approx = false, nc = false;
    uint8_t nd = 0, ns = 0, vec = 1;  // destinations, sources, elements of an access
    int d[4] = {-1, -1, -1, -1};
    Operand s[4];
    Operand base;  // of an address
    int64_t off = 0;
    Space space = GENERIC;
    Semantics sem = WEAK;
    Scope scope = GPU;
    Comparison cmp = EQ;
    uint8_t bop = 0;  // 1 and, 2 or, 3 xor with a predicate
    Round round = NOROUND;
    uint8_t mode = 0;  // of a shuffle or an atomic
    int target = -1;   // of a branch: an index into the code
    std::vector<int> targets;
    int line = 0;
};

struct Param {
    std::string name;
    int offset, size, align;
};

struct Function {
    std::string name;
    std::vector<Instruction> code;
    std::shared_ptr<const std::vector<std::string>> lines;  // the module's text, by line number
    mutable std::vector<char> ran;                          // by instruction: whether a launch has run it
    int regs = 0;
    std::vector<uint8_t> width;  // bytes of each register, 0 for predicates
    std::vector<std::string> reg_names;
    std::vector<uint64_t> consts;
    std::vector<uint64_t> lanes_of_consts;  // each constant 32 times, as registers hold values
    std::vector<Param> params;
    int param_bytes = 0;
    int shared_static = 0;
    bool extern_shared = false;
    int threads = 0;
    int tid_reg = -1, ctaid_reg = -1, ntid_reg = -1, nctaid_reg = -1, lane_reg = -1;
    std::map<std::string, int> shared_at;
};

struct Module {
    std::vector<std::unique_ptr<Function>> functions;
};

std::unique_ptr<Module> parse(const std::string& text);

// PTX text to instructions: as much of the language as NVRTC and Triton use here, and errors for the rest.
#include "ptx.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <unordered_map>

namespace {

[[noreturn]] void fail(int line, const std::string& what) {
    throw std::runtime_error("line " + std::to_string(line + 1) + ": " + what);
}

std::string trim(const std::string& s) {
    size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
    return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

std::vector<std::string> split(const std::string& s, char by) {
    std::vector<std::string> out;
    size_t at = 0;
    for (;;) {
        size_t end = s.find(by, at);
        out.push_back(s.substr(at, end == std::string::npos ? end : end - at));
        if (end == std::string::npos) return out;
        at = end + 1;
    }
}

const std::map<std::string, Type> kTypes = {
    {"b8", B8},         {"b16", B16}, {"b32", B32}, {"b64", B64},   {"u8", U8},
    {"u16", U16},       {"u32", U32}, {"u64", U64}, {"s8", S8},     {"s16", S16},
    {"s32", S32},       {"s64", S64}, {"f16", F16}, {"bf16", BF16}, {"f16x2", F16X2},
    {"bf16x2", BF16X2}, {"f32", F32}, {"f64", F64}, {"pred", PRED}};

struct Piece {
    std::string text;
    int line;
};

struct Parser {
    std::shared_ptr<const std::vector<std::string>> lines;
    std::map<std::string, int> module_shared;  // name -> offset
    int module_shared_bytes = 0;
    std::string extern_shared;

    // of the function that is being read
    Function* f = nullptr;
    std::unordered_map<std::string, int> regs;
    std::unordered_map<std::string, uint64_t> symbols;  // parameters and shared variables
    std::unordered_map<uint64_t, int> const_at;
    std::unordered_map<std::string, int> labels;
    std::unordered_map<std::string, std::vector<std::string>> tables;
    std::vector<std::pair<int, std::string>> jumps, tabled;

    int constant(uint64_t x) {
        auto found = const_at.find(x);
        if (found != const_at.end()) return found->second;
        int i = int(f->consts.size());
        f->consts.push_back(x);
        return const_at[x] = i;
    }

    int add_reg(const std::string& name, int width) {
        f->width.push_back(uint8_t(width));
        f->reg_names.push_back(name);
        return regs[name] = f->regs++;
    }

    int reg(const std::string& name, int line) {
        auto found = regs.find(name);
        if (found == regs.end()) fail(line, "unknown register " + name);
        return found->second;
    }

    int special(int& at, const char* name) {
        if (at < 0) at = add_reg(name, 4);
        return at;
    }

    bool immediate(const std::string& s, Type ty, uint64_t& x) {
        if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F') && s.size() == 10) {
            x = std::strtoul(s.c_str() + 2, nullptr, 16);
            return true;
        }
        if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D') && s.size() == 18) {
            x = std::strtoull(s.c_str() + 2, nullptr, 16);
            return true;
        }
        const char* p = s.c_str();
        if (!(*p == '-' || (*p >= '0' && *p <= '9'))) return false;
        char* end;
        bool negative = *p == '-';
        uint64_t v = std::strtoull(negative ? p + 1 : p, &end, 0);
        if (*end == 'U') ++end;
        if (*end) return false;
        if (negative) v = 0 - v;
        int n = ty == PRED ? 1 : ty == NO_TYPE ? 8 : bytes_of(ty);
        x = n >= 8 ? v : v & ((1ull << (8 * n)) - 1);
        return true;
    }

    Operand operand(std::string s, Type ty, int line) {
        s = trim(s);
        if (s.size() > 1 && s[0] == '{' && s.back() == '}') s = trim(s.substr(1, s.size() - 2));
        Operand o;
        if (s == "%tid.x") return {Operand::REG, special(f->tid_reg, "%tid.x")};
        if (s == "%ctaid.x") return {Operand::REG, special(f->ctaid_reg, "%ctaid.x")};
        if (s == "%ntid.x") return {Operand::REG, special(f->ntid_reg, "%ntid.x")};
        if (s == "%nctaid.x") return {Operand::REG, special(f->nctaid_reg, "%nctaid.x")};
        if (s == "%laneid") return {Operand::REG, special(f->lane_reg, "%laneid")};
        if (s[0] == '%') return {Operand::REG, reg(s, line)};
        uint64_t x;
        if (immediate(s, ty, x)) return {Operand::CONST, constant(x)};
        auto found = symbols.find(s);
        if (found != symbols.end()) return {Operand::CONST, constant(found->second)};
        fail(line, "unknown operand " + s);
    }

    void address(std::string s, Instruction& ins, int line) {
        s = trim(s);
        if (s.size() < 2 || s[0] != '[' || s.back() != ']') fail(line, "no address: " + s);
        s = trim(s.substr(1, s.size() - 2));
        size_t plus = s.find('+');
        std::string base = trim(s.substr(0, plus));
        ins.off = plus == std::string::npos ? 0 : std::strtoll(trim(s.substr(plus + 1)).c_str(), nullptr, 0);
        ins.base = operand(base, B64, line);
    }

    // operands, commas inside braces and brackets kept
    std::vector<std::string> operands(const std::string& s) {
        std::vector<std::string> out;
        int depth = 0;
        std::string now;
        for (char c : s) {
            if (c == '{' || c == '[') ++depth;
            if (c == '}' || c == ']') --depth;
            if (c == ',' && depth == 0) {
                out.push_back(trim(now));
                now.clear();
            } else
                now += c;
        }
        if (!trim(now).empty()) out.push_back(trim(now));
        return out;
    }

    std::vector<std::string> members(const std::string& s) {
        if (s.size() > 1 && s[0] == '{') {
            std::vector<std::string> out;
            for (auto& x : split(s.substr(1, s.size() - 2), ',')) out.push_back(trim(x));
            return out;
        }
        return {s};
    }

    void declare_regs(const std::string& s, int line) {
        // .reg .b32 %r<5>
        std::string rest = trim(s.substr(4));
        size_t space = rest.find_first_of(" \t");
        Type ty = type(rest.substr(1, space - 1), line);
        for (auto& part : split(rest.substr(space), ',')) {
            std::string name = trim(part);
            size_t open = name.find('<');
            int width = ty == PRED ? 0 : bytes_of(ty);
            if (open == std::string::npos) {
                add_reg(name, width);
                continue;
            }
            int n = std::atoi(name.c_str() + open + 1);
            for (int i = 0; i < n; ++i) add_reg(name.substr(0, open) + std::to_string(i), width);
        }
    }

    Type type(const std::string& s, int line) {
        auto found = kTypes.find(s);
        if (found == kTypes.end()) fail(line, "unknown type " + s);
        return found->second;
    }

    // ".shared .align 4 .b8 name[32]" -> size, align, name
    void declare_shared(const std::string& s, std::map<std::string, int>& into, int& bytes, int line) {
        int align = 1;
        size_t at = s.find(".align");
        if (at != std::string::npos) align = std::atoi(s.c_str() + at + 6);
        size_t dot = s.rfind(" .");
        std::string rest = trim(s.substr(dot + 1));
        size_t space = rest.find_first_of(" \t");
        Type ty = type(rest.substr(1, space - 1), line);
        std::string name = trim(rest.substr(space));
        int n = 1;
        size_t open = name.find('[');
        if (open != std::string::npos) {
            n = std::atoi(name.c_str() + open + 1);
            name = trim(name.substr(0, open));
        }
        align = std::max(align, bytes_of(ty));
        bytes = (bytes + align - 1) / align * align;
        into[name] = bytes;
        bytes += n * bytes_of(ty);
    }

    void instruction(std::string s, int line) {
        Instruction ins;
        ins.line = line;
        if (s[0] == '@') {
            size_t space = s.find_first_of(" \t");
            std::string p = s.substr(1, space - 1);
            if (p[0] == '!') ins.pneg = true, p = p.substr(1);
            ins.pred = reg(p, line);
            s = trim(s.substr(space));
        }
        size_t space = s.find_first_of(" \t");
        std::string full = s.substr(0, space), rest = space == std::string::npos ? "" : trim(s.substr(space));
        std::vector<std::string> m = split(full, '.');
        std::string name = m[0];
        std::vector<std::string> mods(m.begin() + 1, m.end());
        std::vector<Type> types;
        std::vector<std::string> other;
        for (auto& x : mods) {
            auto found = kTypes.find(x);
            if (found != kTypes.end())
                types.push_back(found->second);
            else
                other.push_back(x);
        }
        auto has = [&](const char* x) {
            for (auto& o : other)
                if (o == x) return true;
            return false;
        };
        // every modifier must be known to the branch that handles the instruction
        auto known = [&](std::initializer_list<const char*> allowed) {
            for (auto& o : other) {
                bool ok = false;
                for (auto a : allowed) ok |= o == a;
                if (!ok) fail(line, "unknown modifier ." + o + " in " + s);
            }
        };
        if (!types.empty()) ins.ty = types[0];
        ins.ftz = has("ftz"), ins.sat = has("sat");
        std::vector<std::string> ops = operands(rest);
        auto simple = [&](Op op, int sources) {
            ins.op = op;
            if (int(ops.size()) != sources + 1) fail(line, "wrong number of operands: " + s);
            ins.nd = 1, ins.d[0] = reg(ops[0], line);
            ins.ns = uint8_t(sources);
            for (int i = 0; i < sources; ++i) ins.s[i] = operand(ops[i + 1], ins.ty, line);
        };
        bool fp = ins.ty == F32 || ins.ty == F64;
        auto need_rn = [&] {
            if (fp && !has("rn")) fail(line, "rounding not given: " + s);
        };
        if (name == "add" || name == "sub") {
            known({"rn", "ftz"}), need_rn();
            simple(name == "add" ? ADD : SUB, 2);
        } else if (name == "mul") {
            known({"rn", "ftz", "lo", "hi", "wide"}), need_rn();
            simple(fp ? FMUL : has("wide") ? MUL_WIDE : has("hi") ? MUL_HI : MUL_LO, 2);
        } else if (name == "mad") {
            known({"lo", "wide"});
            if (fp) fail(line, s);
            simple(has("wide") ? MAD_WIDE : MAD_LO, 3);
            if (has("wide")) {
                Type wide = ins.ty == U32 ? U64 : ins.ty == S32 ? S64 : ins.ty == U16 ? U32 : S32;
                ins.s[2] = operand(ops[3], wide, line);
            }
        } else if (name == "fma") {
            known({"rn", "ftz"}), need_rn();
            simple(FMA, 3);
        } else if (name == "div") {
            known({"rn", "ftz"}), need_rn();
            simple(DIV, 2);
        } else if (name == "rem") {
            known({});
            simple(REM, 2);
        } else if (name == "rcp") {
            known({"rn", "approx", "ftz"});
            simple(has("approx") ? RCP_APPROX : RCP, 1);
        } else if (name == "sqrt") {
            known({"rn", "ftz"}), need_rn();
            simple(SQRT, 1);
        } else if (name == "ex2") {
            known({"approx", "ftz"});
            simple(EX2_APPROX, 1);
        } else if (name == "lg2") {
            known({"approx", "ftz"});
            simple(LG2_APPROX, 1);
        } else if (name == "min" || name == "max") {
            known({"ftz"});
            simple(name == "min" ? MIN : MAX, 2);
        } else if (name == "abs" || name == "neg" || name == "not") {
            known({"ftz"});
            simple(name == "abs" ? ABS : name == "neg" ? NEG : NOT, 1);
        } else if (name == "and" || name == "or" || name == "xor") {
            known({});
            simple(name == "and" ? AND : name == "or" ? OR : XOR, 2);
        } else if (name == "shl" || name == "shr") {
            known({});
            simple(name == "shl" ? SHL : SHR, 2);
            ins.s[1] = operand(ops[2], U32, line);
        } else if (name == "bfe") {
            known({});
            simple(BFE, 3);
            ins.s[1] = operand(ops[2], U32, line), ins.s[2] = operand(ops[3], U32, line);
            if (ins.ty != U32) fail(line, "bfe not modelled: " + s);
        } else if (name == "prmt") {
            known({});
            simple(PRMT, 3);
        } else if (name == "setp") {
            static const std::map<std::string, Comparison> cmps = {
                {"eq", EQ},   {"ne", NE},   {"lt", LT},   {"le", LE},   {"gt", GT},   {"ge", GE},
                {"lo", LO},   {"ls", LS},   {"hi", HI},   {"hs", HS},   {"equ", EQU}, {"neu", NEU},
                {"ltu", LTU}, {"leu", LEU}, {"gtu", GTU}, {"geu", GEU}, {"num", NUM}, {"nan", NOT_A_NUMBER}};
            auto c = cmps.find(other.at(0));
            if (c == cmps.end()) fail(line, "unknown comparison: " + s);
            ins.cmp = c->second;
            for (size_t i = 1; i < other.size(); ++i) {
                if (other[i] == "and")
                    ins.bop = 1;
                else if (other[i] == "or")
                    ins.bop = 2;
                else if (other[i] == "xor")
                    ins.bop = 3;
                else if (other[i] != "ftz")
                    fail(line, "unknown modifier: " + s);
            }
            ins.op = SETP;
            auto ds = split(ops[0], '|');
            ins.nd = uint8_t(ds.size());
            for (size_t i = 0; i < ds.size(); ++i) ins.d[i] = reg(trim(ds[i]), line);
            ins.ns = uint8_t(ops.size() - 1);
            if (ins.ns != (ins.bop ? 3 : 2)) fail(line, "wrong number of operands: " + s);
            for (int i = 0; i < ins.ns; ++i) ins.s[i] = operand(ops[i + 1], i == 2 ? PRED : ins.ty, line);
            if (ins.nd == 2 && ins.ty != F16X2 && ins.ty != BF16X2) fail(line, "two predicates: " + s);
        } else if (name == "selp") {
            known({});
            simple(SELP, 3);
            ins.s[2] = operand(ops[3], PRED, line);
        } else if (name == "mov") {
            known({});
            if (ops.size() != 2) fail(line, s);
            if (ops[0][0] == '{') {
                auto ds = members(ops[0]);
                if (ds.size() != 2) fail(line, s);
                ins.op = UNPACK, ins.nd = 2, ins.ns = 1;
                for (int i = 0; i < 2; ++i) ins.d[i] = ds[i] == "_" ? -1 : reg(ds[i], line);
                ins.s[0] = operand(ops[1], ins.ty, line);
            } else if (ops[1][0] == '{' && members(ops[1]).size() > 1) {
                auto ss = members(ops[1]);
                if (ss.size() != 2) fail(line, s);
                ins.op = PACK, ins.nd = 1, ins.ns = 2, ins.d[0] = reg(ops[0], line);
                Type half = ins.ty == B32 ? B16 : B32;
                for (int i = 0; i < 2; ++i) ins.s[i] = operand(ss[i], half, line);
            } else
                simple(MOV, 1);
        } else if (name == "cvt") {
            static const std::map<std::string, Round> rounds = {{"rn", RN},   {"rz", RZ},   {"rm", RM},
                                                                {"rp", RP},   {"rni", RNI}, {"rzi", RZI},
                                                                {"rmi", RMI}, {"rpi", RPI}};
            if (types.size() != 2) fail(line, s);
            ins.op = CVT, ins.ty = types[0], ins.ty2 = types[1];
            for (auto& o : other) {
                auto r = rounds.find(o);
                if (r != rounds.end())
                    ins.round = r->second;
                else if (o != "ftz" && o != "sat")
                    fail(line, "unknown modifier: " + s);
            }
            ins.nd = 1, ins.d[0] = reg(ops[0], line), ins.ns = uint8_t(ops.size() - 1);
            for (int i = 0; i < ins.ns; ++i) ins.s[i] = operand(ops[i + 1], ins.ty2, line);
            bool packed = ins.ty == F16X2 || ins.ty == BF16X2;
            if (ins.ns != (packed ? 2 : 1)) fail(line, s);
        } else if (name == "cvta") {
            known({"to", "global"});
            simple(MOV, 1);
        } else if (name == "ld" || name == "st" || name == "atom" || name == "red") {
            bool atom = name == "atom" || name == "red";
            ins.op = atom ? ATOM : name == "ld" ? LD : ST;
            if (atom) ins.sem = RELAXED;
            for (auto& o : other) {
                if (o == "global")
                    ins.space = GLOBAL;
                else if (o == "shared" || o == "shared::cta")
                    ins.space = SHARED;
                else if (o == "param")
                    ins.space = PARAM;
                else if (o == "local")
                    ins.space = LOCAL;
                else if (o == "const")
                    ins.space = CONST;
                else if (o == "v2")
                    ins.vec = 2;
                else if (o == "v4")
                    ins.vec = 4;
                else if (o == "cg" || o == "ca" || o == "cs" || o == "cv" || o == "lu" || o == "wb" ||
                         o == "wt" || o == "weak") {
                } else if (o == "nc")
                    ins.nc = true;
                else if (o == "relaxed")
                    ins.sem = RELAXED;
                else if (o == "acquire")
                    ins.sem = ACQUIRE;
                else if (o == "release")
                    ins.sem = RELEASE;
                else if (o == "acq_rel")
                    ins.sem = ACQ_REL;
                else if (o == "cta")
                    ins.scope = CTA;
                else if (o == "gpu" || o == "cluster")
                    ins.scope = GPU;
                else if (o == "sys")
                    ins.scope = SYS;
                else if (atom && o == "add")
                    ins.mode = A_ADD;
                else if (atom && o == "exch")
                    ins.mode = A_EXCH;
                else if (atom && o == "or")
                    ins.mode = A_OR;
                else if (atom && o == "and")
                    ins.mode = A_AND;
                else if (atom && o == "max")
                    ins.mode = A_MAX;
                else if (atom && o == "min")
                    ins.mode = A_MIN;
                else
                    fail(line, "unknown modifier ." + o + " in " + s);
            }
            if (ins.space == LOCAL || ins.space == CONST) fail(line, "memory not modelled: " + s);
            if (name == "ld") {
                auto ds = members(ops[0]);
                if (int(ds.size()) != ins.vec) fail(line, s);
                ins.nd = ins.vec;
                for (int i = 0; i < ins.vec; ++i) ins.d[i] = reg(ds[i], line);
                address(ops[1], ins, line);
            } else if (name == "st") {
                address(ops[0], ins, line);
                auto ss = members(ops[1]);
                if (int(ss.size()) != ins.vec) fail(line, s);
                ins.ns = ins.vec;
                for (int i = 0; i < ins.vec; ++i) ins.s[i] = operand(ss[i], ins.ty, line);
            } else {
                if (ins.space != GLOBAL || bytes_of(ins.ty) < 4 || ins.ty == F32 || ins.ty == F64)
                    fail(line, "atomic not modelled: " + s);
                bool red = name == "red";
                if (!red) ins.nd = 1, ins.d[0] = reg(ops[0], line);
                address(ops[red ? 0 : 1], ins, line);
                ins.ns = 1, ins.s[0] = operand(ops[red ? 1 : 2], ins.ty, line);
            }
        } else if (name == "bra") {
            known({"uni"});
            ins.op = BRA;
            jumps.push_back({int(f->code.size()), ops[0]});
        } else if (name == "brx") {
            known({"idx"});
            ins.op = BRX, ins.ns = 1, ins.s[0] = operand(ops[0], U32, line);
            tabled.push_back({int(f->code.size()), ops[1]});
        } else if (name == "ret" || name == "exit") {
            ins.op = RET;
        } else if (name == "bar" || name == "barrier") {
            if (!has("sync") || ops.size() != 1 || (ops[0] != "0")) fail(line, "barrier not modelled: " + s);
            ins.op = BAR;
        } else if (name == "membar") {
            ins.op = FENCE, ins.sem = SEQ;
            ins.scope = has("cta") ? CTA : has("sys") ? SYS : GPU;
        } else if (name == "fence") {
            ins.op = FENCE, ins.sem = has("sc") ? SEQ : ACQ_REL;
            ins.scope = has("cta") ? CTA : has("sys") ? SYS : GPU;
            known({"sc", "acq_rel", "cta", "gpu", "sys"});
        } else if (name == "shfl") {
            known({"sync", "up", "down", "bfly", "idx"});
            ins.op = SHFL;
            ins.mode = has("up") ? UP : has("down") ? DOWN : has("bfly") ? BFLY : IDX;
            auto ds = split(ops[0], '|');
            ins.nd = uint8_t(ds.size());
            for (size_t i = 0; i < ds.size(); ++i) ins.d[i] = reg(trim(ds[i]), line);
            ins.ns = 4;
            if (ops.size() != 5) fail(line, s);
            for (int i = 0; i < 4; ++i) ins.s[i] = operand(ops[i + 1], B32, line);
        } else
            fail(line, "unknown instruction: " + s);
        f->code.push_back(ins);
    }

    void body(const std::vector<Piece>& pieces) {
        for (auto& piece : pieces) {
            std::string s = trim(piece.text);
            int line = piece.line;
            for (;;) {
                if (s.empty()) break;
                if (s[0] == '{' || s[0] == '}') {
                    s = trim(s.substr(1));
                    continue;
                }
                size_t colon = s.find(':');
                size_t other = s.find_first_of(" \t\n[{,");
                if (colon != std::string::npos && colon < other &&
                    !(colon + 1 < s.size() && s[colon + 1] == ':')) {
                    labels[s.substr(0, colon)] = int(f->code.size());
                    std::string label = s.substr(0, colon);
                    s = trim(s.substr(colon + 1));
                    if (s.rfind(".branchtargets", 0) == 0) {
                        std::vector<std::string> targets;
                        for (auto& t : split(s.substr(14), ',')) targets.push_back(trim(t));
                        tables[label] = targets;
                        s.clear();
                    }
                    continue;
                }
                break;
            }
            if (s.empty()) continue;
            if (s[0] == '.') {
                if (s.rfind(".reg", 0) == 0)
                    declare_regs(s, line);
                else if (s.rfind(".shared", 0) == 0) {
                    std::map<std::string, int> own;
                    declare_shared(s, own, f->shared_static, line);
                    for (auto& [name, at] : own) symbols[name] = uint64_t(at), f->shared_at[name] = at;
                } else if (s.rfind(".pragma", 0) != 0)
                    fail(line, "unknown directive: " + s);
                continue;
            }
            instruction(s, line);
        }
        for (auto& [at, label] : jumps) {
            auto found = labels.find(label);
            if (found == labels.end()) fail(f->code[at].line, "no label " + label);
            f->code[at].target = found->second;
        }
        for (auto& [at, table] : tabled)
            for (auto& label : tables.at(table)) f->code[at].targets.push_back(labels.at(label));
        // code that falls off the end returns
        Instruction end;
        end.op = RET;
        f->code.push_back(end);
        f->ran.assign(f->code.size(), 0);
        for (uint64_t c : f->consts)
            for (int i = 0; i < 32; ++i) f->lanes_of_consts.push_back(c);
    }
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) {
    auto module = std::make_unique<Module>();
    Parser p;
    p.lines = std::make_shared<const std::vector<std::string>>(split(text, '\n'));
    // without comments, and without what is for debuggers
    std::vector<std::string> code;
    bool debug = false;
    for (auto line : *p.lines) {
        size_t slashes = line.find("//");
        if (slashes != std::string::npos) line = line.substr(0, slashes);
        std::string t = trim(line);
        if (t.rfind(".section", 0) == 0) debug = true;
        if (debug || t.rfind(".loc", 0) == 0 || t.rfind(".file", 0) == 0) line = "";
        code.push_back(line);
    }
    size_t i = 0;
    while (i < code.size()) {
        std::string t = trim(code[i]);
        if (t.empty() || t.rfind(".version", 0) == 0 || t.rfind(".target", 0) == 0 ||
            t.rfind(".address_size", 0) == 0) {
            ++i;
            continue;
        }
        if (t.rfind(".shared", 0) == 0) {
            p.declare_shared(t.substr(0, t.find(';')), p.module_shared, p.module_shared_bytes, int(i));
            ++i;
            continue;
        }
        if (t.rfind(".extern .shared", 0) == 0) {
            std::string name = trim(t.substr(t.rfind(' ')));
            p.extern_shared = name.substr(0, name.find('['));
            ++i;
            continue;
        }
        if (t.rfind(".global", 0) == 0 && t.find(';') != std::string::npos) {
            // a string for debuggers; whoever uses it meets an unknown symbol
            ++i;
            continue;
        }
        size_t entry = t.find(".entry");
        if (entry == std::string::npos) fail(int(i), "unknown: " + t);
        auto f = std::make_unique<Function>();
        f->lines = p.lines;
        p.f = f.get();
        p.regs.clear(), p.symbols.clear(), p.const_at.clear(), p.labels.clear(), p.tables.clear(),
            p.jumps.clear(), p.tabled.clear();
        std::string head;
        while (i < code.size() && trim(code[i]) != "{") head += code[i++] + "\n";
        size_t open = head.find('('), close = head.find(')');
        f->name = trim(head.substr(head.find(".entry") + 6, open - head.find(".entry") - 6));
        int at = 0;
        for (auto& decl : split(head.substr(open + 1, close - open - 1), ',')) {
            std::string d = trim(decl);
            if (d.empty()) continue;
            size_t space = d.rfind(' ');
            std::string name = trim(d.substr(space));
            size_t bracket = name.find('[');
            int n = 1, align = 1;
            std::vector<std::string> words = split(d, ' ');
            Type ty = NO_TYPE;
            for (size_t w = 0; w < words.size(); ++w) {
                if (words[w] == ".ptr") break;
                if (words[w] == ".align")
                    align = std::atoi(words[w + 1].c_str());
                else if (words[w].size() > 1 && kTypes.count(words[w].substr(1)))
                    ty = kTypes.at(words[w].substr(1));
            }
            if (ty == NO_TYPE) fail(int(i), "parameter: " + d);
            if (bracket != std::string::npos)
                n = std::atoi(name.c_str() + bracket + 1), name = name.substr(0, bracket);
            align = std::max(align, bytes_of(ty));
            at = (at + align - 1) / align * align;
            f->params.push_back({name, at, n * bytes_of(ty), align});
            p.symbols[name] = uint64_t(at);
            at += n * bytes_of(ty);
        }
        f->param_bytes = at;
        for (const char* key : {".maxntid", ".reqntid"}) {
            size_t found = head.find(key);
            if (found != std::string::npos) f->threads = std::atoi(head.c_str() + found + 8);
        }
        for (auto& [name, offset] : p.module_shared)
            p.symbols[name] = uint64_t(offset), f->shared_at[name] = offset;
        f->shared_static = p.module_shared_bytes;
        ++i;
        // statements until the brace that closes the function
        std::vector<Piece> pieces;
        std::string now;
        int from = int(i), depth = 1;
        bool fresh = true;
        for (; i < code.size() && depth; ++i) {
            for (char c : code[i]) {
                if (c == '{') ++depth;
                if (c == '}' && --depth == 0) break;
                if (c == ';') {
                    pieces.push_back({now, from});
                    now.clear();
                    fresh = true;
                } else {
                    // a label's line is not the instruction's
                    if (c != ' ' && c != '\t') {
                        if (fresh) from = int(i);
                        fresh = c == ':' && code[i].find(';') == std::string::npos;
                    }
                    now += c;
                }
            }
            now += '\n';
        }
        if (!p.extern_shared.empty()) {
            // behind what is static; nothing static is used beside it by Triton
            f->extern_shared = true;
            p.symbols[p.extern_shared] = 0;
            f->shared_at[p.extern_shared] = 0;
        }
        p.body(pieces);
        if (f->extern_shared && f->shared_static) fail(int(i), "static beside dynamic shared memory");
        module->functions.push_back(std::move(f));
    }
    return module;
}

"""The step in two Triton kernels: the gradients' norm, and AdamW with its schedule and counters.

fusedlr/gpu.py launches them; they mean what `reference.step_` means. One launch of each per bucket of
dtypes, the norm only where one is needed. Nothing is specialised on a value, and fp64 is not used.

Layout. Everything a program reads lies in device memory in the tables of fusedlr/tables.py; kernel arguments
are where the tables are and how long. A program owns one chunk of one tensor, 4096 elements, which a row of
`chunks` names; it finds the tensor's addresses in `tensors` and `grads`, its group's hyperparameters in
`ints` and `floats`, evaluates the learning rate at the group's `k` and updates tile by tile. Tensors whose
addresses all lie on 16 bytes take the 128-bit path, decided per program from the addresses; tails and
everything else are masked and scalar. A group without elements has one empty chunk, so that somebody says
which rate it used and there is always something to launch.

Order. Every program takes a ticket when it has read its last counter: behind a barrier, because the compiler
puts none between the other threads' reads and the atomic. The program with the last ticket of the step,
which over several buckets is one of the last launch, knows that all others are done with the counters and
moves them. The norm's last program adds up the partial sums of all chunks in a fixed order, so bits repeat.

Memory traffic in bytes per element, parameter + moments in fp32: the norm reads 4 (g), the update reads 16
(p g m v) and writes 12 (p m v). 16-bit parameters with fp32 moments: 2, then 12 and 10; with 16-bit moments:
2, then 8 and 6. amsgrad reads and writes one moment more. Tables cost about 100 bytes per chunk.
"""

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget

from fusedlr import reference, tables
from fusedlr._triton_math import bias_correction
from fusedlr._triton_schedule import PHASE_FLOATS, evaluate

CHUNK = tl.constexpr(tables.CHUNK)
# 8 elements per thread: two 128-bit accesses in fp32, one in 16 bits, at 63 registers (sm_90)
WIDE = tl.constexpr(1024)
WIDE_TILES = tl.constexpr(tables.CHUNK // 1024)
# one scalar access needs an address of its own, in two registers
NARROW = tl.constexpr(256)
NARROW_TILES = tl.constexpr(tables.CHUNK // 256)
THREADS = 128
# lanes of the last programs' loops: over groups and tensors, where more take registers from all programs, and
# over partial sums, 10,000 for 40 M elements
LANES = tl.constexpr(512)
SUMS = tl.constexpr(1024)
CLIP_EPS = tl.constexpr(reference._CLIP_EPS)
# the interpreter truncates fp32 to bf16, where hardware rounds
TRUNCATES = tl.constexpr(knobs.runtime.interpret)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# names of the columns -> their positions
_TENSORS, _CHUNKS = tables.TENSORS, tables.CHUNKS
TENSOR_COLUMNS = tl.constexpr(len(_TENSORS))
PARAM = tl.constexpr(_TENSORS.index("param"))
EXP_AVG = tl.constexpr(_TENSORS.index("exp_avg"))
EXP_AVG_SQ = tl.constexpr(_TENSORS.index("exp_avg_sq"))
TOP = tl.constexpr(_TENSORS.index("top"))
STEP = tl.constexpr(_TENSORS.index("step"))
NUMEL = tl.constexpr(_TENSORS.index("numel"))
GROUP_OF = tl.constexpr(_TENSORS.index("group"))

CHUNK_COLUMNS = tl.constexpr(len(_CHUNKS))
TENSOR = tl.constexpr(_CHUNKS.index("tensor"))
INDEX = tl.constexpr(_CHUNKS.index("index"))
SLOT = tl.constexpr(_CHUNKS.index("slot"))
GROUP = tl.constexpr(_CHUNKS.index("group"))
LEADS = tl.constexpr(_CHUNKS.index("leads"))

_INTS, _FLOATS = tables.GROUP_INTS, tables.GROUP_FLOATS
GROUP_INTS = tl.constexpr(len(_INTS))
FIRST_PHASE = tl.constexpr(_INTS.index("first_phase"))
LAST_PHASE = tl.constexpr(_INTS.index("last_phase"))
LR = tl.constexpr(_INTS.index("lr"))
SCOPE = tl.constexpr(_INTS.index("scope"))
NORMED = tl.constexpr(_INTS.index("normed"))
SKIP_NONFINITE = tl.constexpr(_INTS.index("skip_nonfinite"))
ADVANCE = tl.constexpr(_INTS.index("advance"))
ACTIVE = tl.constexpr(_INTS.index("active"))
FIRST_SLOT = tl.constexpr(_INTS.index("first_slot"))
LAST_SLOT = tl.constexpr(_INTS.index("last_slot"))

GROUP_FLOATS = tl.constexpr(len(_FLOATS))
RATE = tl.constexpr(_FLOATS.index("rate"))
LOG_B1_HI = tl.constexpr(_FLOATS.index("log_b1_hi"))
LOG_B1_LO = tl.constexpr(_FLOATS.index("log_b1_lo"))
LOG_B2_HI = tl.constexpr(_FLOATS.index("log_b2_hi"))
LOG_B2_LO = tl.constexpr(_FLOATS.index("log_b2_lo"))
ONE_B1 = tl.constexpr(_FLOATS.index("one_b1"))
B2 = tl.constexpr(_FLOATS.index("b2"))
ONE_B2 = tl.constexpr(_FLOATS.index("one_b2"))
EPS = tl.constexpr(_FLOATS.index("eps"))
WEIGHT_DECAY = tl.constexpr(_FLOATS.index("weight_decay"))
MAX_GRAD_NORM = tl.constexpr(_FLOATS.index("max_grad_norm"))
SIGN = tl.constexpr(_FLOATS.index("sign"))


# --- one element


@triton.jit
def adamw(p, g, m, v, top, factor, decay, lr_bc1, root_bc2, eps, one_b1, b2, one_b2):
    """`reference.adamw_` on one element; `top`, its largest v so far, is below 0 without amsgrad."""
    g = g * factor
    p = p - decay * p
    m = m + (g - m) * one_b1
    # in this order, as torch: the square of a finite gradient may overflow
    v = b2 * v + (one_b2 * g) * g
    # as torch.maximum: nan wins
    top = tl.where((v <= top) | (top != top), top, v)
    p = p - lr_bc1 * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(top), root_bc2) + eps)
    return p, m, v, top


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """x, fp32, rounded to nearest in another type."""
    if TRUNCATES and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where(x != x, 0x7FC0, nearest).to(tl.uint16).to(TYPE, bitcast=True)
    return x.to(TYPE)


# --- one tile


@triton.jit
def at(address, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the elements of a tile that begins at element `first` of an array."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        return pointer + tl.multiple_of(first, WIDE) + tl.arange(0, WIDE)
    else:
        return pointer + first + tl.arange(0, NARROW)


@triton.jit
def read(pointers, inside, ALIGNED: tl.constexpr):
    """The elements at some pointers in fp32, 0 outside."""
    if ALIGNED:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def write(pointers, x, inside, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Round and store elements, none of them outside."""
    if ALIGNED:
        tl.store(pointers, narrow(x, TYPE))
    else:
        tl.store(pointers, narrow(x, TYPE), mask=inside)


@triton.jit
def update_tile(
    row,
    g,
    first,
    left,
    s,
    PARAMS: tl.constexpr,
    MOMENTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """AdamW on a tile of a tensor from element `first`: `left` elements, or a whole tile if aligned."""
    factor, decay, lr_bc1, root_bc2, eps, one_b1, b2, one_b2 = s
    inside = tl.arange(0, NARROW) < left
    ps = at(tl.load(row + PARAM), first, PARAMS, ALIGNED)
    ms = at(tl.load(row + EXP_AVG), first, MOMENTS, ALIGNED)
    vs = at(tl.load(row + EXP_AVG_SQ), first, MOMENTS, ALIGNED)
    p = read(ps, inside, ALIGNED)
    g = read(at(g, first, PARAMS, ALIGNED), inside, ALIGNED)
    m = read(ms, inside, ALIGNED)
    v = read(vs, inside, ALIGNED)
    top = tl.full(v.shape, -1.0, tl.float32)
    if AMSGRAD:
        # a group without it may share the launch; a mask of one value leaves the accesses wide
        address = tl.load(row + TOP)
        tops = at(address, first, MOMENTS, ALIGNED)
        # compared as a vector: the interpreter of Triton 3.9 takes a flag of one number for an integer
        if ALIGNED:
            kept = tl.zeros([WIDE], tl.int64) + address != 0
        else:
            kept = inside & (tl.zeros([NARROW], tl.int64) + address != 0)
        top = tl.load(tops, mask=kept, other=-1.0).to(tl.float32)
    p, m, v, top = adamw(p, g, m, v, top, factor, decay, lr_bc1, root_bc2, eps, one_b1, b2, one_b2)
    write(ps, p, inside, PARAMS, ALIGNED)
    write(ms, m, inside, MOMENTS, ALIGNED)
    write(vs, v, inside, MOMENTS, ALIGNED)
    if AMSGRAD:
        tl.store(tops, narrow(top, MOMENTS), mask=kept)


@triton.jit
def square_tile(g, first, left, factor, PARAMS: tl.constexpr, ALIGNED: tl.constexpr):
    """The sum of squares of `factor` times the gradients of a tile."""
    g = read(at(g, first, PARAMS, ALIGNED), tl.arange(0, NARROW) < left, ALIGNED) * factor
    return g * g


# --- one chunk


@triton.jit
def place(chunk, tensors, grads):
    """The row of a chunk's tensor, its gradient's address, the chunk's first element and its size."""
    tensor = tl.load(chunk + TENSOR)
    # -1 is the empty chunk of a group without elements: its row is not read, as the table may have none
    exists = tensor >= 0
    row = tensors + tensor * TENSOR_COLUMNS
    first = tl.load(chunk + INDEX).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(row + NUMEL, mask=exists, other=0) - first, CHUNK)
    return row, tl.load(grads + tensor, mask=exists, other=0), first, count


@triton.jit
def decide(ints, floats, norms, found_inf):
    """What holds for a group, or a vector of groups: its norm, the clipping coefficient, whether to skip."""
    normed = tl.load(ints + NORMED) != 0
    scope = tl.load(ints + SCOPE)
    norm = tl.load(norms + scope, mask=normed, other=float("nan"))
    limit = tl.load(floats + MAX_GRAD_NORM)
    # a nan stays; without clipping the limit is nan
    coef = tl.div_rn(limit, norm + CLIP_EPS)
    coef = tl.where((coef > 1) | (limit != limit), 1.0, coef)
    # anything but 0, nan included; read as often as there are groups, as the interpreter cannot spread a flag
    skip = tl.load(found_inf + scope * 0) != 0
    skip = skip | ((tl.load(ints + SKIP_NONFINITE) != 0) & ~(tl.abs(norm) < float("inf")))
    return norm, coef, skip


@triton.jit
def lr_at(ints, floats, phase_ints, phase_floats, table, k):
    """The learning rate of the group with these rows at step k."""
    lr = tl.load(floats + RATE)
    first = tl.load(ints + FIRST_PHASE).to(tl.int32)
    last = tl.load(ints + LAST_PHASE).to(tl.int32)
    address = tl.load(ints + LR)
    if first < last:
        lr = lr * evaluate(phase_ints, phase_floats, table, first, last, k)
    elif address != 0:
        lr = tl.load(address.to(tl.pointer_type(tl.float32)))
    return lr


@triton.jit
def scalars(row, floats, lr, factor):
    """What every element of a chunk is computed with."""
    t = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))) + 1.0
    bc1 = bias_correction(t, tl.load(floats + LOG_B1_HI), tl.load(floats + LOG_B1_LO))
    bc2 = bias_correction(t, tl.load(floats + LOG_B2_HI), tl.load(floats + LOG_B2_LO))
    return (
        factor * tl.load(floats + SIGN),
        lr * tl.load(floats + WEIGHT_DECAY),
        tl.div_rn(lr, bc1),
        tl.sqrt_rn(bc2),
        tl.load(floats + EPS),
        tl.load(floats + ONE_B1),
        tl.load(floats + B2),
        tl.load(floats + ONE_B2),
    )


@triton.jit
def is_last(ticket, programs):
    """Whether all other programs of the step have come here before; then the tickets start again."""
    # every thread's reads and stores come before the ticket, which only one thread takes
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


# --- the kernels


# no value and no address is compiled in: a new step, tensor or group never recompiles
_TABLES = ("tensors", "grads", "chunks", "ints", "floats", "counters", "used", "norms", "tickets")
_SIGNALS = ("grad_scale", "found_inf", "alive", "now")
_RUNTIME = (*_TABLES, *_SIGNALS, "first", "programs", "groups", "phases", "count")


def _kernel(fn):
    names = [name for name in fn.__code__.co_varnames[: fn.__code__.co_argcount] if name in _RUNTIME]
    return triton.jit(fn, do_not_specialize=names, do_not_specialize_on_alignment=names)


@_kernel
def norm_kernel(
    tensors,  # int64 (tensors, TENSOR_COLUMNS)
    grads,  # int64 (tensors,)
    chunks,  # int32 (chunks, CHUNK_COLUMNS)
    ints,  # int64: (groups, GROUP_INTS), (phases, PHASE_INTS)
    norms,  # fp32: (groups,), then a partial sum per slot
    tickets,  # int32 (2,)
    grad_scale,  # fp32 (1,)
    alive,  # int32 (1,): the generation of the tensors' layout
    now,  # the generation this launch was made for
    first,  # row of the launch's first chunk
    programs,  # of all norm launches of the step
    groups,
    PARAMS: tl.constexpr,
):
    """The L2 norm of the unscaled gradients of every scope that needs one."""
    # a replay of tensors that are gone: all programs of the step see the same
    if tl.load(alive) != now:
        return
    chunk = chunks + (first + tl.program_id(0)) * CHUNK_COLUMNS
    _, grad, begin, count = place(chunk, tensors, grads)
    normed = tl.load(ints + tl.load(chunk + GROUP) * GROUP_INTS + NORMED)
    count = tl.where(normed != 0, count, 0)
    factor = tl.div_rn(1.0, tl.load(grad_scale))
    wide = tl.where(grad % 16 == 0, count // WIDE * WIDE, 0)
    squares = tl.zeros([WIDE], tl.float32)
    for i in range(WIDE_TILES):
        if i * WIDE < wide:
            squares += square_tile(grad, begin + i * WIDE, WIDE, factor, PARAMS, True)
    rest = tl.zeros([NARROW], tl.float32)
    for i in range(NARROW_TILES):
        if (wide <= i * NARROW) & (i * NARROW < count):
            rest += square_tile(grad, begin + i * NARROW, count - i * NARROW, factor, PARAMS, False)
    tl.store(norms + groups + tl.load(chunk + SLOT), tl.sum(squares) + tl.sum(rest))
    if is_last(tickets, programs):
        finish_norms(ints, norms, groups)


@triton.jit
def finish_norms(ints, norms, groups):
    """Add up the partial sums of every scope, lane by lane and then over lanes: always in the same order."""
    scope = 0
    lanes = tl.arange(0, SUMS)
    while scope < groups:
        row = ints + scope * GROUP_INTS
        slot = tl.load(row + FIRST_SLOT)
        last = tl.load(row + LAST_SLOT)
        total = tl.zeros([SUMS], tl.float32)
        while slot < last:
            total += tl.load(norms + groups + slot + lanes, mask=slot + lanes < last, other=0.0)
            slot += SUMS
        tl.store(norms + scope, tl.sqrt_rn(tl.sum(total)))
        scope += 1


@_kernel
def step_kernel(
    tensors,  # int64 (tensors, TENSOR_COLUMNS)
    grads,  # int64 (tensors,)
    chunks,  # int32 (chunks, CHUNK_COLUMNS)
    ints,  # int64: (groups, GROUP_INTS), (phases, PHASE_INTS)
    floats,  # fp32: (groups, GROUP_FLOATS), (phases, PHASE_FLOATS), tables
    counters,  # int64 (4, groups): k, skipped, skips_in_row, stale
    used,  # fp32 (3, groups): lr, grad_norm, coef
    norms,  # fp32: (groups,), then a partial sum per slot
    tickets,  # int32 (2,)
    grad_scale,  # fp32 (1,)
    found_inf,  # fp32 (1,)
    alive,  # int32 (1,): the generation of the tensors' layout
    now,  # the generation this launch was made for
    first,  # row of the launch's first chunk
    programs,  # of all step launches of the step
    groups,
    phases,
    count,  # tensors
    PARAMS: tl.constexpr,
    MOMENTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
):
    """One optimizer step on the tensors of a bucket; the last program of all buckets counts it."""
    if tl.load(alive) != now:
        if (first == 0) & (tl.program_id(0) == 0):
            stale = counters + 3 * groups
            before = tl.load(stale)
            # every thread reads the counter, one writes it
            tl.debug_barrier()
            tl.store(stale, before + 1)
        return
    chunk = chunks + (first + tl.program_id(0)) * CHUNK_COLUMNS
    group = tl.load(chunk + GROUP)
    group_ints = ints + group * GROUP_INTS
    group_floats = floats + group * GROUP_FLOATS
    phase_floats = floats + groups * GROUP_FLOATS
    table = phase_floats + phases * PHASE_FLOATS
    k = tl.load(counters + group)
    lr = lr_at(group_ints, group_floats, ints + groups * GROUP_INTS, phase_floats, table, k)
    norm, coef, skip = decide(group_ints, group_floats, norms, found_inf)
    if tl.load(chunk + LEADS) != 0:
        tl.store(used + group, lr)
        tl.store(used + groups + group, norm)
        tl.store(used + 2 * groups + group, coef)
    row, grad, begin, left = place(chunk, tensors, grads)
    if (left > 0) & (~skip):
        s = scalars(row, group_floats, lr, tl.div_rn(1.0, tl.load(grad_scale)) * coef)
        addresses = grad | tl.load(row + PARAM) | tl.load(row + EXP_AVG) | tl.load(row + EXP_AVG_SQ)
        if AMSGRAD:
            addresses = addresses | tl.load(row + TOP)
        wide = tl.where(addresses % 16 == 0, left // WIDE * WIDE, 0)
        for i in range(WIDE_TILES):
            if i * WIDE < wide:
                update_tile(row, grad, begin + i * WIDE, WIDE, s, PARAMS, MOMENTS, AMSGRAD, True)
        for i in range(NARROW_TILES):
            if (wide <= i * NARROW) & (i * NARROW < left):
                update_tile(
                    row, grad, begin + i * NARROW, left - i * NARROW, s, PARAMS, MOMENTS, AMSGRAD, False
                )
    if is_last(tickets + 1, programs):
        count_step(tensors, ints, floats, counters, norms, found_inf, groups, count)


@triton.jit
def count_step(tensors, ints, floats, counters, norms, found_inf, groups, count):
    """Move the counters of all groups and of the tensors that were updated."""
    lanes = tl.arange(0, LANES)
    begin = 0
    while begin < groups:
        inside = begin + lanes < groups
        group = tl.where(inside, begin + lanes, 0)
        row = ints + group * GROUP_INTS
        _, _, skip = decide(row, floats + group * GROUP_FLOATS, norms, found_inf)
        inside = inside & (tl.load(row + ACTIVE) != 0)
        skipped = skip.to(tl.int64)
        # lanes outside point at the counters of group 0, which its own lane writes: they must not read them
        ks = counters + group
        k = tl.load(ks, mask=inside, other=0)
        tl.store(ks, k + tl.load(row + ADVANCE) * (1 - skipped), mask=inside)
        totals = ks + groups
        tl.store(totals, tl.load(totals, mask=inside, other=0) + skipped, mask=inside)
        runs = totals + groups
        tl.store(runs, (tl.load(runs, mask=inside, other=0) + 1) * skipped, mask=inside)
        begin += LANES
    begin = 0
    while begin < count:
        inside = begin + lanes < count
        row = tensors + tl.where(inside, begin + lanes, 0) * TENSOR_COLUMNS
        group = tl.load(row + GROUP_OF)
        _, _, skip = decide(ints + group * GROUP_INTS, floats + group * GROUP_FLOATS, norms, found_inf)
        ts = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        inside = inside & ~skip
        tl.store(ts, tl.load(ts, mask=inside, other=0.0) + 1.0, mask=inside)
        begin += LANES


def options(target: GPUTarget, amsgrad: bool) -> dict[str, int | bool]:
    """Compiler options of a launch; nothing is left to defaults that decide about bits."""
    chosen: dict[str, int | bool] = {"num_stages": 1, "enable_fp_fusion": False}
    chosen["num_warps"] = THREADS // target.warp_size
    if amsgrad and target.backend == "cuda":
        # ptxas stops at 80 registers here and spills 12 bytes for it, where 96 hold everything
        chosen["maxnreg"] = 128
    return chosen

"""The step in two Triton kernels: the gradients' norm, and AdamW with its schedule and counters.

triton.py launches them; they mean what `reference.norm_` and `reference.update_` mean. One launch of each per
bucket of dtypes, the norm only where one is needed. Nothing is specialised on a value, and fp64 is not used.

Layout. Everything a program reads lies in device memory, in tables with the columns of fusedlr/columns.py;
kernel arguments are where the tables are and how long. A program owns one chunk of one tensor, 4096 elements,
which a row of `chunks` names; it finds the tensor's addresses in `tensors` and `gradients`, the options of
its group and scope in `ints` and `floats`, evaluates the learning rate at the group's `k` and updates tile by
tile. Tensors whose addresses all lie on 16 bytes take the 128-bit path, decided per program from the
addresses; tails and everything else are masked and scalar. A tensor whose gradient is missing, which is an
address of 0, adds nothing to the norm and stays as it is. A group without elements has one empty chunk, whose
program writes which rate the group used.

Order. Every program takes a ticket when it has read its last counter: behind a barrier, because the compiler
puts none between the other threads' reads and the atomic. The program with the last ticket of the step,
which over several buckets is one of the last launch, knows that all others are done with the counters and
moves them. The norm's last program adds up the partial sums of every scope in a fixed order, so bits repeat.

Memory traffic in bytes per element, parameter + moments in fp32: the norm reads 4 (g), the update reads 16
(p g m v) and writes 12 (p m v). 16-bit parameters with fp32 moments: 2, then 12 and 10; with 16-bit moments:
2, then 8 and 6. amsgrad reads and writes one moment more, a bf16 parameter's remainder is 2 bytes more either
way, an fp16 one's fp32 value 4. Tables cost about 100 bytes per chunk.
"""

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget

from fusedlr import columns, reference
from fusedlr.backends.gpu.triton_math import bias_correction
from fusedlr.backends.gpu.triton_schedule import PHASE_FLOATS, evaluate

CHUNK_ELEMENTS = tl.constexpr(columns.CHUNK)
# 8 elements per thread: two 128-bit accesses in fp32, one in 16 bits, or two of 64 beside fp32
WIDE = tl.constexpr(1024)
WIDE_TILES = tl.constexpr(columns.CHUNK // WIDE.value)
# how often a wide tile can be halved
HALVINGS = tl.constexpr(WIDE.value.bit_length() - 1)
# one scalar access needs an address of its own, in two registers
NARROW = tl.constexpr(256)
NARROW_TILES = tl.constexpr(columns.CHUNK // NARROW.value)
THREADS = 128
# lanes of the last program's loops, over tensors and over groups or scopes: more take registers from all
LANES = tl.constexpr(512)
SCOPE_LANES = tl.constexpr(128)
# tensors whose sums are recorded at once, and chunks of each that are added at once
RECORDED_TENSORS = tl.constexpr(32)
RECORDED_CHUNKS = tl.constexpr(32)
# above the places of all tensors of a group
NO_PLACE = tl.constexpr(2**31)
CLIP_EPS = tl.constexpr(reference.CLIP_EPS)
Z_EPS = tl.constexpr(reference.Z_EPS)
# the interpreter truncates fp32 to bf16, where hardware rounds
TRUNCATES = tl.constexpr(knobs.runtime.interpret)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# names of the columns -> their positions
_TENSORS, _CHUNKS = columns.TENSORS, columns.CHUNKS
TENSOR_COLUMNS = tl.constexpr(len(_TENSORS))
PARAM = tl.constexpr(_TENSORS.index("param"))
EXP_AVG = tl.constexpr(_TENSORS.index("exp_avg"))
EXP_AVG_SQ = tl.constexpr(_TENSORS.index("exp_avg_sq"))
MAX_EXP_AVG_SQ = tl.constexpr(_TENSORS.index("max_exp_avg_sq"))
PARAM_REMAINDER = tl.constexpr(_TENSORS.index("param_remainder"))
MASTER_PARAM = tl.constexpr(_TENSORS.index("master_param"))
STEP = tl.constexpr(_TENSORS.index("step"))
NUMEL = tl.constexpr(_TENSORS.index("numel"))
GROUP_OF = tl.constexpr(_TENSORS.index("group"))
PLACE = tl.constexpr(_TENSORS.index("place"))
COLUMN = tl.constexpr(_TENSORS.index("column"))
FIRST_CHUNK = tl.constexpr(_TENSORS.index("slot"))

CHUNK_COLUMNS = tl.constexpr(len(_CHUNKS))
TENSOR = tl.constexpr(_CHUNKS.index("tensor"))
INDEX = tl.constexpr(_CHUNKS.index("index"))
SLOT = tl.constexpr(_CHUNKS.index("slot"))
GROUP = tl.constexpr(_CHUNKS.index("group"))
SCOPE = tl.constexpr(_CHUNKS.index("scope"))
FIRST_OF_GROUP = tl.constexpr(_CHUNKS.index("first_of_group"))

_GROUP_INTS, _GROUP_FLOATS = columns.GROUP_INTS, columns.GROUP_FLOATS
GROUP_INTS = tl.constexpr(len(_GROUP_INTS))
FIRST_PHASE = tl.constexpr(_GROUP_INTS.index("first_phase"))
LAST_PHASE = tl.constexpr(_GROUP_INTS.index("last_phase"))
LR = tl.constexpr(_GROUP_INTS.index("lr"))
SCOPE_OF = tl.constexpr(_GROUP_INTS.index("scope"))

GROUP_FLOATS = tl.constexpr(len(_GROUP_FLOATS))
PEAK = tl.constexpr(_GROUP_FLOATS.index("peak"))
LOG_B1_HI = tl.constexpr(_GROUP_FLOATS.index("log_b1_hi"))
LOG_B1_LO = tl.constexpr(_GROUP_FLOATS.index("log_b1_lo"))
LOG_B2_HI = tl.constexpr(_GROUP_FLOATS.index("log_b2_hi"))
LOG_B2_LO = tl.constexpr(_GROUP_FLOATS.index("log_b2_lo"))
ONE_B1 = tl.constexpr(_GROUP_FLOATS.index("one_b1"))
B2 = tl.constexpr(_GROUP_FLOATS.index("b2"))
ONE_B2 = tl.constexpr(_GROUP_FLOATS.index("one_b2"))
EPS = tl.constexpr(_GROUP_FLOATS.index("eps"))
WEIGHT_DECAY = tl.constexpr(_GROUP_FLOATS.index("weight_decay"))
SIGN = tl.constexpr(_GROUP_FLOATS.index("sign"))

_SCOPE_INTS, _SCOPE_FLOATS = columns.SCOPE_INTS, columns.SCOPE_FLOATS
SCOPE_INTS = tl.constexpr(len(_SCOPE_INTS))
NORMED = tl.constexpr(_SCOPE_INTS.index("normed"))
SKIP_NONFINITE = tl.constexpr(_SCOPE_INTS.index("skip_nonfinite"))
BY_OWN_NORM = tl.constexpr(_SCOPE_INTS.index("by_own_norm"))
FIRST_SLOT = tl.constexpr(_SCOPE_INTS.index("first_slot"))
LAST_SLOT = tl.constexpr(_SCOPE_INTS.index("last_slot"))
FIRST_GROUP = tl.constexpr(_SCOPE_INTS.index("first_group"))
SKIP_SPIKES = tl.constexpr(_SCOPE_INTS.index("skip_spikes"))

SCOPE_FLOATS = tl.constexpr(len(_SCOPE_FLOATS))
MAX_GRAD_NORM = tl.constexpr(_SCOPE_FLOATS.index("max_grad_norm"))
WARMUP_STEPS = tl.constexpr(_SCOPE_FLOATS.index("warmup_steps"))
Z_THRESH = tl.constexpr(_SCOPE_FLOATS.index("z_thresh"))
ONE_ALPHA = tl.constexpr(_SCOPE_FLOATS.index("one_alpha"))

_RING = columns.RING
RING_STEPS = tl.constexpr(_RING.index("steps"))
RING_INTS = tl.constexpr(_RING.index("ints"))
RING_USED = tl.constexpr(_RING.index("used"))
RING_SUMS = tl.constexpr(_RING.index("sums"))
CHUNK_SUMS = tl.constexpr(_RING.index("chunk_sums"))
RING_LAST = tl.constexpr(_RING.index("last"))
RING_COLUMNS = tl.constexpr(_RING.index("columns"))
MOST_CHUNKS = tl.constexpr(_RING.index("most_chunks"))
RECORDED_ROWS = tl.constexpr(len(columns.RECORDED))
RECORDED_METRICS = tl.constexpr(len(columns.METRICS))
RECORDED_SKIP = tl.constexpr(columns.RECORDED.index("skip"))
SUM_ROWS = tl.constexpr(len(columns.SUMS))
OF_GRAD = tl.constexpr(columns.SUMS.index("grad"))
OF_CHANGE = tl.constexpr(columns.SUMS.index("change"))
OF_BEFORE = tl.constexpr(columns.SUMS.index("before"))

STALE = tl.constexpr(columns.COUNTS.index("stale"))
NONFINITE = tl.constexpr(columns.COUNTS.index("nonfinite"))
NONFINITE_STEP = tl.constexpr(columns.COUNTS.index("nonfinite_step"))
FOUND = tl.constexpr(columns.COUNTS.index("found"))

USED_LR = tl.constexpr(columns.USED.index("lr"))
USED_NORM = tl.constexpr(columns.USED.index("grad_norm"))
USED_COEF = tl.constexpr(columns.USED.index("coef"))
USED_LIMIT = tl.constexpr(columns.USED.index("limit"))
HELD = tl.constexpr(columns.USED.index("held"))
SKIP = tl.constexpr(columns.USED.index("skip"))
SEEN = tl.constexpr(columns.USED.index("seen"))
MEAN = tl.constexpr(columns.USED.index("mean"))
MEAN_REST = tl.constexpr(columns.USED.index("mean_rest"))
VARIANCE = tl.constexpr(columns.USED.index("variance"))
VARIANCE_REST = tl.constexpr(columns.USED.index("variance_rest"))


@triton.jit
def adamw(p, g, m, v, v_max, factor, decay, lr_bc1, root_bc2, eps, one_b1, b2, one_b2):
    """`reference.adamw_` on one element; `v_max`, its largest v so far, is below 0 without amsgrad."""
    g = g * factor
    p = p - decay * p
    # as reference.adamw_: the form that starts at m would lose a g that is small beside it; one_b1 - 1 is
    # exact where it is used
    from_m = one_b1 < 0.5
    m = tl.where(from_m, m, g) + (g - m) * tl.where(from_m, one_b1, one_b1 - 1)
    # in this order, as torch: the square of a finite gradient may overflow
    v = b2 * v + (one_b2 * g) * g
    # as torch.maximum: nan wins
    v_max = tl.where((v <= v_max) | (v_max != v_max), v_max, v)
    p = p - lr_bc1 * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v_max), root_bc2) + eps)
    return p, m, v, v_max


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """x, fp32, rounded to nearest in another type."""
    if TRUNCATES and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where(x != x, 0x7FC0, nearest).to(tl.uint16).to(TYPE, bitcast=True)
    return x.to(TYPE)


@triton.jit
def whole(p, rest, TYPE: tl.constexpr):
    """`reference.fp32_value`: what a 16-bit parameter is in fp32, of which the state has the rest."""
    if tl.bfloat16 == TYPE:
        high = p.to(tl.uint16, bitcast=True).to(tl.uint32)
        low = rest.to(tl.uint16, bitcast=True).to(tl.uint32)
        # a zero that was assigned from outside has no number below it
        borrow = tl.where((high & 0x7FFF) != 0, low >> 15, 0)
        x = (((high - borrow) << 16) | low).to(tl.float32, bitcast=True)
    else:
        own = p.to(tl.float32)
        x = tl.where(rest.to(TYPE).to(tl.float32) == own, rest, own)
    return x


@triton.jit
def split_whole(x, TYPE: tl.constexpr):
    """`reference.split_value`: the parameter for a number in fp32, and what of it belongs in the state."""
    if tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        is_nan = x != x
        high = tl.where(is_nan, 0x7FC0, (bits + 0x8000) >> 16)
        rest = tl.where(is_nan, 0, bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
        p = high.to(tl.uint16).to(TYPE, bitcast=True)
    else:
        p = x.to(TYPE)
        rest = x
    return p, rest


@triton.jit
def at(address, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr, EACH: tl.constexpr):
    """Pointers to the elements of a tile that begins at element `first` of an array. Of one that is aligned,
    a thread gets `EACH` elements that lie together.
    """
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        return pointer + tl.multiple_of(first, WIDE) + tl.max_contiguous(tl.arange(0, WIDE), EACH)
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
    unscale,
    PARAMS: tl.constexpr,
    MOMENTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """AdamW on a tile of a tensor from element `first`: `left` elements, or a whole tile if aligned.

    Returns the squares of gradients, changes and what was before, where they are to be recorded, else
    anything.
    """
    factor, decay, lr_bc1, root_bc2, eps, one_b1, b2, one_b2 = s
    # 16 bytes of the widest array: where a thread had more of one array than of another, numbers would change
    # threads, through shared memory and two barriers for every such array
    EACH: tl.constexpr = 4 if tl.float32 == MOMENTS or (MASTER and tl.float16 == PARAMS) else 8
    inside = tl.arange(0, NARROW) < left
    ps = at(tl.load(row + PARAM), first, PARAMS, ALIGNED, EACH)
    ms = at(tl.load(row + EXP_AVG), first, MOMENTS, ALIGNED, EACH)
    vs = at(tl.load(row + EXP_AVG_SQ), first, MOMENTS, ALIGNED, EACH)
    if MASTER:
        if tl.bfloat16 == PARAMS:
            rests = at(tl.load(row + PARAM_REMAINDER), first, tl.int16, ALIGNED, EACH)
        else:
            rests = at(tl.load(row + MASTER_PARAM), first, tl.float32, ALIGNED, EACH)
        if ALIGNED:
            p = whole(tl.load(ps), tl.load(rests), PARAMS)
        else:
            p = whole(tl.load(ps, mask=inside, other=0.0), tl.load(rests, mask=inside, other=0), PARAMS)
    else:
        p = read(ps, inside, ALIGNED)
    g = read(at(g, first, PARAMS, ALIGNED, EACH), inside, ALIGNED)
    before = p
    unscaled = g * unscale
    m = read(ms, inside, ALIGNED)
    v = read(vs, inside, ALIGNED)
    v_max = tl.full(v.shape, -1.0, tl.float32)
    if AMSGRAD:
        # a group without it may share the launch; a mask of one value leaves the accesses wide
        address = tl.load(row + MAX_EXP_AVG_SQ)
        v_maxs = at(address, first, MOMENTS, ALIGNED, EACH)
        # compared as a vector: the interpreter of Triton 3.9 takes a flag of one number for an integer
        if ALIGNED:
            kept = tl.zeros([WIDE], tl.int64) + address != 0
        else:
            kept = inside & (tl.zeros([NARROW], tl.int64) + address != 0)
        v_max = tl.load(v_maxs, mask=kept, other=-1.0).to(tl.float32)
    p, m, v, v_max = adamw(p, g, m, v, v_max, factor, decay, lr_bc1, root_bc2, eps, one_b1, b2, one_b2)
    if MASTER:
        param, rest = split_whole(p, PARAMS)
        if ALIGNED:
            tl.store(ps, param)
            tl.store(rests, rest)
        else:
            tl.store(ps, param, mask=inside)
            tl.store(rests, rest, mask=inside)
    else:
        write(ps, p, inside, PARAMS, ALIGNED)
        p = narrow(p, PARAMS).to(tl.float32)
    write(ms, m, inside, MOMENTS, ALIGNED)
    write(vs, v, inside, MOMENTS, ALIGNED)
    if AMSGRAD:
        tl.store(v_maxs, narrow(v_max, MOMENTS), mask=kept)
    change = (p - before) * (p - before)
    if RECORD and not ALIGNED:
        # where nothing was read the formula may give nan
        change = tl.where(inside, change, 0.0)
    return unscaled * unscaled, change, before * before


@triton.jit
def look_at(gradient, begin, left, unscale, found, place, PARAMS: tl.constexpr, RECORD: tl.constexpr):
    """Notes at `found` if a chunk's gradient, which is not used in this step, is not finite.

    Returns the sum of squares of the unscaled gradient, where it is to be recorded, else anything.
    """
    squares = tl.zeros([NARROW], tl.float32)
    bad = tl.zeros([NARROW], tl.float32)
    lanes = tl.arange(0, NARROW)
    for i in range(NARROW_TILES):
        inside = i * NARROW + lanes < left
        g = read(at(gradient, begin + i * NARROW, PARAMS, False, 1), inside, False)
        bad = tl.where(tl.abs(g) < float("inf"), bad, 1.0)
        if RECORD:
            squares += (g * unscale) * (g * unscale)
    # the first tensor of the group has the largest of these
    if tl.sum(bad) != 0:
        tl.atomic_max(found, -place + NO_PLACE, sem="relaxed")
    return tl.sum(squares)


@triton.jit
def square_tile(g, first, left, factor, PARAMS: tl.constexpr, ALIGNED: tl.constexpr):
    """The squares of `factor` times the gradients of a tile of `WIDE` elements, of which `left` are there."""
    pointer = g.to(tl.pointer_type(PARAMS))
    lanes = tl.arange(0, WIDE)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        g = tl.load(pointer + tl.multiple_of(first, WIDE) + lanes)
    else:
        g = tl.load(pointer + first + lanes, mask=lanes < left, other=0.0)
    g = g.to(tl.float32) * factor
    return g * g


@triton.jit
def sum_of_lanes(x):
    """The sum of `WIDE` numbers, pair by pair: the same bits wherever the compiler has put them."""
    for i in tl.static_range(HALVINGS):
        x = tl.sum(tl.reshape(x, [WIDE // 2 >> i, 2]), axis=1)
    return tl.sum(x)


@triton.jit
def place(chunk, tensors, gradients):
    """The row of a chunk's tensor, its gradient's address, the chunk's first element and how many it has."""
    tensor = tl.load(chunk + TENSOR)
    # -1 is the empty chunk of a group without elements: its row is not read, as the table may have none
    gradient = tl.load(gradients + tensor, mask=tensor >= 0, other=0)
    row = tensors + tensor * TENSOR_COLUMNS
    first = tl.load(chunk + INDEX).to(tl.int64) * CHUNK_ELEMENTS
    # a tensor whose gradient is missing has an address of 0, and is as one without elements
    numel = tl.load(row + NUMEL, mask=gradient != 0, other=0)
    # 32 bits take half the registers
    return row, gradient, first, tl.minimum(numel - first, CHUNK_ELEMENTS).to(tl.int32)


@triton.jit
def judge(norm, ints, floats, used, groups):
    """`reference.judge` for a scope, or a vector of scopes, by its rows."""
    norms = used + tl.load(ints + FIRST_GROUP)
    deviation = tl.sqrt_rn(tl.load(norms + VARIANCE * groups) + tl.load(norms + VARIANCE_REST * groups))
    mean = tl.load(norms + MEAN * groups)
    mean_rest = tl.load(norms + MEAN_REST * groups)
    z_thresh = tl.load(floats + Z_THRESH)
    z = tl.div_rn((norm - mean) - mean_rest, deviation + Z_EPS)
    spike = (tl.load(norms + SEEN * groups) >= tl.load(floats + WARMUP_STEPS)) & (z > z_thresh)
    # without a spike z may be 0
    above = tl.div_rn(z_thresh * z_thresh * deviation, tl.where(spike, z, 1.0))
    limit = mean + (above + mean_rest)
    return spike, tl.where(spike, limit, norm)


@triton.jit
def exact_sum(a, b):
    """`reference.exact_sum`."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def move_norms(norms, groups, held, warmup_steps, one_alpha, inside):
    """Store what `reference.moved` makes of the norms at these pointers, where `inside`."""
    seen = tl.load(norms + SEEN * groups, mask=inside, other=0.0)
    mean = tl.load(norms + MEAN * groups, mask=inside, other=0.0)
    mean_rest = tl.load(norms + MEAN_REST * groups, mask=inside, other=0.0)
    variance = tl.load(norms + VARIANCE * groups, mask=inside, other=0.0)
    variance_rest = tl.load(norms + VARIANCE_REST * groups, mask=inside, other=0.0)
    warm = seen >= warmup_steps
    weight = tl.where(warm, one_alpha, tl.div_rn(1.0, seen + 1))
    above = (held - mean) - mean_rest
    mean, mean_rest = exact_sum(mean, mean_rest + weight * above)
    left = (held - mean) - mean_rest
    change = weight * ((tl.where(warm, left, above) * left - variance) - variance_rest)
    variance, variance_rest = exact_sum(variance, variance_rest + change)
    tl.store(norms + SEEN * groups, seen + 1, mask=inside)
    tl.store(norms + MEAN * groups, mean, mask=inside)
    tl.store(norms + MEAN_REST * groups, mean_rest, mask=inside)
    tl.store(norms + VARIANCE * groups, variance, mask=inside)
    tl.store(norms + VARIANCE_REST * groups, variance_rest, mask=inside)


@triton.jit
def decide(ints, floats, squares, found_inf, used, groups):
    """What holds for a scope, or a vector of scopes: its norm, the clipping coefficient, the limit, what its
    `ZClip` holds the norm to, whether to skip.

    `ints` and `floats` are its rows, `squares` points at its sum of squares.
    """
    normed = tl.load(ints + NORMED)
    norm = tl.sqrt_rn(tl.load(squares, mask=normed != 0, other=float("nan")))
    highest = tl.load(floats + MAX_GRAD_NORM)
    # without a ZClip no norm is a spike
    spike, held = judge(norm, ints, floats, used, groups)
    limit = tl.where((highest < held) | (tl.load(floats + ONE_ALPHA) == 0), highest, held)
    highest = tl.where(spike, limit, highest)
    # a nan stays; without clipping the highest norm is nan
    coef = tl.div_rn(highest, norm + CLIP_EPS)
    coef = tl.where((coef > 1) | (highest != highest), 1.0, coef)
    limit = tl.where(highest != highest, float("inf"), limit)
    # anything but 0, nan included; read as often as there are scopes, as the interpreter cannot spread a flag
    found = tl.load(found_inf + normed * 0) != 0
    skips = tl.load(ints + SKIP_NONFINITE) != 0
    bad = ~(tl.abs(norm) < float("inf"))
    by_own_norm = tl.load(ints + BY_OWN_NORM) != 0
    skip = (by_own_norm & bad & (skips | found)) | (~by_own_norm & (found | (skips & bad)))
    skip = skip | (spike & (tl.load(ints + SKIP_SPIKES) != 0))
    return norm, coef, limit, held, skip


@triton.jit
def lr_at(ints, floats, rate, phase_ints, phase_floats, table, k):
    """The learning rate of the group with these rows at step k; `rate` points at the number it may be."""
    first = tl.load(ints + FIRST_PHASE).to(tl.int32)
    last = tl.load(ints + LAST_PHASE).to(tl.int32)
    address = tl.load(ints + LR)
    if first < last:
        lr = tl.load(floats + PEAK) * evaluate(phase_ints, phase_floats, table, first, last, k)
    elif address != 0:
        lr = tl.load(address.to(tl.pointer_type(tl.float32)))
    else:
        lr = tl.load(rate)
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
    # every thread's reads and stores come before the ticket, which one thread takes and which releases them
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="release", scope="gpu") == programs - 1
    if last:
        # what the others have released is acquired once, and what follows waits for the thread that does it
        tl.atomic_xchg(ticket, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
    return last


# no value and no address is compiled in: a new step, tensor or group never recompiles
_TABLES = ("gradients", "active", "tensors", "chunks", "ints", "floats", "rates")
_COUNTERS = ("counts", "used", "squares", "partials", "tickets", "generation", "ring", "made_for")
_LENGTHS = ("first", "programs", "groups", "scopes", "phases", "count")
_RUNTIME = (*_TABLES, *_COUNTERS, "grad_scale", "found_inf", *_LENGTHS)


def _kernel(fn):
    names = [name for name in fn.__code__.co_varnames[: fn.__code__.co_argcount] if name in _RUNTIME]
    return triton.jit(fn, do_not_specialize=names, do_not_specialize_on_alignment=names)


@_kernel
def norm_kernel(
    gradients,  # int64 (tensors,): addresses, 0 where there is none
    active,  # int32 (scopes,): whether the scope makes this step
    grad_scale,  # fp32 (1,)
    tensors,  # int64 (tensors, TENSOR_COLUMNS)
    chunks,  # int32 (chunks, CHUNK_COLUMNS)
    ints,  # int64: (groups, GROUP_INTS), (scopes, SCOPE_INTS), (phases, PHASE_INTS)
    squares,  # fp32 (scopes,)
    partials,  # fp32 (slots,)
    tickets,  # int32 (2,)
    generation,  # int32 (1,): of the tensors and tables
    made_for,  # the generation this launch was made for
    first,  # row of the launch's first chunk
    programs,  # of all norm launches of the step
    groups,
    scopes,
    PARAMS: tl.constexpr,
):
    """The sum of squares of the unscaled gradients of every scope that needs a norm."""
    # a replay of tensors that are gone: all programs of the step see the same
    if tl.load(generation) != made_for:
        return
    chunk = chunks + (first + tl.program_id(0)) * CHUNK_COLUMNS
    scope_ints = ints + groups * GROUP_INTS
    _, gradient, begin, count = place(chunk, tensors, gradients)
    scope = tl.load(chunk + SCOPE)
    normed = tl.load(scope_ints + scope * SCOPE_INTS + NORMED)
    # nothing of a scope that does not make the step is read
    count = tl.where((normed != 0) & (tl.load(active + scope) != 0), count, 0)
    factor = tl.div_rn(1.0, tl.load(grad_scale))
    wide = tl.where(gradient % 16 == 0, count // WIDE * WIDE, 0)
    sums = tl.zeros([WIDE], tl.float32)
    for i in range(WIDE_TILES):
        if i * WIDE < wide:
            sums += square_tile(gradient, begin + i * WIDE, WIDE, factor, PARAMS, True)
        elif i * WIDE < count:
            sums += square_tile(gradient, begin + i * WIDE, count - i * WIDE, factor, PARAMS, False)
    tl.store(partials + tl.load(chunk + SLOT), sum_of_lanes(sums))
    if is_last(tickets, programs):
        finish_squares(scope_ints, squares, partials, scopes)


@triton.jit
def finish_squares(scope_ints, squares, partials, scopes):
    """Add up the partial sums of every scope, lane by lane and then over lanes: always in the same order."""
    scope = 0
    lanes = tl.arange(0, WIDE)
    while scope < scopes:
        row = scope_ints + scope * SCOPE_INTS
        slot = tl.load(row + FIRST_SLOT)
        last = tl.load(row + LAST_SLOT)
        total = tl.zeros([WIDE], tl.float32)
        while slot < last:
            # one after the other, but all on their way before the first is added
            slots = slot + lanes
            a = tl.load(partials + slots, mask=slots < last, other=0.0)
            b = tl.load(partials + slots + WIDE, mask=slots + WIDE < last, other=0.0)
            total = (total + a) + b
            slot += 2 * WIDE
        tl.store(squares + scope, sum_of_lanes(total))
        scope += 1


@_kernel
def step_kernel(
    gradients,  # int64 (tensors,): addresses, 0 where there is none
    active,  # int32 (scopes,): whether the scope makes this step
    grad_scale,  # fp32 (1,)
    found_inf,  # fp32 (1,)
    tensors,  # int64 (tensors, TENSOR_COLUMNS)
    chunks,  # int32 (chunks, CHUNK_COLUMNS)
    ints,  # int64: (groups, GROUP_INTS), (scopes, SCOPE_INTS), (phases, PHASE_INTS)
    floats,  # fp32: (groups, GROUP_FLOATS), (scopes, SCOPE_FLOATS), (phases, PHASE_FLOATS), tables
    rates,  # fp32 (groups,): rates that are given as numbers
    counts,  # int64 (COUNTS, groups)
    used,  # fp32 (USED, groups)
    squares,  # fp32 (scopes,)
    tickets,  # int32 (2,)
    generation,  # int32 (1,): of the tensors and tables
    ring,  # int64 (RING,): where the step is recorded, if it is
    made_for,  # the generation this launch was made for
    first,  # row of the launch's first chunk
    programs,  # of all step launches of the step
    groups,
    scopes,
    phases,
    count,  # tensors
    PARAMS: tl.constexpr,
    MOMENTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One optimizer step on the tensors of a bucket; the last program of all buckets counts it."""
    if tl.load(generation) != made_for:
        if (first == 0) & (tl.program_id(0) == 0):
            stale = counts + STALE * groups
            before = tl.load(stale)
            # every thread reads the counter, one writes it
            tl.debug_barrier()
            tl.store(stale, before + 1)
        return
    chunk = chunks + (first + tl.program_id(0)) * CHUNK_COLUMNS
    group = tl.load(chunk + GROUP)
    group_ints = ints + group * GROUP_INTS
    group_floats = floats + group * GROUP_FLOATS
    scope_ints = ints + groups * GROUP_INTS
    scope_floats = floats + groups * GROUP_FLOATS
    phase_ints = scope_ints + scopes * SCOPE_INTS
    phase_floats = scope_floats + scopes * SCOPE_FLOATS
    table = phase_floats + phases * PHASE_FLOATS
    scope = tl.load(chunk + SCOPE)
    norm, coef, limit, held, skip = decide(
        scope_ints + scope * SCOPE_INTS,
        scope_floats + scope * SCOPE_FLOATS,
        squares + scope,
        found_inf,
        used,
        groups,
    )
    k = tl.load(counts + group)
    lr = lr_at(group_ints, group_floats, rates + group, phase_ints, phase_floats, table, k)
    steps = tl.load(active + scope) != 0
    if (tl.load(chunk + FIRST_OF_GROUP) != 0) & steps:
        own = used + group
        tl.store(own + USED_LR * groups, lr)
        tl.store(own + USED_NORM * groups, norm)
        tl.store(own + USED_COEF * groups, coef)
        tl.store(own + USED_LIMIT * groups, limit)
        # for the last program, which counts
        tl.store(own + HELD * groups, held)
        tl.store(own + SKIP * groups, tl.where(skip, 1.0, 0.0))
    row, gradient, begin, left = place(chunk, tensors, gradients)
    unscale = tl.div_rn(1.0, tl.load(grad_scale))
    # sums of squares of the chunk, where they are recorded
    of_grad = 0.0
    of_change = 0.0
    of_before = 0.0
    if (left > 0) & steps & skip:
        found = counts + FOUND * groups + group
        of_grad = look_at(gradient, begin, left, unscale, found, tl.load(row + PLACE), PARAMS, RECORD)
    if (left > 0) & steps & (~skip):
        s = scalars(row, group_floats, lr, unscale * coef)
        addresses = gradient | tl.load(row + PARAM) | tl.load(row + EXP_AVG) | tl.load(row + EXP_AVG_SQ)
        if AMSGRAD:
            addresses = addresses | tl.load(row + MAX_EXP_AVG_SQ)
        if MASTER:
            # a parameter has one of the two, the other is 0
            addresses = addresses | tl.load(row + PARAM_REMAINDER) | tl.load(row + MASTER_PARAM)
        wide = tl.where(addresses % 16 == 0, left // WIDE * WIDE, 0)
        grads = tl.zeros([WIDE], tl.float32)
        changes = tl.zeros([WIDE], tl.float32)
        befores = tl.zeros([WIDE], tl.float32)
        for i in range(WIDE_TILES):
            if i * WIDE < wide:
                squares_of = update_tile(
                    row,
                    gradient,
                    begin + i * WIDE,
                    WIDE,
                    s,
                    unscale,
                    PARAMS,
                    MOMENTS,
                    AMSGRAD,
                    MASTER,
                    RECORD,
                    True,
                )
                if RECORD:
                    grads += squares_of[0]
                    changes += squares_of[1]
                    befores += squares_of[2]
        more_grads = tl.zeros([NARROW], tl.float32)
        more_changes = tl.zeros([NARROW], tl.float32)
        more_befores = tl.zeros([NARROW], tl.float32)
        for i in range(NARROW_TILES):
            if (wide <= i * NARROW) & (i * NARROW < left):
                squares_of = update_tile(
                    row,
                    gradient,
                    begin + i * NARROW,
                    left - i * NARROW,
                    s,
                    unscale,
                    PARAMS,
                    MOMENTS,
                    AMSGRAD,
                    MASTER,
                    RECORD,
                    False,
                )
                if RECORD:
                    more_grads += squares_of[0]
                    more_changes += squares_of[1]
                    more_befores += squares_of[2]
        if RECORD:
            of_grad = tl.sum(grads) + tl.sum(more_grads)
            of_change = tl.sum(changes) + tl.sum(more_changes)
            of_before = tl.sum(befores) + tl.sum(more_befores)
    if RECORD:
        sums = tl.load(ring + CHUNK_SUMS).to(tl.pointer_type(tl.float32)) + tl.load(chunk + SLOT)
        tl.store(sums + OF_GRAD * programs, of_grad)
        tl.store(sums + OF_CHANGE * programs, of_change)
        tl.store(sums + OF_BEFORE * programs, of_before)
    if is_last(tickets + 1, programs):
        if RECORD:
            record_step(gradients, active, tensors, ints, counts, used, ring, groups, programs, count)
        count_step(
            gradients,
            active,
            tensors,
            ints,
            scope_ints,
            scope_floats,
            counts,
            used,
            groups,
            scopes,
            count,
        )


@triton.jit
def record_step(gradients, active, tensors, ints, counts, used, ring, groups, programs, count):
    """Fill the row of the ring that is this step's; before the step is counted."""
    steps = tl.load(ring + RING_STEPS).to(tl.pointer_type(tl.int64))
    number = tl.load(steps)
    columns = tl.load(ring + RING_COLUMNS)
    most_chunks = tl.load(ring + MOST_CHUNKS)
    at = number % tl.load(ring + RING_LAST)
    to_ints = tl.load(ring + RING_INTS).to(tl.pointer_type(tl.int64)) + at * (1 + groups)
    to_used = tl.load(ring + RING_USED).to(tl.pointer_type(tl.float32)) + at * RECORDED_ROWS * groups
    to_sums = tl.load(ring + RING_SUMS).to(tl.pointer_type(tl.float32)) + at * SUM_ROWS * columns
    lanes = tl.arange(0, LANES)
    begin = 0
    while begin < SUM_ROWS * columns:
        none = tl.full([LANES], -1.0, tl.float32)
        tl.store(to_sums + begin + lanes, none, mask=begin + lanes < SUM_ROWS * columns)
        begin += LANES
    begin = 0
    while begin < groups:
        inside = begin + lanes < groups
        group = tl.where(inside, begin + lanes, 0)
        took_part = tl.load(active + tl.load(ints + group * GROUP_INTS + SCOPE_OF)) != 0
        k = tl.load(counts + group)
        tl.store(to_ints + 1 + group, tl.where(took_part, k, -1), mask=inside)
        for i in tl.static_range(RECORDED_METRICS):
            x = tl.load(used + i * groups + group)
            tl.store(to_used + i * groups + group, tl.where(took_part, x, float("nan")), mask=inside)
        skip = tl.load(used + SKIP * groups + group)
        tl.store(
            to_used + RECORDED_SKIP * groups + group, tl.where(took_part, skip, float("nan")), mask=inside
        )
        begin += LANES
    # all have read which step it is, and columns without a tensor are marked
    tl.debug_barrier()
    tl.store(to_ints, number)
    tl.store(steps, number + 1)
    chunk_sums = tl.load(ring + CHUNK_SUMS).to(tl.pointer_type(tl.float32))
    rows = tl.arange(0, RECORDED_TENSORS)
    chunks = tl.arange(0, RECORDED_CHUNKS)
    begin = 0
    if columns == 0:
        begin = count
    while begin < count:
        inside = begin + rows < count
        tensor = tl.where(inside, begin + rows, 0)
        row = tensors + tensor * TENSOR_COLUMNS
        scope = tl.load(ints + tl.load(row + GROUP_OF) * GROUP_INTS + SCOPE_OF)
        inside = inside & (tl.load(gradients + tensor) != 0) & (tl.load(active + scope) != 0)
        slot = tl.load(row + FIRST_CHUNK)
        length = tl.where(inside, (tl.load(row + NUMEL) + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS, 0)
        column = tl.load(row + COLUMN)
        for i in tl.static_range(SUM_ROWS):
            total = tl.zeros([RECORDED_TENSORS, RECORDED_CHUNKS], tl.float32)
            done = 0
            while done < most_chunks:
                chunk = done + chunks[None, :]
                pointers = chunk_sums + i * programs + slot[:, None] + chunk
                total += tl.load(pointers, mask=chunk < length[:, None], other=0.0)
                done += RECORDED_CHUNKS
            tl.store(to_sums + i * columns + column, tl.sum(total, axis=1), mask=inside)
        begin += RECORDED_TENSORS


@triton.jit
def count_step(
    gradients,
    active,
    tensors,
    ints,
    scope_ints,
    scope_floats,
    counts,
    used,
    groups,
    scopes,
    count,
):
    """Move the counters of the groups that made the step and of the tensors that were updated, and the norms
    of scopes with a `ZClip`.

    One program does it alone: what does not need another load's answer is loaded before that is looked at.
    """
    lanes = tl.arange(0, SCOPE_LANES)
    begin = 0
    while begin < groups:
        inside = begin + lanes < groups
        group = tl.where(inside, begin + lanes, 0)
        scope = tl.load(ints + group * GROUP_INTS + SCOPE_OF)
        skipped = (tl.load(used + SKIP * groups + group) != 0).to(tl.int64)
        # lanes outside point at the counters of group 0, which its own lane writes: they must not read them
        ks = counts + group
        totals = ks + groups
        runs = totals + groups
        k = tl.load(ks, mask=inside, other=0)
        total = tl.load(totals, mask=inside, other=0)
        run = tl.load(runs, mask=inside, other=0)
        found = tl.load(ks + FOUND * groups, mask=inside, other=0)
        inside = inside & (tl.load(active + scope) != 0)
        named = inside & (found != 0)
        tl.store(ks + NONFINITE * groups, -found + NO_PLACE + 1, mask=named)
        tl.store(ks + NONFINITE_STEP * groups, k + total, mask=named)
        tl.store(ks + FOUND * groups, tl.zeros([SCOPE_LANES], tl.int64), mask=named)
        tl.store(ks, k + (1 - skipped), mask=inside)
        tl.store(totals, total + skipped, mask=inside)
        tl.store(runs, (run + 1) * skipped, mask=inside)
        begin += SCOPE_LANES
    lanes = tl.arange(0, LANES)
    begin = 0
    while begin < count:
        inside = begin + lanes < count
        tensor = tl.where(inside, begin + lanes, 0)
        row = tensors + tensor * TENSOR_COLUMNS
        group = tl.load(row + GROUP_OF)
        ts = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        gradient = tl.load(gradients + tensor)
        scope = tl.load(ints + group * GROUP_INTS + SCOPE_OF)
        skip = tl.load(used + SKIP * groups + group)
        t = tl.load(ts, mask=inside, other=0.0)
        inside = inside & (gradient != 0) & (skip == 0) & (tl.load(active + scope) != 0)
        tl.store(ts, t + 1.0, mask=inside)
        begin += LANES
    lanes = tl.arange(0, SCOPE_LANES)
    begin = 0
    while begin < scopes:
        inside = begin + lanes < scopes
        scope = tl.where(inside, begin + lanes, 0)
        floats = scope_floats + scope * SCOPE_FLOATS
        one_alpha = tl.load(floats + ONE_ALPHA)
        inside = inside & (tl.load(active + scope) != 0) & (one_alpha > 0)
        own = used + tl.load(scope_ints + scope * SCOPE_INTS + FIRST_GROUP)
        norm = tl.load(own + USED_NORM * groups, mask=inside, other=float("nan"))
        skipped = tl.load(own + SKIP * groups, mask=inside, other=1.0) != 0
        held = tl.load(own + HELD * groups, mask=inside, other=0.0)
        inside = inside & ~skipped & (tl.abs(norm) < float("inf"))
        move_norms(own, groups, held, tl.load(floats + WARMUP_STEPS), one_alpha, inside)
        begin += SCOPE_LANES


def options(target: GPUTarget, amsgrad: bool, master: bool, record: bool = False) -> dict[str, int | bool]:
    """Compiler options of a launch; nothing is left to defaults that decide about bits."""
    chosen: dict[str, int | bool] = {"num_stages": 1, "enable_fp_fusion": False}
    chosen["num_warps"] = THREADS // target.warp_size
    if target.backend == "cuda":
        # ptxas stops at 80 registers by itself and spills for it. As many programs fit at 96 as at 88, which
        # holds everything but on sm_100 and later, where one program less fits
        plain = 96 if target.arch < 100 else 104
        chosen["maxnreg"] = 168 if record else 128 if amsgrad or master else plain
    return chosen

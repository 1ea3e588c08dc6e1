"""Every tolerance of the tests, each with where it comes from. A tolerance is changed here or nowhere."""

# fp64 trajectories, relative to the largest element of a tensor. Each update rounds about 10 times at
# 1.1e-16; over 300 updates of one sign that is 3.3e-13, and errors of either sign mostly cancel (measured:
# 2e-15)
FP64_TRAJECTORY = 1e-12

# RMS error against the fp64 oracle over that of torch on the same input, the contract's bound
RMS_RATIO = 1.05

# first moments after a spike against torch's, in ulp: an update rounds a difference, a product and a sum, of
# which torch fuses two; half an ulp each, and those of the update before once more (measured: 0.8)
LERP_ULPS = 3

# what fp32 moments of 16-bit parameters leave of torch's error over 2,000 steps of falling gradients;
# measured: 0.33 (bf16), 0.05 (fp16). The rest is the rounding of the parameters themselves
MOMENTS_RATIO = 0.5

# a wrong implementation must miss FP64_TRAJECTORY by at least this factor in some case
WRONG_MARGIN = 1e3

# a run may be this many times as far from stock foreach as stock fused is: both differ from it in the last
# bits, which training amplifies alike, so the factor allows for luck alone
STOCK_DISTANCE_RATIO = 4.0

# and a run with one more update of warm-up must be at least this many times as far as ours
OFF_BY_ONE_RATIO = 1000.0

# a logged rate against the stock run's, relative: two spellings of a schedule in fp64 agree to 1e-12 of the
# peak, and the smallest rates compared are a thousandth of it
LOGGED_RATE = 1e-9

# the fp64 definition against transformers, relative to the peak: the contract's bound. Both round about 10
# times at 1.1e-16; transformers' 1 - (k-W)/(T-W) under a root loses more, 3e-13 at 10**7 steps
SCHEDULE_HF = 1e-12

# A spelling on a device against the fp64 definition, at every step, in ulp of the expected value. Eight
# roundings lie on the way: two conversions, the division, one for the shape, the products with level and
# peak, the sum, the peak itself; each is half an ulp of its result and at most one of the final value. A
# cosine doubles four of them by its square, but they do not all go one way. Measured with fp32 numpy over
# the zoo (Xeon, 2026-11): linear 2.5, inverse square root 2.5, 1-sqrt 3.0, cosine 5.7, restarts 5.8, table
# 1.8
_ULPS = 8
# the power multiplies the error of its base, up to 1.5 ulp, by the exponent (12.5 in the zoo);
# exp2(c*log2(x)), which GPUs use, rounds a logarithm of up to 126: 126 * 2**-24 * ln 2 is 44 ulp. Measured
# with fp32 numpy: 9.6
_POLYNOMIAL_ULPS = 64
SCHEDULE_ULPS = {
    "constant": _ULPS,
    "linear": _ULPS,
    "cosine": _ULPS,
    "restarts": _ULPS,
    "polynomial": _POLYNOMIAL_ULPS,
    "inverse_sqrt": _ULPS,
    "1-sqrt": _ULPS,
    "1-sqrt-rise": _ULPS,
    "table": _ULPS,
}
# A cosine of no whole number of half waves cannot be reduced in integers alone; relative to the peak. With
# whole half waves taken off the angle is at most pi and rounded four times, 4 * 2**-24 * pi/2 = 3.7e-7,
# under a slope of at most 1, and the square rounds again. Measured with fp32 numpy: 2.5e-7
SCHEDULE_UNEVEN_COSINE = 5e-7
# the same operations in fp64 in another library: sine and power may differ by an ulp, the square doubles it
SCHEDULE_ULPS_FP64 = 4
# the fp64 definition itself against 40 digits: the bounds above in fp64 ulp; an uneven cosine is not
# reduced, its angle of up to 2*pi*num_cycles (3.3 in the zoo) is rounded four times: 4 * 2**-53 * 10.4 =
# 4.6e-15
SCHEDULE_UNEVEN_FP64 = 5e-15

# scalar functions against fp64, in ulp of the result. A sine up to 45 degrees: half an ulp each of x**2, the
# constant, the product, plus what the polynomial rounds (measured 1.7)
TRITON_SINE_ULPS = 2
# 1 - b**t for t of 1 to 1.6e7: half an ulp of the result and one of the polynomial below it (measured 1.53)
TRITON_BIAS_ULPS = 2
# x**c with c up to 100: an exponent of 100 known to 2**-31 is 0.5 ulp, the polynomial 1, the sum 0.5
# (measured 2.41)
TRITON_POWER_ULPS = 3

# One fp32 step against the reference, whose scalars are fp64 until they are used, relative to the largest
# element: the rate is off by up to 8 ulp (9.5e-7), bias corrections and norm by 4, and all of it is relative
# to an update, which is not larger than the parameters of the tests; a last rounding of the element 1.2e-7
# (measured 4e-7)
GPU_STEP = 1.5e-6

# what a step used, the rate, the norm and its coefficient, relative: the rate is off by up to 8 ulp, 9.5e-7
GPU_USED = 1e-6
# recorded sums of squares, relative; of changes, which are differences of rounded parameters
GPU_SUMS = 2e-5
GPU_CHANGES = 1e-3
# 16-bit parameters and moments: each step rounds once, and may round the other way where fp32 was nearly a
# tie; so off by a unit per step, and by any in this share of the elements per step (measured: 1 %), or in two
# of a few
GPU_16_BIT_SHARE = 0.02
# RMS error of fp32 elements against the fp64 oracle over the reference's own, beside half an ulp of the
# largest: both round as often, the GPU also its scalars; a lost bit would double it (measured: 1.2)
GPU_RMS_RATIO = 1.5
GPU_RMS_FLOOR = 6e-8

# 1 - b**t for t of 1 to 1.6e7: an ulp of expm1, as CUDA documents, half of one each of what the rounding of
# its argument took and of the sum (measured with glibc's expm1: 1.18)
CUDA_BIAS_ULPS = 2
# its root: half the relative error, which is at most as many ulp, and a rounding (measured: 1.14)
CUDA_ROOT_BIAS_ULPS = 2.5

# rates that take a sine, in the browser against Python here, relative to the peak. Each C library rounds a
# sine to within 1 ulp, so that two may lie 2 ulp apart; a square doubles that and rounds once more, and the
# two levels' weights, products, sum and peak add at most as much (measured: 2 ulp of 2.2e-16)
OTHER_SINE = 8 * 2.0**-52

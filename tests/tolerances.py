"""Every tolerance of the tests, each with where it comes from. A tolerance is changed here or nowhere."""

# --- optimizer

# fp64 trajectories, relative to the largest element of a tensor. Each update rounds about 10 times at 1.1e-16;
# over 300 updates of one sign that is 3.3e-13, and errors of either sign mostly cancel (measured: 2e-15)
FP64_TRAJECTORY = 1e-12

# RMS error against the fp64 oracle over that of torch on the same input, the contract's bound
RMS_RATIO = 1.05

# what fp32 moments of 16-bit parameters leave of torch's error over 2,000 steps of falling gradients; measured:
# 0.33 (bf16), 0.05 (fp16). The rest is the rounding of the parameters themselves
MOMENTS_RATIO = 0.5

# a wrong implementation must miss FP64_TRAJECTORY by at least this factor in some case
WRONG_MARGIN = 1e3

# --- training runs

# a run may be this many times as far from stock foreach as stock fused is: both differ from it in the last bits,
# which training amplifies alike, so the factor allows for luck alone
STOCK_DISTANCE_RATIO = 4.0

# and a run with one more update of warm-up must be at least this many times as far as ours
OFF_BY_ONE_RATIO = 1000.0

# --- schedules: a spelling on a device against the fp64 definition, at every step, in ulp of the expected value

# Eight roundings of half an ulp at most lie on the way: two conversions, the division, a square root or sine or
# level, the products with level and peak, the sum. A relative error of 2**-24 is up to one ulp. The cosine's
# square doubles three of them; measured over the zoo with fp32 numpy: 2.4 linear, 2.2 inverse square root, ...
_ULPS = 8
# the power multiplies the relative error of its base by the exponent (12.5 in the zoo, 1.5 ulp each), and
# exp2(c*log2(x)), which GPUs use, rounds a logarithm of up to 126 once: 126 * 2**-24 * ln 2 = 44 ulp
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
# A cosine of no whole number of half waves cannot be reduced in integers. The angle, at most pi after the whole
# part is taken off, is off by 3 roundings and its conversion: 4 * 2**-24 * pi/2 = 3.7e-7; the slope is at most 1
SCHEDULE_UNEVEN_COSINE = 5e-7
# the same operations in the same order; sine and power may differ by one ulp between libraries, a square doubles it
SCHEDULE_ULPS_FP64 = 4

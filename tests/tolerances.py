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

// What csrc/cuda/step.cu makes of a schedule at many steps, and of the betas: launched by cuda_spelling.py,
// which puts the functions of the kernels, up to those of a chunk, before this.

}  // namespace

// the tables are those of one group; a thread for each step
extern "C" __global__ void lr_of_steps(const GroupInts* ints, const GroupFloats* floats, int64_t phases,
                                       const int64_t* k, float* lr, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    Step step = {};
    step.group_ints = ints, step.group_floats = floats, step.groups = 1, step.phases = int32_t(phases);
    if (i < count) lr[i] = lr_at(step, *ints, *floats, 0, k[i]);
}

// bc1 and sqrt(bc2) of tensors that have been updated `updates` times before
extern "C" __global__ void corrections(const GroupFloats* floats, const float* updates, float* bc1,
                                       float* root_bc2, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    root_bc2[i] = scalars_of(updates[i], *floats, 1, 1).root_bc2;
    bc1[i] =
        bias_correction<float>(double(updates[i]) + 1, double(floats->log_b1_hi) + double(floats->log_b1_lo));
}

}  // namespace fusedlr

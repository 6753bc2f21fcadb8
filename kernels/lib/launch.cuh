// How a kernel follows the one before it in its stream.
#pragma once

// From sm_90 on a kernel of a recorded graph starts as soon as multiprocessors become free, while the
// last blocks of the kernel before it still run ("programmatic dependent launch", CUDA programming
// guide). What that kernel and those before it wrote is there after this call, and only then may
// memory be written: every thread calls it before it touches any memory but its parameters and, where it
// loads for matrix products and convolutions, weights. In other launches it returns at once.
__device__ __forceinline__ void after_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

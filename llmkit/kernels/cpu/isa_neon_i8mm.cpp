// 64-bit ARM with the int8 matrix product extension (ARMv8.6).
#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(__aarch64__)
#if defined(__clang__) && __clang_major__ < 16 && !defined(__ARM_FEATURE_MATMUL_INT8)
#define __ARM_FEATURE_DOTPROD 1
#define __ARM_FEATURE_MATMUL_INT8 1  // or its header keeps the intrinsics from functions with a target of their own
#endif
#include <arm_neon.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif
namespace llmkit::i8mm {
#define KERNELS_NAME "neon_i8mm"
#define LLMKIT_I8MM
#include "simd_neon.h"
#include "kernels.inl"
}  // namespace llmkit::i8mm
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
const llmkit::Kernels* llmkit::neon_i8mm_kernels() { return &i8mm::kTable; }
#else
const llmkit::Kernels* llmkit::neon_i8mm_kernels() { return nullptr; }
#endif

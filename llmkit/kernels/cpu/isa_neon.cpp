// 64-bit ARM with the dot product extension (ARMv8.2).
#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#if defined(__clang__) && __clang_major__ < 16 && !defined(__ARM_FEATURE_DOTPROD)
#define __ARM_FEATURE_DOTPROD 1  // or its header keeps the intrinsics from functions with a target of their own
#endif
#include <arm_neon.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
namespace llmkit::neon {
#define KERNELS_NAME "neon_dotprod"
#include "simd_neon.h"
#include "kernels.inl"
}  // namespace llmkit::neon
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
const llmkit::Kernels* llmkit::neon_kernels() { return &neon::kTable; }
#else
const llmkit::Kernels* llmkit::neon_kernels() { return nullptr; }
#endif

// x86 with AVX2, FMA and F16C.
#include <math.h>
#include <string.h>

#include "kernels.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(LLMKIT_WITHOUT_AVX2)
#include <immintrin.h>
// Only what follows may use these instructions: nothing of the standard library is compiled with them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace llmkit::avx2 {
#define KERNELS_NAME "avx2"
#include "simd_avx2.h"
#include "kernels.inl"
}  // namespace llmkit::avx2
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
const llmkit::Kernels* llmkit::avx2_kernels() { return &avx2::kTable; }
#else
const llmkit::Kernels* llmkit::avx2_kernels() { return nullptr; }
#endif

// x86 with AVX2 with AVX-VNNI.
#include <math.h>
#include <string.h>

#include "kernels.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(LLMKIT_WITHOUT_AVXVNNI)
#include <immintrin.h>
// Only what follows may use these instructions: nothing of the standard library is compiled with them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
namespace llmkit::avxvnni {
#define KERNELS_NAME "avxvnni"
#define LLMKIT_AVXVNNI
#include "simd_avx2.h"
#include "kernels.inl"
}  // namespace llmkit::avxvnni
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
const llmkit::Kernels* llmkit::avxvnni_kernels() { return &avxvnni::kTable; }
#else
const llmkit::Kernels* llmkit::avxvnni_kernels() { return nullptr; }
#endif

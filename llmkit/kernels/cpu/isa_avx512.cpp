// x86 with AVX-512 with VNNI.
#include <math.h>
#include <string.h>

#include "kernels.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(LLMKIT_WITHOUT_AVX512)
#include <immintrin.h>
// Only what follows may use these instructions: nothing of the standard library is compiled with them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
namespace llmkit::avx512 {
#define KERNELS_NAME "avx512_vnni"
#include "simd_avx512.h"
#include "kernels.inl"
}  // namespace llmkit::avx512
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
const llmkit::Kernels* llmkit::avx512_kernels() { return &avx512::kTable; }
#else
const llmkit::Kernels* llmkit::avx512_kernels() { return nullptr; }
#endif

// Which instruction set this processor has.
#include <cstring>

#include "kernels.h"
#include "threads.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llmkit {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
struct Features {
  bool avx2 = false, avxvnni = false, avx512 = false;
};

void cpuid(unsigned leaf, unsigned sub, unsigned out[4]) {
#if defined(_MSC_VER)
  __cpuidex(reinterpret_cast<int*>(out), int(leaf), int(sub));
#else
  __cpuid_count(leaf, sub, out[0], out[1], out[2], out[3]);
#endif
}

uint64_t saved_registers() {  // which registers the system saves between programs
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
#endif
}

Features features() {
  Features f;
  unsigned a[4], b[4], c[4];
  cpuid(0, 0, a);
  if (a[0] < 7) return f;
  cpuid(1, 0, a);
  auto bit = [](unsigned value, int n) { return (value >> n & 1) != 0; };
  if (!bit(a[2], 27)) return f;  // OSXSAVE
  const uint64_t saved = saved_registers();
  cpuid(7, 0, b);
  cpuid(7, 1, c);
  f.avx2 = (saved & 6) == 6 && bit(a[2], 28) && bit(a[2], 12) && bit(a[2], 29) && bit(b[1], 5);  // AVX, FMA, F16C, AVX2
  f.avxvnni = f.avx2 && b[0] >= 1 && bit(c[0], 4);
  f.avx512 = f.avx2 && (saved & 0xe6) == 0xe6 && bit(b[1], 16) && bit(b[1], 17) && bit(b[1], 30) && bit(b[1], 31) && bit(b[2], 11);
  return f;
}
#endif

struct Choice { const Kernels* kernels; bool works; };  // kernels null: the compiler or the processor's family does not have them

std::vector<Choice> choices() {
  bool avx2 = false, avxvnni = false, avx512 = false;
#if defined(__x86_64__) || defined(_M_X64)
  const Features f = features();
  avx2 = f.avx2, avxvnni = f.avxvnni, avx512 = f.avx512;
#endif
  const ArmFeatures arm = arm_features();
  return {{avx512_kernels(), avx512},      {avxvnni_kernels(), avxvnni},   {avx2_kernels(), avx2},
          {neon_i8mm_kernels(), arm.i8mm}, {neon_kernels(), arm.dotprod}, {portable_kernels(), true}};
}

}  // namespace

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
  for (const Choice& choice : choices())
    if (choice.kernels && choice.works) found.push_back(choice.kernels);
  return found;
}

const Kernels* choose_kernels(const char* wanted, const char** problem) {
  *problem = "unknown";
  for (const Choice& choice : choices()) {
    if (!choice.kernels) continue;
    if (wanted && std::strcmp(wanted, choice.kernels->name) != 0) continue;
    if (choice.works) return choice.kernels;
    *problem = "not supported by this processor";
    if (wanted) return nullptr;
  }
  return nullptr;
}

}  // namespace llmkit

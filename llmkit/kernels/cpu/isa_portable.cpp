// Plain C++: every processor.
#include <math.h>
#include <string.h>

#include "kernels.h"

namespace llmkit::portable {
#define KERNELS_NAME "portable"
#include "simd_portable.h"
#include "kernels.inl"
}  // namespace llmkit::portable

const llmkit::Kernels* llmkit::portable_kernels() { return &portable::kTable; }

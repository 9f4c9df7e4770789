#include "threads.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#include <process.h>
#else
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <cstdio>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace llmkit {
namespace {

// Tells the core that this is a spin loop: a sibling hyperthread gets its units, and leaving the loop costs no mispredicted loads.
void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield");
#elif defined(_M_ARM64)
  __yield();
#endif
}

// Longer than the time by which threads that stream weights drift apart, and than it takes to choose a token: within a step nobody sleeps.
constexpr std::chrono::microseconds kSpin{1000};
constexpr int kFirstBackoff = 16, kLongestBackoff = 1000;     // waits that sleep at once after one that spun in vain: the first time, and at most
constexpr std::chrono::milliseconds kRepeatedWithin{100};

template <class Done>
bool spin(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

}  // namespace

// With more threads than processors whoever spins keeps the one it waits for from running.
Barrier::Barrier(int count) : count_(count), spins_(unsigned(count) <= std::thread::hardware_concurrency()) {}

bool Barrier::spins() {
  const int left = waits_that_sleep_.load(std::memory_order_relaxed);
  if (left <= 0) return spins_;
  waits_that_sleep_.store(left - 1, std::memory_order_relaxed);
  return false;
}

// Another program holds the core of whoever is late. A thread that spins is the next to be taken off its own; one that sleeps is woken at
// once. But to wake takes longer than to spin, and a core that is back for good is not missed again soon.
void Barrier::back_off() {
  const int64_t now = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::microseconds(1);
  int64_t before = backed_off_at_.load(std::memory_order_relaxed);
  if (now - before < 2 * kSpin.count() || !backed_off_at_.compare_exchange_strong(before, now)) return;  // one late thread is one event, however many waited for it
  last_backoff_ = now - before < std::chrono::microseconds(kRepeatedWithin).count() ? std::min(4 * last_backoff_, kLongestBackoff) : kFirstBackoff;
  waits_that_sleep_.store(last_backoff_ * (count_ - 1), std::memory_order_relaxed);
}

void Barrier::wait() {
  if (count_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_acq_rel);
    generation_.notify_all();
    return;
  }
  auto passed = [&] { return generation_.load(std::memory_order_acquire) != generation; };
  const bool spins = this->spins();
  if (!spins || !spin(passed)) {
    if (spins) back_off();
    while (!passed()) generation_.wait(generation, std::memory_order_acquire);
  }
}

Pool::Pool(int threads) : threads_(threads), process_(process_id()), barrier_(threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  } catch (const std::system_error& error) {
    end();
    throw std::runtime_error("The system does not start " + std::to_string(threads) + " threads (" + error.what() + "). Take fewer with --threads");
  }
}

Pool::~Pool() {
  if (process_ == process_id()) end();
  else new std::vector<std::thread>(std::move(workers_));  // a fork: they stayed behind in the parent, and are never joined
}

void Pool::end() {
  ending_ = true;
  job_.fetch_add(1);
  job_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::serve(int thread) {
  uint32_t last_job = 0;
  for (;;) {
    auto called = [&] { return job_.load(std::memory_order_acquire) != last_job; };
    if (!barrier_.spins() || !spin(called))
      while (!called()) job_.wait(last_job, std::memory_order_acquire);
    ++last_job;
    if (ending_) return;
    work_(context_, thread);
    barrier_.wait();
  }
}

void Pool::run(void (*work)(void*, int), void* context) {
  std::lock_guard<std::mutex> lock(running_);
  work_ = work;
  context_ = context;
  job_.fetch_add(1, std::memory_order_acq_rel);
  job_.notify_all();
  work(context, 0);
  barrier_.wait();
}

namespace {
OpenMP shared_openmp;
struct IndependentWork {
  void (*work)(void*, int, int);
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr problem;

  void run(int thread, int threads) {
    try {
      work(context, thread, threads);
    } catch (...) {
      if (!failed.exchange(true)) problem = std::current_exception();
    }
  }
};
}  // namespace

void share_openmp(const OpenMP& runtime) { shared_openmp = runtime; }

void run_independent(int threads, void (*work)(void*, int, int), void* context) {
  struct Shared : IndependentWork { int threads; } shared{{work, context, {}, {}}, threads};
  if (shared_openmp.parallel) shared_openmp.parallel([](void* data) { static_cast<Shared*>(data)->run(shared_openmp.thread(), shared_openmp.threads()); }, &shared, unsigned(threads), 0);
  else pool_of(threads)->run([](void* data, int thread) { static_cast<Shared*>(data)->run(thread, static_cast<Shared*>(data)->threads); }, &shared);
  if (shared.problem) std::rethrow_exception(shared.problem);
}

float* scratch_of_thread(int64_t floats) {
  static thread_local std::unique_ptr<Memory> memory;
  if (!memory || memory->bytes < size_t(floats) * 4) {
    memory.reset();
    memory = std::make_unique<Memory>(size_t(floats) * 4);
  }
  return reinterpret_cast<float*>(memory->data);
}

ArmFeatures arm_features() {
  ArmFeatures f;
#if defined(__APPLE__) && defined(__aarch64__)
  auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  f.dotprod = has("hw.optional.arm.FEAT_DotProd"), f.i8mm = has("hw.optional.arm.FEAT_I8MM");
#elif defined(__linux__) && defined(__aarch64__)
  f.dotprod = (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
  f.i8mm = f.dotprod && (getauxval(AT_HWCAP2) >> 13 & 1) != 0;  // HWCAP2_I8MM
#elif defined(_M_ARM64)
  f.dotprod = IsProcessorFeaturePresent(43) != 0;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#endif
  return f;
}

int64_t process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

int physical_cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<std::string> cores;  // the siblings of a core share one list
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      std::string siblings = "cpu" + std::to_string(cpu);
      const std::string path = "/sys/devices/system/cpu/" + siblings + "/topology/thread_siblings_list";
      if (FILE* file = std::fopen(path.c_str(), "r")) {
        char line[256];
        if (std::fgets(line, sizeof line, file)) siblings = line;
        std::fclose(file);
      }
      cores.insert(siblings);
    }
    if (!cores.empty()) return int(cores.size());
  }
#elif defined(__APPLE__)
  int count = 0;
  size_t size = sizeof count;
  if (sysctlbyname("hw.perflevel0.physicalcpu", &count, &size, nullptr, 0) == 0 && count > 0) return count;
  if (sysctlbyname("hw.physicalcpu", &count, &size, nullptr, 0) == 0 && count > 0) return count;
#endif
  const int logical = int(std::thread::hardware_concurrency());
  return logical > 0 ? logical : 1;
}

std::shared_ptr<Pool> pool_of(int threads) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Pool>> pools;
  static int64_t owner = process_id();
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != process_id()) {  // a fork: threads do not survive it
    pools.clear();
    owner = process_id();
  }
  std::shared_ptr<Pool> pool = pools[threads].lock();
  if (!pool) pools[threads] = pool = std::make_shared<Pool>(threads);
  return pool;
}

Memory::Memory(size_t size) : bytes(size) {
  if (!size) return;
#if defined(_WIN32)
  data = static_cast<uint8_t*>(VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
  if (!data) throw std::bad_alloc();
#else
  auto map = [](size_t wanted) {
    void* p = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<uint8_t*>(p);
  };
#if defined(MADV_HUGEPAGE)
  constexpr size_t kHuge = size_t(2) << 20;
  if (size >= 2 * kHuge) {  // whole large pages: a fault for each, not for each 4 KiB
    bytes = (size + kHuge - 1) / kHuge * kHuge;
    uint8_t* p = map(bytes + kHuge);
    const size_t before = (kHuge - reinterpret_cast<uintptr_t>(p) % kHuge) % kHuge;
    data = p + before;
    if (before) munmap(p, before);
    munmap(data + bytes, kHuge - before);
    madvise(data, bytes, MADV_HUGEPAGE);
    return;
  }
#endif
  data = map(size);
#endif
}

Memory::~Memory() {
  if (!data) return;
#if defined(_WIN32)
  VirtualFree(data, 0, MEM_RELEASE);
#else
  munmap(data, bytes);
#endif
}

}  // namespace llmkit

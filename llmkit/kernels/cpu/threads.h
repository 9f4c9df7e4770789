// A pool of threads that run one function together and meet at barriers; and the only place that asks the system anything.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace llmkit {

// Waits briefly by spinning (a step of a small model has hundreds of barriers of a microsecond), then sleeps: an idle
// laptop stays idle, and where another program holds a core nobody burns the other.
class Barrier {
 public:
  explicit Barrier(int count);
  void wait();
  bool spins();

 private:
  void back_off();
  const int count_;
  const bool spins_;
  std::atomic<int> arrived_{0};
  std::atomic<int> waits_that_sleep_{0};  // so many of the next waits sleep without spinning first
  std::atomic<int> last_backoff_{0};     // what waits_that_sleep_ was set to the last time
  std::atomic<int64_t> backed_off_at_{0};  // microseconds of the steady clock
  std::atomic<uint32_t> generation_{0};
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return threads_; }
  // Runs work(context, thread) on all threads, the caller being thread 0, and returns when all have ended.
  void run(void (*work)(void*, int), void* context);
  Barrier& barrier() { return barrier_; }

 private:
  void serve(int thread);
  void end();
  std::mutex running_;
  const int threads_;
  const int64_t process_;
  Barrier barrier_;
  std::vector<std::thread> workers_;
  std::atomic<uint32_t> job_{0};
  std::atomic<bool> ending_{false};
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
};

struct ArmFeatures { bool dotprod = false, i8mm = false; };
ArmFeatures arm_features();  // none on other processors

int physical_cores();  // that this process may use
int64_t process_id();
// The pool of so many threads that all plans of this process share.
std::shared_ptr<Pool> pool_of(int threads);

// Runs work(context, thread, threads) on so many threads, which need not meet on the way: those of the OpenMP runtime that is shared
// (GOMP_parallel, omp_get_thread_num, omp_get_num_threads), or of the pool. Two sets of threads that spin would take turns on the cores.
struct OpenMP {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
};
void share_openmp(const OpenMP& runtime);
void run_independent(int threads, void (*work)(void*, int, int), void* context);  // throws what the first of them threw

// Bytes that are zero, aligned to 64, and in large pages where the system has them.
struct Memory {
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data = nullptr;
  size_t bytes = 0;
};

// Memory of the calling thread that stays for its next call, with whatever is in it.
float* scratch_of_thread(int64_t floats);

}  // namespace llmkit

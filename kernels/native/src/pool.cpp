// Each thread has a share of the current op's chunks, adjacent ones, so that it reads memory in one direction. It takes
// them from a counter, then takes chunks from the other shares, and goes on to the next op when all chunks are done. It
// waits for work, never for a thread: a thread that the system does not run holds up others only while it has a chunk.
#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fastllama {
namespace {

constexpr int SPINS = 2000;           // pauses before a waiting thread yields
constexpr int YIELDS_AFTER_RUN = 50;  // before a worker sleeps
constexpr int MAX_SHARES = 16;        // of an op. More threads have a share together: looking at many takes time
constexpr size_t MEMORY_ALIGNMENT = 64;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Waiting {
 public:
  void once() {
    if (++spins_ < SPINS) pause(); else sched_yield();
  }
  bool is_long() const { return spins_ >= SPINS + YIELDS_AFTER_RUN; }
 private:
  int spins_ = 0;
};

struct alignas(128) Progress {  // of one op, on cache lines of its own
  std::atomic<int64_t> done{0};
  int64_t chunks = 0;
};

struct alignas(128) Share {  // of one op
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// The ops of one call. A worker may still look at a Run when its call has ended, so Runs are reused only once nobody uses
// them, and never freed.
struct Run {
  std::atomic<int> users{0};
  uint64_t generation = 0;
  const Op* ops = nullptr;
  const Kernels* kernels = nullptr;
  int n_ops = 0, n_threads = 0, n_shares = 0;
  std::unique_ptr<Progress[]> progress;  // of each op
  std::unique_ptr<Share[]> shares;       // of each op
  int capacity = 0, capacity_of_shares = 0;

  void set(const Op* new_ops, int count, int threads, const Kernels& set_of_kernels) {
    ops = new_ops, n_ops = count, n_threads = threads, kernels = &set_of_kernels;
    n_shares = threads < MAX_SHARES ? threads : MAX_SHARES;
    if (capacity < n_ops) {
      progress.reset(new Progress[n_ops]);
      capacity = n_ops;
    }
    if (capacity_of_shares < n_ops * n_shares) {
      shares.reset(new Share[n_ops * n_shares]);
      capacity_of_shares = n_ops * n_shares;
    }
    for (int i = 0; i < n_ops; i++) {
      const int64_t chunks = count_chunks(ops[i]);
      progress[i].done.store(0, std::memory_order_relaxed);
      progress[i].chunks = chunks;
      for (int number = 0; number < n_shares; number++) {
        Share& share = shares[i * n_shares + number];
        share.next.store(chunks * number / n_shares, std::memory_order_relaxed);
        share.end = chunks * (number + 1) / n_shares;
      }
    }
  }
};

thread_local Scratch scratch;

// `ops` is read only with a chunk in hand: without one, the call may have ended.
void take_part(Run& run, int thread) {
  for (int i = 0; i < run.n_ops; i++) {
    Progress& progress = run.progress[i];
    int64_t taken = 0;
    for (int other = 0; other < run.n_shares; other++) {
      Share& share = run.shares[i * run.n_shares + (thread + other) % run.n_shares];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= share.end) break;
        if (taken++ == 0) run.kernels->prepare(run.ops[i], scratch);
        run.kernels->run(run.ops[i], chunk, scratch);
      }
    }
    if (taken > 0) progress.done.fetch_add(taken, std::memory_order_release);
    for (Waiting waiting; progress.done.load(std::memory_order_acquire) < progress.chunks;) waiting.once();
  }
}

void run_alone(const Op* ops, int n_ops, const Kernels& kernels) {
  for (int i = 0; i < n_ops; i++) {
    const int64_t chunks = count_chunks(ops[i]);
    if (chunks > 0) kernels.prepare(ops[i], scratch);
    for (int64_t chunk = 0; chunk < chunks; chunk++) kernels.run(ops[i], chunk, scratch);
  }
}

class Pool {
 public:
  // False where another thread is using the pool.
  bool run(const Op* ops, int n_ops, int n_threads, const Kernels& kernels) {
    std::unique_lock<std::mutex> call(calls_, std::try_to_lock);
    if (!call.owns_lock()) return false;
    start_workers(n_threads - 1);
    Run& run = unused_run();
    run.set(ops, n_ops, n_threads, kernels);
    run.generation = generation_.load() + 1;
    current_.store(&run);
    generation_.store(run.generation);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take_part(run, 0);
    current_.store(nullptr);
    run.users.fetch_sub(1);
    return true;
  }

 private:
  void start_workers(int count) {
    try {
      for (; n_started_ < count; n_started_++) std::thread(&Pool::work, this, n_started_ + 1).detach();
    } catch (const std::system_error&) {  // the system has no more threads: run on those that there are
    }
  }

  Run& unused_run() {
    for (auto& run : runs_) {
      int none = 0;
      if (run->users.compare_exchange_strong(none, 1)) return *run;
    }
    runs_.push_back(std::make_unique<Run>());
    runs_.back()->users.store(1);
    return *runs_.back();
  }

  void work(int thread) {
    for (uint64_t seen = 0;;) {
      wait_for_run(seen);
      seen = generation_.load();
      Run* run = current_.load();
      if (run == nullptr) continue;
      run->users.fetch_add(1);
      if (current_.load() == run) {  // its fields are valid, and stay so until users is 0
        seen = run->generation;
        if (thread < run->n_threads) take_part(*run, thread);
      }
      run->users.fetch_sub(1);
    }
  }

  void wait_for_run(uint64_t seen) {
    for (Waiting waiting; !waiting.is_long(); waiting.once()) {
      if (generation_.load() != seen) return;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return generation_.load() != seen; });
    sleepers_.fetch_sub(1);
  }

  std::mutex calls_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  std::atomic<uint64_t> generation_{0};
  std::atomic<Run*> current_{nullptr};
  std::vector<std::unique_ptr<Run>> runs_;
  int n_started_ = 0;
};

// Never deleted: its threads may wait until the process ends. A child process has none of them and makes its own pool.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
  Pool* found = pool.load();
  if (found == nullptr) {
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;  // another thread was faster; this one has no threads yet
  }
  return *found;
}

}  // namespace

void run_ops(const Op* ops, int n_ops, int n_threads, const Kernels& kernels) {
  bool divisible = false;
  for (int i = 0; i < n_ops; i++) divisible |= count_chunks(ops[i]) > 1;
  if (n_threads > 1 && divisible && the_pool().run(ops, n_ops, n_threads, kernels)) return;
  run_alone(ops, n_ops, kernels);
}

Scratch::~Scratch() {
  std::free(inputs_.memory);
  std::free(results_.memory);
}

float* Scratch::inputs(int64_t floats) { return grown(inputs_, floats); }

float* Scratch::results(int64_t floats) { return grown(results_, floats); }

float* Scratch::grown(Block& block, int64_t floats) {
  if (block.floats < floats) {
    std::free(block.memory);
    block.floats = ceil_div(floats, 1024) * 1024;
    block.memory = static_cast<float*>(std::aligned_alloc(MEMORY_ALIGNMENT, block.floats * sizeof(float)));
    if (block.memory == nullptr) std::abort();
  }
  return block.memory;
}

}  // namespace fastllama

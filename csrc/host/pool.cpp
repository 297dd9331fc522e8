// The optional thread pool: the caller works too; between jobs the others look out for the next one
// for some microseconds (the passes of one call follow each other at once), then sleep.
//
// Not OpenMP: libgomp's workers do not survive a fork, a second OpenMP runtime in the process
// (torch brings one) oversubscribes the CPU, and a library that others embed should leave the
// choice of threads to them. This pool is one implementation of softmaxlib_parallel_for among
// others.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "softmaxlib/softmaxlib.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define SOFTMAXLIB_POSIX 1
#endif

namespace {

// Counts forks on the child's side: a pool of another generation has lost its threads.
std::atomic<unsigned> generation{0};

#if defined(SOFTMAXLIB_POSIX)
void watch_forks() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
}

// Signals belong to the caller's threads; workers are created with all of them blocked.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t saved_;
};
#else
void watch_forks() {}
struct BlockedSignals {};
#endif

// The tasks of a job that one thread starts with; on a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t stop = 0;
};

struct Job {
  softmaxlib_task task;
  void* argument;
  int64_t count;
};

constexpr int kSpins = 200;  // of yield(): gives way where threads outnumber cores

template <class Condition>
bool spin_until(Condition condition) {
  for (int i = 0; i < kSpins; ++i) {
    if (condition()) return true;
    std::this_thread::yield();
  }
  return false;
}

}  // namespace

struct softmaxlib_pool {
  unsigned born = generation.load(std::memory_order_relaxed);
  std::mutex busy;  // held by the caller whose job runs
  std::mutex mutex;
  std::condition_variable wake, done;
  const Job* job = nullptr;
  std::vector<Share> shares;        // one per thread, the caller's first
  std::atomic<uint64_t> ticket{0};  // of the last job
  std::atomic<int> working{0};
  bool stop = false;
  std::vector<std::thread> threads;

  // A thread's own share first, the same in every job of as many tasks: what it wrote in one pass
  // is in its cache for the next. Then what others have not begun.
  void work(const Job& mine, size_t self) {
    for (size_t k = 0; k < shares.size(); ++k) {
      Share& share = shares[(self + k) % shares.size()];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.stop;)
        mine.task(mine.argument, i);
    }
  }

  void run_worker(size_t self) {
    uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return ticket.load(std::memory_order_acquire) != seen; });
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, [&] { return stop || ticket.load(std::memory_order_relaxed) != seen; });
      if (stop) return;
      seen = ticket.load(std::memory_order_relaxed);
      if (!job) continue;  // came too late
      const Job mine = *job;
      working.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      work(mine, self);
      lock.lock();
      if (working.fetch_sub(1, std::memory_order_release) == 1) done.notify_one();
    }
  }

  void run(const Job& next) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const int64_t members = static_cast<int64_t>(shares.size());
      for (int64_t k = 0; k < members; ++k) {
        Share& share = shares[static_cast<size_t>(k)];
        share.next.store(next.count / members * k + std::min(next.count % members, k),
                         std::memory_order_relaxed);
        share.stop = next.count / members * (k + 1) + std::min(next.count % members, k + 1);
      }
      job = &next;
      ticket.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    work(next, 0);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      job = nullptr;
    }
    if (spin_until([&] { return working.load(std::memory_order_acquire) == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return working.load(std::memory_order_acquire) == 0; });
  }

  void join() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  bool after_fork() const { return born != generation.load(std::memory_order_relaxed); }
};

extern "C" {

softmaxlib_status softmaxlib_pool_create(int32_t num_threads, softmaxlib_pool** pool) {
  if (!pool) return SOFTMAXLIB_ERROR_NULL;
  *pool = nullptr;
  if (num_threads < 1 || num_threads > 4096) return SOFTMAXLIB_ERROR_THREADS;
  watch_forks();
  softmaxlib_pool* created = new (std::nothrow) softmaxlib_pool;
  if (!created) return SOFTMAXLIB_ERROR_MEMORY;
  try {
    const BlockedSignals blocked;
    (void)blocked;
    const size_t members = static_cast<size_t>(num_threads);
    created->shares = std::vector<Share>(members);
    created->threads.reserve(members - 1);
    for (size_t i = 1; i < members; ++i)
      created->threads.emplace_back([created, i] { created->run_worker(i); });
  } catch (...) {  // no memory or no thread
    created->join();
    delete created;
    return SOFTMAXLIB_ERROR_MEMORY;
  }
  *pool = created;
  return SOFTMAXLIB_OK;
}

void softmaxlib_pool_destroy(softmaxlib_pool* pool) {
  // The threads of a pool from before a fork do not exist in the child, and its locks may be held
  // by them for ever: it is left behind.
  if (!pool || pool->after_fork()) return;
  pool->join();
  delete pool;
}

void softmaxlib_pool_parallel_for(void* pool, int64_t count, softmaxlib_task task, void* argument) {
  softmaxlib_pool* p = static_cast<softmaxlib_pool*>(pool);
  if (p && count > 1 && !p->after_fork() && p->busy.try_lock()) {
    const std::lock_guard<std::mutex> lock(p->busy, std::adopt_lock);
    p->run({task, argument, count});
    return;
  }
  for (int64_t i = 0; i < count; ++i) task(argument, i);
}

}  // extern "C"

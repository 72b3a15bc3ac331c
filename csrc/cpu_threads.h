// Threads of a CPU: those of the process's OpenMP where there is one, as torch has it. New threads would share their
// cores with OpenMP's, which spin for milliseconds after each of torch's operations.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "launch.h"

// Weak: null where no OpenMP runtime (GNU's, LLVM's or Intel's) was loaded before this library.
#if defined(__linux__) && defined(__GNUC__)
#include <pthread.h>
#define ROPE_OPENMP 1
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
}
#endif

namespace rope {

#if defined(ROPE_OPENMP)
// OpenMP's threads do not survive a fork, and it does not know.
inline std::atomic<bool> forked{false};
inline const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
inline bool has_openmp() {
  return GOMP_parallel != nullptr && omp_get_thread_num != nullptr && watching_forks == 0 && !forked;
}
#endif

// Parts of a thread's work, of which others take those that it has not come to.
constexpr int64_t kParts = 4;

// Calls run(first, last, scratch) for parts of [0, count), with at most that many threads, each of which has
// scratch_size bytes of its own. A thread begins with the part of the work that torch would give it.
template <typename Run>
int run_threads(int64_t count, int64_t threads, int64_t scratch_size, const Run& run) {
  if (threads > count) threads = count;
  if (threads < 1) threads = 1;
  try {
    // Apart by two cache lines, so that no thread waits for another's writes.
    const size_t apart = static_cast<size_t>(scratch_size) + 128;
    std::vector<char> scratch(apart * static_cast<size_t>(threads));
    if (threads == 1) {
      run(0, count, scratch.data());
      return kDone;
    }
    std::vector<std::atomic<int64_t>> taken(static_cast<size_t>(threads));
    const int64_t parts = kParts * threads;
    const auto work = [&](int64_t thread) {
      char* own = scratch.data() + apart * static_cast<size_t>(thread);
      for (int64_t i = 0; i < threads; ++i) {
        const int64_t from = (thread + i) % threads;
        for (int64_t n; (n = taken[static_cast<size_t>(from)]++) < kParts;) {
          const int64_t part = kParts * from + n;
          run(count * part / parts, count * (part + 1) / parts, own);
        }
      }
    };
#if defined(ROPE_OPENMP)
    if (has_openmp()) {
      using Work = decltype(work);
      GOMP_parallel([](void* all) { (*static_cast<Work*>(all))(omp_get_thread_num()); },
                    const_cast<void*>(static_cast<const void*>(&work)), static_cast<unsigned>(threads), 0);
      return kDone;
    }
#endif
    // They end with the call: none is there for a fork to lose.
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads - 1));
    try {
      for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    } catch (const std::exception&) {
      // The system gives no more threads: those that are there do the rest.
    }
    work(0);
    for (std::thread& other : others) other.join();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kDone;
}

}  // namespace rope

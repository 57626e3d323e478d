// Tasks over threads: libgomp on Linux (the one torch has mapped), std::thread elsewhere. A task's result never depends
// on which thread runs it.
#pragma once
#include <cstdint>
#include <cstdlib>

#include <atomic>
#include <memory>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#else
#include <exception>
#include <thread>
#include <vector>
#endif

namespace svp {

// 64-byte aligned floats for one thread; null when memory is out.
struct Scratch {
  void* block;
  float* data = nullptr;
  explicit Scratch(int64_t count) : block(std::malloc(static_cast<size_t>(count) * sizeof(float) + 64)) {
    if (block) data = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(block) + 63) & ~uintptr_t{63});
  }
  ~Scratch() { std::free(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// While it lives, numbers too small to be normal count as zero. Gradients that fade along the tokens pass through that
// range, and Intel's processors take more than a hundred cycles for every operation that meets one.
struct FlushSubnormals {
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  FlushSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // FTZ and DAZ
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

constexpr int OUT_OF_MEMORY = 1;

// Runs work(task, scratch) for every task; each thread has `floats` of scratch. Returns 0 or OUT_OF_MEMORY.
//
// A thread begins with its own run of neighbours: what it wrote in one kernel it reads in the next, and no two threads
// walk side by side through rows that a processor fetches ahead for the other. When its run is done it helps with the rest.
template <typename Work>
int parallel(int64_t tasks, int threads, int64_t floats, Work work) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    [[maybe_unused]] const FlushSubnormals flush;
    Scratch scratch(floats);
    if (!scratch.data) return OUT_OF_MEMORY;
    for (int64_t task = 0; task < tasks; ++task) work(task, scratch.data);
    return 0;
  }
  struct alignas(64) Run {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  const std::unique_ptr<Run[]> runs(new (std::nothrow) Run[threads]);
  if (!runs) return OUT_OF_MEMORY;
  for (int i = 0; i < threads; ++i) {
    runs[i].next = tasks * i / threads;
    runs[i].end = tasks * (i + 1) / threads;
  }
  std::atomic<int> failed{0};
  const auto member = [&](int number) {
    [[maybe_unused]] const FlushSubnormals flush;
    Scratch scratch(floats);
    if (!scratch.data) {
      failed = OUT_OF_MEMORY;
      return;
    }
    for (int i = 0; i < threads; ++i) {
      Run& run = runs[(number + i) % threads];
      for (int64_t task; (task = run.next++) < run.end;) work(task, scratch.data);
    }
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  member(omp_get_thread_num());
#else
  std::vector<std::thread> team;
  try {
    for (int i = 1; i < threads; ++i) team.emplace_back(member, i);
  } catch (const std::exception&) {  // no more threads to be had: those that are do it
  }
  member(0);
  for (auto& other : team) other.join();
#endif
  return failed;
}

}  // namespace svp

// Tasks over threads: libgomp on Linux (the one torch has mapped), std::thread elsewhere. A task's result never depends
// on which thread runs it.
#pragma once
#include <cstdint>
#include <cstdlib>
#ifndef _OPENMP
#include <atomic>
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
template <typename Work>
int parallel(int64_t tasks, int threads, int64_t floats, Work work) {
  int failed = 0;
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    [[maybe_unused]] const FlushSubnormals flush;
    Scratch scratch(floats);
    if (!scratch.data) return OUT_OF_MEMORY;
    for (int64_t task = 0; task < tasks; ++task) work(task, scratch.data);
    return 0;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    [[maybe_unused]] const FlushSubnormals flush;
    Scratch scratch(floats);
    if (!scratch.data) failed = OUT_OF_MEMORY;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task)
      if (scratch.data) work(task, scratch.data);
  }
#else
  std::atomic<int64_t> next{0};
  std::atomic<int> out{0};
  auto run = [&] {
    [[maybe_unused]] const FlushSubnormals flush;
    Scratch scratch(floats);
    if (!scratch.data) {
      out = OUT_OF_MEMORY;
      return;
    }
    for (int64_t task; (task = next++) < tasks;) work(task, scratch.data);
  };
  std::vector<std::thread> team;
  try {
    for (int i = 1; i < threads; ++i) team.emplace_back(run);
  } catch (const std::exception&) {  // no more threads to be had: those that are do it
  }
  run();
  for (auto& member : team) member.join();
  failed = out;
#endif
  return failed;
}

}  // namespace svp

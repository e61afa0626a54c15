// Work in parallel on the threads that torch computes with: both use the OpenMP runtime that torch has loaded.
#pragma once

#include <omp.h>

#include <cstdint>

namespace heddle {

// So many multiply-adds take about as long as it takes to wake a thread: some 20 microseconds.
constexpr int64_t WORTH_A_THREAD = 1 << 19;

inline int threads_for(int64_t multiply_adds) {
  int64_t wanted = 1 + multiply_adds / WORTH_A_THREAD;
  int most = omp_get_max_threads();
  return wanted < most ? (int)wanted : most;
}

// work(index) for each index below `count`; the next free thread takes the next one.
template <class Work>
void for_each(int64_t count, int threads, const Work& work) {
  if (threads <= 1 || count <= 1) {
    for (int64_t index = 0; index < count; ++index) work(index);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t index = 0; index < count; ++index) work(index);
}

}  // namespace heddle

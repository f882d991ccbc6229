// Runs a function for every layer of a model on several threads.
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "placement.h"

namespace deepkern {

void for_each_layer(int64_t layers, int threads, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  auto run_layers = [&] {
    try {
      for (int64_t layer; (layer = next++) < layers;) work(layer);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex);
      failure = std::current_exception();
    }
  };
  const int64_t cores = std::thread::hardware_concurrency();
  const int64_t num_threads = std::min(layers, threads > 0 ? threads : std::max<int64_t>(1, cores));
  std::vector<std::thread> workers;  // in addition to this thread
  try {
    while (static_cast<int64_t>(workers.size()) + 1 < num_threads) workers.emplace_back(run_layers);
  } catch (const std::system_error&) {  // the system has no more threads: continue with fewer
  }
  run_layers();
  for (auto& thread : workers) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace deepkern

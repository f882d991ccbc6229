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
  std::mutex failing;
  auto take = [&] {
    try {
      for (int64_t layer; (layer = next++) < layers;) work(layer);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failing);
      failure = std::current_exception();
    }
  };
  const int64_t cores = std::thread::hardware_concurrency();
  const int64_t wanted = std::min(layers, threads > 0 ? threads : std::max<int64_t>(1, cores));
  std::vector<std::thread> others;
  try {
    while (static_cast<int64_t>(others.size()) + 1 < wanted) others.emplace_back(take);
  } catch (const std::system_error&) {  // No more threads to be had: those there are do the work.
  }
  take();
  for (auto& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace deepkern

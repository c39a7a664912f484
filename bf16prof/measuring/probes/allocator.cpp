// A c10 allocator that counts: it wraps the CPU allocator that is installed when `bf16prof_install` is called, and passes every
// request on to it. It sees each tensor of each thread, which the profiler's per-thread memory events do not.
//
// Plain C functions, called through ctypes; only c10 headers are needed, so it compiles in seconds.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace {

struct Counts {
  std::mutex mutex;
  std::unordered_map<void*, int64_t> live;
  int64_t current = 0;
  int64_t phase_peak = 0;
  int64_t run_peak = 0;
  int64_t limit = 0; // 0: none
};

// Never destroyed: tensors may be freed while the process exits.
Counts& counts() {
  static Counts* instance = new Counts();
  return *instance;
}

c10::Allocator* wrapped = nullptr;

void release(void* data) {
  {
    Counts& c = counts();
    std::lock_guard<std::mutex> lock(c.mutex);
    const auto block = c.live.find(data);
    if (block != c.live.end()) {
      c.current -= block->second;
      c.live.erase(block);
    }
  }
  wrapped->raw_deallocate(data);
}

class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const auto bytes = static_cast<int64_t>(size);
    Counts& c = counts();
    std::lock_guard<std::mutex> lock(c.mutex);
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        c.limit == 0 || c.current + bytes <= c.limit,
        "CPU out of memory. Tried to allocate ", bytes, " bytes with ", c.current, " allocated of a limit of ", c.limit, ".");
    void* data = wrapped->raw_allocate(size);
    if (data != nullptr) {
      c.live[data] = bytes;
      c.current += bytes;
      c.phase_peak = std::max(c.phase_peak, c.current);
      c.run_peak = std::max(c.run_peak, c.current);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  // Kernels that ask for scratch space without a tensor use the raw interface, so the context must be the data itself.
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* destination, const void* source, std::size_t count) const override {
    default_copy_data(destination, source, count);
  }
};

} // namespace

extern "C" {

void bf16prof_install() {
  if (wrapped == nullptr) {
    wrapped = c10::GetCPUAllocator();
    c10::SetCPUAllocator(new CountingAllocator(), /*priority=*/255);
  }
}

int64_t bf16prof_current() {
  std::lock_guard<std::mutex> lock(counts().mutex);
  return counts().current;
}

int64_t bf16prof_run_peak() {
  std::lock_guard<std::mutex> lock(counts().mutex);
  return counts().run_peak;
}

// The highest since the last call; starts again from what is allocated now.
int64_t bf16prof_take_phase_peak() {
  std::lock_guard<std::mutex> lock(counts().mutex);
  const int64_t peak = counts().phase_peak;
  counts().phase_peak = counts().current;
  return peak;
}

void bf16prof_set_limit(int64_t bytes) {
  std::lock_guard<std::mutex> lock(counts().mutex);
  counts().limit = bytes;
}

} // extern "C"

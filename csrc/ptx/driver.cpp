// Devices, modules and allocations of this machine's libcuda.
//
// Sources: CUDA C++ programming guide, table of compute capabilities; NVIDIA's data sheets of the
// five products. A memory clock is the one that gives the bandwidth in runtime/arch.py.
#include "driver.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

namespace deepkern::ptx {
namespace {

constexpr Device DEVICES[] = {
    {80, "A100 SXM 80GB", 108, 163 << 10, 164 << 10, 2048, 32, 1410000, 1593000, 5120, 40 << 20, 1},
    {89, "L40S", 142, 99 << 10, 100 << 10, 1536, 24, 2520000, 9000000, 384, 96 << 20, 1},
    {90, "H200 SXM", 132, 227 << 10, 228 << 10, 2048, 32, 1980000, 3125000, 6144, 50 << 20, 16},
    {100, "B200", 148, 227 << 10, 228 << 10, 2048, 32, 1965000, 3906250, 8192, 126 << 20, 16},
    {120, "RTX 5090", 170, 99 << 10, 100 << 10, 1536, 24, 2407000, 14000000, 512, 96 << 20, 8},
};
constexpr int NEWEST_PTX = 9;  // major version

thread_local std::string message;

struct Header {
  int version_major = 0, version_minor = 0;
  int capability = 0;
  char suffix = 0;  // 'a', 'f' or 0
};

const char* skip_blank(const char* p) {
  while (*p) {
    if (std::isspace(static_cast<unsigned char>(*p))) {
      ++p;
    } else if (p[0] == '/' && p[1] == '/') {
      while (*p && *p != '\n') ++p;
    } else if (p[0] == '/' && p[1] == '*') {
      const char* end = std::strstr(p + 2, "*/");
      if (!end) return p + std::strlen(p);
      p = end + 2;
    } else {
      break;
    }
  }
  return p;
}

// Reads `.version X.Y` and `.target sm_NNx`, which open every PTX text.
bool read_header(const char* text, Header& header) {
  const char* p = skip_blank(text);
  if (std::strncmp(p, ".version", 8) != 0) return false;
  char* end;
  p = skip_blank(p + 8);
  header.version_major = static_cast<int>(std::strtol(p, &end, 10));
  if (end == p || *end != '.') return false;
  p = end + 1;
  header.version_minor = static_cast<int>(std::strtol(p, &end, 10));
  if (end == p) return false;
  p = skip_blank(end);
  if (std::strncmp(p, ".target", 7) != 0) return false;
  p = skip_blank(p + 7);
  if (std::strncmp(p, "sm_", 3) != 0) return false;
  header.capability = static_cast<int>(std::strtol(p + 3, &end, 10));
  header.suffix = *end == 'a' || *end == 'f' ? *end : 0;
  return end != p + 3;
}

bool runs_on(const Header& header, int capability) {
  if (header.suffix == 'a') return header.capability == capability;
  bool same_family = header.capability / 10 == capability / 10;
  return header.capability <= capability && (header.suffix != 'f' || same_family);
}

CUresult check_image(const char* image, int capability) {
  const char* api = "cuModuleLoadData";
  static const char ELF[4] = {0x7f, 'E', 'L', 'F'};
  static const char FATBIN[4] = {0x50, static_cast<char>(0xed), 0x55, static_cast<char>(0xba)};
  if (!image) return refuse(CUDA_ERROR_INVALID_VALUE, api, "no image");
  // strncmp, because the text may be shorter than four bytes.
  if (!std::strncmp(image, ELF, 4) || !std::strncmp(image, FATBIN, 4)) {
    return refuse(CUDA_ERROR_INVALID_IMAGE, api, "a cubin or fatbin; this machine executes PTX");
  }
  Header header;
  if (!read_header(image, header)) {
    return refuse(CUDA_ERROR_INVALID_IMAGE, api,
                  "not PTX: expected .version X.Y and .target sm_N at the start");
  }
  std::string version =
      std::to_string(header.version_major) + "." + std::to_string(header.version_minor);
  if (header.version_major < 1 || header.version_major > NEWEST_PTX) {
    return refuse(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, api, "PTX " + version);
  }
  if (!runs_on(header, capability)) {
    std::string suffix = header.suffix ? std::string(1, header.suffix) : "";
    return refuse(CUDA_ERROR_INVALID_PTX, api,
                  "PTX for sm_" + std::to_string(header.capability) + suffix +
                      ", but the device is sm_" + std::to_string(capability));
  }
  return CUDA_SUCCESS;
}

}  // namespace

int Function::max_threads() const {
  int required = kernel->required_threads[0] * std::max(kernel->required_threads[1], 1) *
                 std::max(kernel->required_threads[2], 1);
  if (required > 0) return required;
  return kernel->max_threads > 0 ? std::min(kernel->max_threads, 1024) : 1024;
}

Driver& Driver::get() {
  static Driver driver;
  return driver;
}

bool Driver::set_target(int capability) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Device& device : DEVICES) {
    if (device.capability == capability) {
      device_ = &device;
      return true;
    }
  }
  return false;
}

const Device& Driver::device() {
  std::lock_guard<std::mutex> lock(mutex_);
  return device_ ? *device_ : DEVICES[2];
}

Options Driver::options() {
  std::lock_guard<std::mutex> lock(mutex_);
  return options_;
}

void Driver::set_options(const Options& options) {
  std::lock_guard<std::mutex> lock(mutex_);
  options_ = options;
}

uint64_t Driver::add_allocation(uint64_t address, uint64_t bytes, const char* name) {
  std::lock_guard<std::mutex> lock(mutex_);
  registered_.push_back({next_id_, {address, bytes, name ? name : ""}});
  return next_id_++;
}

bool Driver::remove_allocation(uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = registered_.size(); i-- > 0;) {
    if (registered_[i].id == id) {
      registered_.erase(registered_.begin() + static_cast<ptrdiff_t>(i));
      return true;
    }
  }
  return false;
}

bool Driver::find_allocation(uint64_t address, Allocation& found) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Registered& registered : registered_) {
    const Allocation& a = registered.allocation;
    // An empty tensor in the middle of a storage has an address as well.
    if (address - a.address < std::max<uint64_t>(a.bytes, 1)) {
      found = a;
      return true;
    }
  }
  return false;
}

std::vector<Allocation> Driver::allocations() {
  std::vector<Allocation> result;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Registered& registered : registered_) {
      if (registered.allocation.bytes > 0) result.push_back(registered.allocation);
    }
  }
  std::stable_sort(result.begin(), result.end(), [](const Allocation& a, const Allocation& b) {
    return a.address != b.address ? a.address < b.address : a.bytes < b.bytes;
  });
  auto same = [](const Allocation& a, const Allocation& b) {
    return a.address == b.address && a.bytes == b.bytes;
  };
  result.erase(std::unique(result.begin(), result.end(), same), result.end());
  return result;
}

CUresult Driver::load(const char* image, CUmodule* module) {
  int capability = device().capability;
  CUresult checked = check_image(image, capability);
  if (checked != CUDA_SUCCESS) return checked;
  auto loaded = std::make_unique<LoadedModule>();
  loaded->capability = capability;
  try {
    loaded->module = read_module(image);
    for (auto& [name, kernel] : loaded->module->kernels) {
      bind_kernel(*kernel, *loaded->module);
      auto function = std::make_unique<Function>();
      function->owner = loaded.get();
      function->module = loaded->module;
      function->kernel = kernel;
      function->max_dynamic_shared =
          std::max(SHARED_WITHOUT_ATTRIBUTE - kernel->static_shared_bytes, 0);
      loaded->functions.push_back(std::move(function));
    }
  } catch (const InvalidProgram& error) {
    return refuse(CUDA_ERROR_INVALID_PTX, "cuModuleLoadData", error.what());
  }
  *module = reinterpret_cast<CUmodule>(loaded.get());
  std::lock_guard<std::mutex> lock(mutex_);
  modules_.push_back(std::move(loaded));
  return CUDA_SUCCESS;
}

CUresult Driver::unload(CUmodule module) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = modules_.begin(); it != modules_.end(); ++it) {
    if (reinterpret_cast<CUmodule>(it->get()) == module) {
      modules_.erase(it);
      return CUDA_SUCCESS;
    }
  }
  return refuse(CUDA_ERROR_INVALID_HANDLE, "cuModuleUnload", "no such module");
}

CUresult Driver::find_function(CUmodule module, const char* name, CUfunction* function) {
  const char* api = "cuModuleGetFunction";
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& loaded : modules_) {
    if (reinterpret_cast<CUmodule>(loaded.get()) != module) continue;
    for (auto& candidate : loaded->functions) {
      if (candidate->kernel->name == name) {
        *function = reinterpret_cast<CUfunction>(candidate.get());
        return CUDA_SUCCESS;
      }
    }
    return refuse(CUDA_ERROR_NOT_FOUND, api, std::string("no kernel ") + name + " in the module");
  }
  return refuse(CUDA_ERROR_INVALID_HANDLE, api, "no such module");
}

Function* Driver::function(CUfunction handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& loaded : modules_) {
    for (auto& function : loaded->functions) {
      if (reinterpret_cast<CUfunction>(function.get()) == handle) return function.get();
    }
  }
  return nullptr;
}

const char* error_name(CUresult code) {
  switch (code) {
    case CUDA_SUCCESS:
      return "CUDA_SUCCESS";
    case CUDA_ERROR_INVALID_VALUE:
      return "CUDA_ERROR_INVALID_VALUE";
    case CUDA_ERROR_INVALID_DEVICE:
      return "CUDA_ERROR_INVALID_DEVICE";
    case CUDA_ERROR_INVALID_IMAGE:
      return "CUDA_ERROR_INVALID_IMAGE";
    case CUDA_ERROR_INVALID_CONTEXT:
      return "CUDA_ERROR_INVALID_CONTEXT";
    case CUDA_ERROR_UNSUPPORTED_LIMIT:
      return "CUDA_ERROR_UNSUPPORTED_LIMIT";
    case CUDA_ERROR_INVALID_PTX:
      return "CUDA_ERROR_INVALID_PTX";
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
      return "CUDA_ERROR_UNSUPPORTED_PTX_VERSION";
    case CUDA_ERROR_INVALID_HANDLE:
      return "CUDA_ERROR_INVALID_HANDLE";
    case CUDA_ERROR_NOT_FOUND:
      return "CUDA_ERROR_NOT_FOUND";
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
      return "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES";
    case CUDA_ERROR_LAUNCH_FAILED:
      return "CUDA_ERROR_LAUNCH_FAILED";
    case CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE:
      return "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE";
    case CUDA_ERROR_NOT_SUPPORTED:
      return "CUDA_ERROR_NOT_SUPPORTED";
    case CUDA_ERROR_INVALID_CLUSTER_SIZE:
      return "CUDA_ERROR_INVALID_CLUSTER_SIZE";
    default:
      return "CUDA_ERROR_UNKNOWN";
  }
}

CUresult refuse(CUresult code, const char* function, const std::string& reason) {
  return fail(code, std::string(function) + ": " + error_name(code) + ": " + reason);
}

CUresult fail(CUresult code, const std::string& text) {
  message = text;
  return code;
}

const std::string& last_message() { return message; }
void clear_message() { message.clear(); }

}  // namespace deepkern::ptx

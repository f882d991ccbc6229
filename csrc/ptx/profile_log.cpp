// The profiles of finished launches as JSON, for runtime/ptx_library.py.
#include <algorithm>

#include "profile.h"

namespace deepkern::ptx {

namespace {

// By the value of Class.
constexpr const char* CLASSES[] = {"integer", "float",       "half",    "special",    "convert",
                                   "move",    "predicate",   "shuffle", "branch",     "global",
                                   "shared",  "matrix_move", "atomic",  "async_copy", "tensor_core",
                                   "barrier", "other"};
static_assert(sizeof(CLASSES) / sizeof(CLASSES[0]) == size_t(Class::COUNT));

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 32 ? ' ' : c;
  }
  return result + '"';
}

std::string list(std::initializer_list<uint64_t> values) {
  std::string result = "[";
  for (uint64_t value : values) result += (result.size() > 1 ? "," : "") + std::to_string(value);
  return result + "]";
}

std::string of_three(const uint32_t* n) { return list({n[0], n[1], n[2]}); }

// [PTX line, location, class, opcode, then the fields of Counts in their order].
std::string statement(const Statement& s, Class kind, const Counts& c) {
  std::string counts = list(
      {c.issued, c.warps, c.lanes, c.bytes, c.sectors, c.wavefronts, c.least_wavefronts, c.flops});
  return "[" + std::to_string(s.line) + "," + std::to_string(s.location) + ",\"" +
         CLASSES[size_t(kind)] + "\"," + quoted(s.text()) + "," + counts.substr(1);
}

std::string blocks_of(const Profile& profile, uint32_t cluster_blocks) {
  uint64_t ran = 0, sum = 0, most = 0, least = UINT64_MAX;
  for (uint64_t n : profile.blocks) {
    if (n == 0) continue;  // every block that runs issues its ret
    ran++;
    sum += n;
    most = std::max(most, n);
    least = std::min(least, n);
  }
  return "{\"ran\":" + std::to_string(ran) + ",\"of\":" + std::to_string(profile.blocks.size()) +
         ",\"in_cluster\":" + std::to_string(cluster_blocks) +
         ",\"issued\":" + std::to_string(sum) + ",\"least\":" + std::to_string(ran ? least : 0) +
         ",\"most\":" + std::to_string(most) + "}";
}

}  // namespace

ProfileLog& ProfileLog::get() {
  static ProfileLog log;
  return log;
}

void ProfileLog::turn_on(uint32_t every) {
  std::lock_guard<std::mutex> lock(mutex_);
  every_ = every;
}

std::unique_ptr<Profile> ProfileLog::start(const Kernel& kernel, const LaunchConfig& config) {
  std::lock_guard<std::mutex> lock(mutex_);
  return every_ ? std::make_unique<Profile>(kernel, config, every_) : nullptr;
}

void ProfileLog::keep(std::shared_ptr<Kernel> kernel, const LaunchConfig& config,
                      const Profile& profile) {
  const uint32_t* cluster = config.cluster;
  std::string text = "{\"kernel\":" + quoted(kernel->name) + ",\"grid\":" + of_three(config.grid) +
                     ",\"block\":" + of_three(config.block) + ",\"cluster\":" + of_three(cluster) +
                     ",\"static_shared\":" + std::to_string(kernel->static_shared_bytes) +
                     ",\"dynamic_shared\":" + std::to_string(config.dynamic_shared_bytes) +
                     ",\"sectors_read\":" + std::to_string(profile.touched.read()) +
                     ",\"sectors_written\":" + std::to_string(profile.touched.written()) +
                     ",\"blocks\":" + blocks_of(profile, cluster[0] * cluster[1] * cluster[2]);
  text += ",\"locations\":[";
  for (size_t k = 0; k < kernel->locations.size(); k++) {
    const Location& at = kernel->locations[k];
    text += (k ? ",[" : "[") + quoted(at.text) + "," + quoted(at.file) + "," +
            std::to_string(at.line) + "]";
  }
  text += "],\"statements\":[";
  bool first = true;
  for (const Instruction& i : kernel->instructions) {
    const Counts& c = profile.statements[i.statement];
    if (!c.issued) continue;
    text += (first ? "" : ",") + statement(kernel->statements[i.statement], i.kind, c);
    first = false;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  launches_.push_back(text + "]}");
}

std::string ProfileLog::take() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string text = "[";
  for (const std::string& launch : launches_) text += (text.size() > 1 ? ",\n" : "") + launch;
  launches_.clear();
  return text + "]";
}

}  // namespace deepkern::ptx

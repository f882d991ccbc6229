// Sectors and bank conflicts of one access by a warp.
// Source: CUDA C++ programming guide, performance guidelines (32-byte sectors, 32 banks of 4
// bytes).
#include "profile.h"

#include <algorithm>

namespace deepkern::ptx {

namespace {

constexpr uint64_t SECTOR = 32;

// Whether a copy's destination is global memory: the first state space of its opcode.
bool copies_to_global(const Statement& s) {
  for (const std::string& word : s.opcode) {
    if (word == "global") return true;
    if (word.rfind("shared", 0) == 0) return false;
  }
  return false;
}

}  // namespace

void Sectors::add(uint64_t sector, bool read, bool write) {
  auto& bits = pages_[sector / 128];
  uint64_t bit = uint64_t(1) << sector % 64;
  size_t word = sector / 64 % 2;
  if (read) bits[word] |= bit;
  if (write) bits[2 + word] |= bit;
}

uint64_t Sectors::count(int first) const {
  uint64_t total = 0;
  for (auto& [page, bits] : pages_)
    total += __builtin_popcountll(bits[first]) + __builtin_popcountll(bits[first + 1]);
  return total;
}

Profile::Profile(const Kernel& kernel, const LaunchConfig& config, uint32_t every)
    : statements(kernel.statements.size()),
      blocks(size_t(config.grid[0]) * config.grid[1] * config.grid[2]),
      every(every) {
  for (const Statement& s : kernel.statements) {
    const std::string& name = s.opcode[0];
    bool copy = name == "cp", to_global = copy && copies_to_global(s);
    reads_.push_back(name == "ld" || name == "atom" || (copy && !to_global));
    writes_.push_back(name == "st" || name == "red" || name == "atom" || to_global);
  }
}

void Profile::count_global(const Instruction& i, const std::vector<uint64_t>& addresses,
                           uint32_t bytes) {
  std::vector<uint64_t> sectors;
  for (uint64_t address : addresses)
    for (uint64_t s = address / SECTOR; s <= (address + bytes - 1) / SECTOR; s++)
      if (sectors.empty() || sectors.back() != s) sectors.push_back(s);
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  Counts& c = statements[i.statement];
  c.sectors += sectors.size();
  c.bytes += addresses.size() * bytes;
  for (uint64_t s : sectors) touched.add(s, reads_[i.statement], writes_[i.statement]);
}

void Profile::count_copy(const Instruction& i, uint64_t address, uint64_t bytes) {
  if (bytes == 0) return;
  uint64_t first = address / SECTOR, last = (address + bytes - 1) / SECTOR;
  statements[i.statement].sectors += last - first + 1;
  for (uint64_t s = first; s <= last; s++)
    touched.add(s, reads_[i.statement], writes_[i.statement]);
}

// An access of 8 bytes per lane is served in two halves of the warp, one of 16 bytes in quarters.
void Profile::count_shared(const Instruction& i, const std::vector<uint64_t>& addresses,
                           uint32_t bytes) {
  size_t group = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  Counts& c = statements[i.statement];
  for (size_t begin = 0; begin < addresses.size(); begin += group) {
    std::vector<uint64_t> words;
    for (size_t k = begin; k < std::min(begin + group, addresses.size()); k++)
      for (uint64_t w = addresses[k] / 4; w <= (addresses[k] + bytes - 1) / 4; w++)
        words.push_back(w);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int banks[32] = {};
    for (uint64_t w : words) banks[w % 32]++;
    c.wavefronts += *std::max_element(banks, banks + 32);
    c.least_wavefronts += (words.size() + 31) / 32;
  }
  c.bytes += addresses.size() * bytes;
}

}  // namespace deepkern::ptx

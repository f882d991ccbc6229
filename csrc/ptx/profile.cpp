// Sectors and bank conflicts of one access by a warp.
// Source: CUDA C++ programming guide, performance guidelines (32-byte sectors, 32 banks of 4 bytes).
#include "profile.h"

#include <algorithm>

namespace deepkern::ptx {

void Profile::count_global(const Instruction& i, const std::vector<uint64_t>& addresses,
                           uint32_t bytes) {
  std::vector<uint64_t> sectors;
  for (uint64_t address : addresses)
    for (uint64_t s = address / 32; s <= (address + bytes - 1) / 32; s++) sectors.push_back(s);
  std::sort(sectors.begin(), sectors.end());
  Counts& c = statements[i.statement];
  c.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  c.bytes += addresses.size() * bytes;
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

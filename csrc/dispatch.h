// Which kernel serves which problem: the one table. Plain C++, so that it runs without a GPU.
#pragma once

#include <string>
#include <string_view>

#include "problem.h"
#include "simt/config.h"
#include "sm90/config.h"

namespace flatquant {

// What the table is asked. compute_capability is 10 * major + minor.
struct Query {
  int compute_capability;
  Dtype dtype;
  int rows, cols;
};

struct KernelEntry {
  std::string_view name;
  bool (*serves)(const Query&);
};

// Best first: "auto" takes the first that serves the problem.
inline constexpr KernelEntry kernel_table[] = {
    {"sm90",
     [](const Query& q) {
       return q.compute_capability == 90 && q.dtype != Dtype::float32 &&
              sm90::serves(q.rows, q.cols);
     }},
    {"simt",
     [](const Query& q) { return q.compute_capability >= 60 && simt::serves(q.rows, q.cols); }},
};

// Names of the kernels that serve the problem, best first, comma-separated.
inline std::string kernel_names(const Query& query) {
  std::string names;
  for (const KernelEntry& kernel : kernel_table) {
    if (!kernel.serves(query)) continue;
    if (!names.empty()) names += ',';
    names += kernel.name;
  }
  return names;
}

// Whether a binary built for `architectures` ("80;90a;120+PTX") has code for the device: a number
// covers its own major version from that minor version on, a number with 'a' only itself, +PTX
// everything later.
constexpr bool covers(std::string_view architectures, int compute_capability) {
  while (!architectures.empty()) {
    const std::string_view entry = architectures.substr(0, architectures.find(';'));
    architectures.remove_prefix(entry.size() < architectures.size() ? entry.size() + 1
                                                                    : architectures.size());
    int number = 0;
    size_t digits = 0;
    while (digits < entry.size() && entry[digits] >= '0' && entry[digits] <= '9') {
      number = 10 * number + (entry[digits++] - '0');
    }
    const std::string_view suffix = entry.substr(digits);
    const bool same_major = compute_capability / 10 == number / 10 && compute_capability >= number;
    if (suffix == "a" ? compute_capability == number : same_major) return true;
    if (suffix == "+PTX" && compute_capability >= number) return true;
  }
  return false;
}

}  // namespace flatquant

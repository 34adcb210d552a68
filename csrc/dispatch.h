// Which kernel serves which problem: the one table. Plain C++, so that it runs without a GPU.
#pragma once

#include <string>
#include <string_view>

#include "problem.h"
#include "simt/config.h"
#include "sm80/config.h"
#include "sm90/config.h"

namespace flatquant {

// What the table is asked. compute_capability is 10 * major + minor; architectures is what the
// binary was built for, such as "80;90a;120+PTX". rows and cols are 0 where there is no transform.
struct Query {
  int compute_capability;
  std::string_view architectures;
  Dtype dtype;
  Precision precision;  // of float32
  int rows, cols;
};

// Whether any entry of `architectures` from `oldest` on has code for the device: a number covers
// its own major version from that minor version on, a number with a letter only itself, +PTX
// everything later.
constexpr bool covers(std::string_view architectures, int compute_capability,
                      bool only_specific = false, int oldest = 0) {
  while (!architectures.empty()) {
    std::string_view entry = architectures.substr(0, architectures.find(';'));
    architectures.remove_prefix(entry.size() < architectures.size() ? entry.size() + 1
                                                                    : architectures.size());
    const size_t plus = entry.find('+');
    const bool has_ptx = plus != std::string_view::npos;
    entry = entry.substr(0, plus);
    int number = 0;
    bool is_specific = false;
    for (const char c : entry) {
      if (c >= '0' && c <= '9') {
        number = 10 * number + (c - '0');
      } else if (c == 'a') {
        is_specific = true;
      }
    }
    if (number < oldest) continue;
    if (is_specific && compute_capability == number) return true;
    if (only_specific) continue;
    const bool later = compute_capability >= number;
    if (!is_specific && later && compute_capability / 10 == number / 10) return true;
    if (has_ptx && later) return true;
  }
  return false;
}

// Bytes of shared memory that a block may have, from 8.0 on, by the CUDA programming guide.
constexpr int shared_limit(int compute_capability) {
  const int major = compute_capability / 10;
  if (compute_capability == 80 || compute_capability == 87) return 163 * 1024;
  return (major >= 9 && major <= 11 ? 227 : 99) * 1024;
}

// Whether TF32 on mma.sync is faster than float32 on CUDA cores. At Precision::highest a product
// takes three of TF32, which pays where tensor cores have several times the rate, as in A100, H100
// and, not measured, B200; those of GeForce have once to twice (NVIDIA's whitepapers on GA102,
// AD102 and GB202). Of Orin and Thor it is not known.
constexpr bool gains_by_tf32(const Query& q) {
  const int major = q.compute_capability / 10;
  return q.precision == Precision::high || q.compute_capability == 80 || major == 9 || major == 10;
}

struct KernelEntry {
  std::string_view name;
  bool (*serves)(const Query&);
};

// Best first: "auto" takes the first that serves the problem.
inline constexpr KernelEntry kernel_table[] = {
    {"sm90",  // in binaries with code for 90a alone: elsewhere it is compiled empty
     [](const Query& q) {
       return q.compute_capability == 90 && covers(q.architectures, 90, true) &&
              sm90::serves(q.dtype, q.rows, q.cols);
     }},
    {"sm80",  // compiled empty for architectures before 80
     [](const Query& q) {
       return q.compute_capability >= 80 &&
              covers(q.architectures, q.compute_capability, false, 80) &&
              sm80::serves(q.rows, q.cols, q.dtype == Dtype::float32 ? 4 : 2,
                           shared_limit(q.compute_capability)) &&
              (q.dtype != Dtype::float32 || gains_by_tf32(q));
     }},
    {"simt",
     [](const Query& q) {
       return q.compute_capability >= 60 && covers(q.architectures, q.compute_capability) &&
              simt::serves(q.rows, q.cols);
     }},
    {"plain",  // only quantises
     [](const Query& q) {
       return q.compute_capability >= 60 && covers(q.architectures, q.compute_capability) &&
              q.rows == 0 && q.cols == 0;
     }},
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

// What to say where covers() is false: "built for sm_80;sm_90a, this GPU is sm_75: ...".
inline std::string not_covered(const Query& query) {
  std::string built;
  for (const char c : query.architectures) built += c == ';' ? ";sm_" : std::string(1, c);
  const std::string capability = std::to_string(query.compute_capability);
  return "built for sm_" + built + ", this GPU is sm_" + capability +
         ": rebuild with FLATQUANT_CUDA_ARCHS=" + capability;
}

}  // namespace flatquant

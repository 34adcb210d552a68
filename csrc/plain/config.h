// How the plain kernel shares tokens out to threads, and the arithmetic of it. Plain C++.
#pragma once

#include <cstdint>

#include "integers.h"

namespace flatquant::plain {

// A thread holds up to 128 bytes of a token in 32 of its 64 registers: the 1024 threads that an SM
// then has room for keep 128 KiB on the way from memory, twice what covers its latency. Much of
// the time some are not loading but quantising.
constexpr int thread_bytes = 128;
constexpr int max_threads = 512;  // of 64 registers, two such blocks an SM
constexpr int usual_threads = 128;

// So few tokens leave SMs idle: more threads then get less of a token each.
constexpr int64_t few_tokens = 256;

// Of a >= 1, which may be close to the largest int.
constexpr int divide_up(int a, int b) { return (a - 1) / b + 1; }

// Octets, eight neighbouring elements, that a thread holds at once.
constexpr int thread_octets(int element_size) { return thread_bytes / (8 * element_size); }

// A block works on one token, or each of its warps on one. How a problem is shared out changes no
// bit of the result.
struct Plan {
  int tokens = 0;         // of a block
  int token_threads = 0;  // of a token, whole warps
  int chunks = 0;         // that a token is cut into, of what its threads hold at once

  constexpr Plan(int features, int64_t all_tokens, int element_size) {
    const int share = all_tokens <= few_tokens ? 1 : thread_octets(element_size);
    const int wanted = divide_up(divide_up(features, 8), share);
    token_threads = smaller(divide_up(wanted, 32) * 32, max_threads);
    chunks = divide_up(features, 8 * thread_octets(element_size) * token_threads);
    tokens = token_threads == 32 ? usual_threads / 32 : 1;
  }

  // A place for the extremes of each of a token's warps.
  constexpr int shared_bytes() const { return token_threads / 32 * 8; }
};

}  // namespace flatquant::plain

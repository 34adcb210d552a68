// Integer arithmetic of the kernels' plans. Plain C++.
#pragma once

namespace flatquant {

constexpr int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }
constexpr int round_up(int value, int multiple) { return divide_up(value, multiple) * multiple; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }

}  // namespace flatquant

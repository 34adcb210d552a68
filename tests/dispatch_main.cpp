// Answers of csrc/dispatch.h for the questions on standard input, a line each:
//   capability architectures dtype rows cols   ->   the kernels, comma-separated, or "-"
#include <iostream>
#include <string>

#include "dispatch.h"

int main() {
  int capability, dtype, rows, cols;
  std::string architectures;
  while (std::cin >> capability >> architectures >> dtype >> rows >> cols) {
    const std::string names = flatquant::kernel_names(
        {capability, architectures, static_cast<flatquant::Dtype>(dtype), rows, cols});
    std::cout << (names.empty() ? "-" : names) << '\n';
  }
}

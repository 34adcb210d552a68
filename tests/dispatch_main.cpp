// Answers of csrc/dispatch.h for the questions on standard input, a line each:
//   capability architectures dtype precision rows cols   ->   the kernels, comma-separated, or what
//   is said where the architectures do not cover the device, or "-"
#include <iostream>
#include <string>

#include "dispatch.h"

int main() {
  int capability, dtype, precision, rows, cols;
  std::string architectures;
  while (std::cin >> capability >> architectures >> dtype >> precision >> rows >> cols) {
    const flatquant::Query query{capability,
                                 architectures,
                                 static_cast<flatquant::Dtype>(dtype),
                                 static_cast<flatquant::Precision>(precision),
                                 rows,
                                 cols};
    const std::string names = flatquant::kernel_names(query);
    const bool covered = flatquant::covers(architectures, capability);
    std::cout << (!names.empty() ? names : covered ? "-" : flatquant::not_covered(query)) << '\n';
  }
}

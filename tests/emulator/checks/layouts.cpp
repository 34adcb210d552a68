// Compares the shared-memory layouts and wgmma descriptors of csrc/sm90 with CuTe's, on the host:
// Panel::offset with the tiled GMMA atoms, wgmma_descriptor and its advance with make_gmma_desc.
// The descriptors of csrc/sm90/hopper.cuh are compared, and those of the emulator with them.
#include "../cuda_emulator.h"
// CuTe's shared-memory addresses, on the host too.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return emulator::shared_address(pointer);
}
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "../descriptor.h"
#include "sm90/config.h"
#include "sm90/hopper.cuh"
#include "sm90/transposed.cuh"

using namespace cute;
using namespace flatquant::sm90;
namespace gmma = cute::SM90::GMMA;

static int compared = 0, wrong = 0;

static void expect_equal(uint64_t ours, uint64_t theirs, const char* what, int cols, int depth,
                         int position) {
  ++compared;
  if (ours == theirs) return;
  if (++wrong <= 20) {
    std::printf("%s, %d columns, depth %d, at %d: %#llx, CuTe has %#llx\n", what, cols, depth,
                position, static_cast<unsigned long long>(ours),
                static_cast<unsigned long long>(theirs));
  }
}

template <int width>
struct Atom;
template <>
struct Atom<16> {
  using type = gmma::Layout_MN_SW32_Atom<half_t>;
};
template <>
struct Atom<32> {
  using type = gmma::Layout_MN_SW64_Atom<half_t>;
};
template <>
struct Atom<64> {
  using type = gmma::Layout_MN_SW128_Atom<half_t>;
};

// A matrix of `depth` k-rows and `cols` columns in panels of `width`, of which one wgmma takes
// tiles of `tile_cols` x 16.
template <int width, int cols, int tile_cols, int depth>
void check_matrix() {
  emulator::SharedMemory& memory = emulator::machine().shared();
  memory.reset(cols * depth * 2);
  auto* base = reinterpret_cast<half_t*>(memory.dynamic());
  const auto layout =
      tile_to_shape(typename Atom<width>::type(), Shape<Int<cols>, Int<depth>>(), Step<_2, _1>());
  const auto matrix = make_tensor(make_smem_ptr(base), layout);
  for (int k = 0; k < depth; ++k) {
    for (int col = 0; col < cols; ++col) {
      expect_equal(Panel::offset(width, depth, k, col), &matrix(col, k) - base, "Panel::offset",
                   cols, depth, k * cols + col);
    }
  }

  // A tile of one panel has no stride between panels; CuTe then leaves the field 0.
  constexpr uint64_t fields = tile_cols == width ? ~uint64_t(0x3fff0000) : ~uint64_t(0);
  constexpr int panel_stride = depth * width * 2;
  for_each(make_int_sequence<cols / tile_cols>(), [&](auto tile) {
    // Each step is a type of CuTe's, and costs compile time: the first and the last.
    for_each(std::integer_sequence<int, 0, depth / 16 - 1>(), [&](auto step) {
      const auto part = local_tile(matrix, Shape<Int<tile_cols>, _16>(), make_coord(tile, step));
      const uint64_t cute_descriptor = gmma::make_gmma_desc<gmma::Major::MN>(part);
      const int first = tile * (tile_cols / width) * panel_stride;
      const unsigned char* shared = memory.dynamic() + first;
      const uint64_t descriptor = advance(
          wgmma_descriptor(shared, static_cast<flatquant::sm90::Swizzle>(width * 2), panel_stride),
          step * 16 * width * 2);
      expect_equal(descriptor & fields, cute_descriptor & fields, "wgmma_descriptor", cols, depth,
                   step);
      const emulator::Descriptor ours{emulator::shared_address(shared) + step * 16 * width * 2,
                                      panel_stride, 16 * width, 0, width * 2};
      expect_equal(ours.encode(), descriptor, "emulator's descriptor", cols, depth, step);
    });
  });
}

// A transposed class's token or slice, B of `rows` by k in panels of `width` of `cols` k.
template <class Token>
void check_token_along_k() {
  constexpr int rows = Token::slice_rows, cols = Token::slice_cols, width = Token::width;
  using KAtom = std::conditional_t<width == 64, gmma::Layout_K_SW128_Atom<half_t>,
                                   gmma::Layout_K_SW64_Atom<half_t>>;
  static_assert(width == 64 || width == 32);
  emulator::SharedMemory& memory = emulator::machine().shared();
  memory.reset(rows * cols * 2);
  auto* base = reinterpret_cast<half_t*>(memory.dynamic());
  const auto layout = tile_to_shape(KAtom(), Shape<Int<rows>, Int<cols>>(), Step<_1, _2>());
  const auto matrix = make_tensor(make_smem_ptr(base), layout);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < cols; ++k) {
      expect_equal(Panel::offset(width, rows, row, k), &matrix(row, k) - base, "Panel::offset",
                   cols, rows, row * cols + k);
    }
  }
  // Swizzled, it has no leading dimension: CuTe leaves the field 0.
  constexpr uint64_t fields = ~uint64_t(0x3fff0000);
  const auto descriptors =
      make_tensor<gmma::smem_desc<gmma::Major::K>>(tiled_divide(matrix, Shape<Int<rows>, _16>()));
  const auto swizzle = static_cast<flatquant::sm90::Swizzle>(width * 2);
  const uint64_t first = wgmma_descriptor(base, swizzle, rows * width * 2);
  for (int k = 0; k < cols; k += 16) {
    const uint64_t cute_descriptor = descriptors(0, 0, k / 16);
    const uint64_t descriptor = advance(first, Token::k_bytes(k));
    expect_equal(descriptor & fields, cute_descriptor & fields, "wgmma_descriptor", cols, rows, k);
  }
}

// Every row and column is some accumulator's, at the position where its factor's column is put.
template <int rows, int cols>
void check_transposed_order() {
  using Order = TransposedOrder<rows>;
  for (int i = 0; i < rows / 2; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      const int position = i / 4 * 8 + lane % 4 * 2 + i % 2;
      expect_equal(Order::position_of_row(Order::row(i, lane % 4)), position, "position_of_row",
                   cols, rows, position);
      for (int first = 0; first < cols; first += 16) {
        const int col = Order::column(i, first + lane / 4);
        const int half = i / 2 % 2 * 8;
        expect_equal(Order::position_of_column(col), first + lane / 4 + half, "position_of_column",
                     cols, rows, first);
      }
    }
  }
}

template <int... indices>
void check_classes(std::integer_sequence<int, indices...>) {
  auto check = [](auto index) {
    constexpr ShapeClass shape = shape_classes[index];
    using Class = Config<__half, __half, shape.depth, shape.cols>;
    constexpr int width = Class::width, panel_cols = Class::panel_cols;
    check_matrix<width, panel_cols, panel_cols, shape.cols>();         // right
    check_matrix<width, panel_cols, panel_cols, Class::slice_rows>();  // token, or a slice of it
    check_matrix<64, 64 * shape.row_tiles(), 64, shape.depth>();       // left
    if constexpr (has_ragged(shape)) {
      using Ragged = Config<__half, __half, shape.depth, shape.cols, 1, true>;
      check_matrix<Ragged::b_width, Ragged::b_cols, Ragged::b_cols, shape.cols>();  // right
    }
    if constexpr (is_transposed(shape)) {
      using Transposed = Config<__half, __half, shape.depth, shape.cols, 1, false, true>;
      constexpr int b_width = Transposed::b_width, b_cols = Transposed::b_cols;
      check_matrix<64, Transposed::right_cols, 64, shape.cols>();  // right
      check_matrix<b_width, b_cols, b_cols, shape.depth>();        // left
      check_token_along_k<Transposed>();
      check_transposed_order<shape.depth, shape.cols>();
    }
  };
  (check(std::integral_constant<int, indices>()), ...);
}

int main() {
  check_classes(std::make_integer_sequence<int, shape_class_count>());
  std::printf("%d comparisons, %d wrong\n", compared, wrong);
  return wrong != 0;
}

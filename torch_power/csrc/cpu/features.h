// The feature map φ, its multiplicity-weighted partner ψ, and the gradient through them, one panel of 64 rows at a time.
//
// φ_p(x) is the concatenation over tile tuples I_1 ≤ … ≤ I_p of x[I_1] ⊗ … ⊗ x[I_p] (tiles of T numbers, T^p rows a block);
// ψ_p multiplies each block by how many orderings its tuple has, so that <ψ(q), φ(k)> = <q, k>^p. A panel is 64 / T^p
// consecutive blocks. Its features are made in cache, used by one matrix product, and forgotten: nothing of size D × tokens exists.
#pragma once

#include "vec.h"

namespace power_cpu {
namespace POWER_ISA {

constexpr int64_t kPanelRows = 64;

template <int P> struct Layout;
template <> struct Layout<1> {
  static constexpr int tile = 8, rows = 8;
};
template <> struct Layout<2> {
  static constexpr int tile = 8, rows = 64;
};
template <> struct Layout<3> {
  static constexpr int tile = 4, rows = 64;
};
template <> struct Layout<4> {
  static constexpr int tile = 2, rows = 16;
};

// The blocks of one panel; `first` is the first coordinate of each tile of the tuple.
template <int P> struct Panel {
  static constexpr int kBlocks = int(kPanelRows) / Layout<P>::rows;
  int64_t index;  // of the panel
  int blocks;     // kBlocks but for the last panel
  int first[kBlocks][P];
  int multiplicity[kBlocks];

  int rows() const { return blocks * Layout<P>::rows; }
};

// Walks the panels of a head of size d in order.
template <int P> class PanelWalk {
 public:
  explicit PanelWalk(int64_t d) : tiles_(int(d) / Layout<P>::tile), more_(tiles_ > 0) {}
  bool next(Panel<P> &panel) {
    panel.blocks = 0;
    panel.index = index_++;
    while (more_ && panel.blocks < Panel<P>::kBlocks) {
      int orderings = 1, run = 0;
      for (int m = 0; m < P; ++m) {
        panel.first[panel.blocks][m] = tuple_[m] * Layout<P>::tile;
        run = m > 0 && tuple_[m] == tuple_[m - 1] ? run + 1 : 1;
        orderings = orderings * (m + 1) / run;  // p! / Π m_r!, one factor at a time; exact at every step
      }
      panel.multiplicity[panel.blocks++] = orderings;
      advance();
    }
    return panel.blocks > 0;
  }

 private:
  void advance() {
    int m = P - 1;
    while (m >= 0 && tuple_[m] == tiles_ - 1) --m;
    more_ = m >= 0;
    if (!more_) return;
    int value = tuple_[m] + 1;
    for (; m < P; ++m) tuple_[m] = value;
  }
  int tiles_;
  bool more_;
  int64_t index_ = 0;
  int tuple_[P] = {};
};

template <int P> inline int64_t feature_rows(int64_t d) {
  int64_t tiles = d / Layout<P>::tile, count = 1;
  for (int m = 0; m < P; ++m) count = count * (tiles + m) / (m + 1);
  return count * Layout<P>::rows;
}

// rows[token·64 + row] = φ(x_token)[panel row] (times multiplicities if `weighted`): the A operand of an update, whose sum
// runs over tokens. x is [n, ld], contiguous along coordinates. Rows past the end of the last panel are 0.
template <int P, class T>
inline void features_by_token(const Panel<P> &panel, bool weighted, const T *x, int64_t ld, int64_t n, T *rows) {
  constexpr int tile = Layout<P>::tile, block_rows = Layout<P>::rows;
  typedef T Tile __attribute__((vector_size(tile * sizeof(T))));
  for (int64_t i = 0; i < n; ++i, x += ld, rows += kPanelRows) {
    for (int block = 0; block < panel.blocks; ++block) {
      const int *first = panel.first[block];
      T *out = rows + block * block_rows;
      T prefix[block_rows / tile];
      int size = 1;
      prefix[0] = weighted ? T(panel.multiplicity[block]) : T(1);
#pragma GCC unroll 4
      for (int m = 0; m + 1 < P; ++m) {
        for (int r = size - 1; r >= 0; --r)
          for (int a = tile - 1; a >= 0; --a) prefix[r * tile + a] = prefix[r] * x[first[m] + a];
        size *= tile;
      }
      Tile last;
      memcpy(&last, x + first[P - 1], sizeof last);
#pragma GCC unroll 16
      for (int r = 0; r < block_rows / tile; ++r) {
        Tile product = last * prefix[r];
        memcpy(out + r * tile, &product, sizeof product);
      }
    }
    for (int r = panel.rows(); r < kPanelRows; ++r) rows[r] = 0;
  }
}

// columns[row·ld + token] = the same with tokens contiguous: the A operand of a query, whose sum runs over panel rows.
// x is [d, ldx], contiguous along tokens; n is a multiple of the vector length.
template <int P, class T>
inline void features_by_row(const Panel<P> &panel, bool weighted, const T *x, int64_t ldx, int64_t n, T *columns, int64_t ld) {
  constexpr int tile = Layout<P>::tile, block_rows = Layout<P>::rows, prefixes = block_rows / tile;
  for (int block = 0; block < panel.blocks; ++block) {
    const int *first = panel.first[block];
    T weight = weighted ? T(panel.multiplicity[block]) : T(1);
    T *out = columns + block * block_rows * ld;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      for (int r = 0; r < prefixes; ++r) {
        Vec<T> prefix = broadcast(weight);
        int digits = r;
#pragma GCC unroll 4
        for (int m = P - 2; m >= 0; --m) {
          prefix *= load(x + (first[m] + digits % tile) * ldx + i);
          digits /= tile;
        }
#pragma GCC unroll 8
        for (int a = 0; a < tile; ++a)
          store(out + (r * tile + a) * ld + i, prefix * load(x + (first[P - 1] + a) * ldx + i));
      }
    }
  }
}

// The gradient of <g, x[I_1] ⊗ … ⊗ x[I_p]> with respect to x for one vector of tokens. g is [T^p, ld]; the first tile is
// peeled off: its gradient contracts g with the product of the rest, and what is left is the same problem with p − 1 tiles.
template <int P, int Tile, class T>
POWER_INLINE void block_gradient(const int *first, T weight, const T *g, int64_t ld, const T *x, T *dx, int64_t ldx) {
  if constexpr (P == 1) {
    for (int a = 0; a < Tile; ++a) {
      T *at = dx + (first[0] + a) * ldx;
      store(at, load(at) + load(g + a * ld) * weight);
    }
  } else {
    constexpr int rest = P == 2 ? Tile : P == 3 ? Tile * Tile : Tile * Tile * Tile;
    Vec<T> product[rest];
    T left[rest * kLanes<T>];
    Vec<T> sum[rest];
    for (int r = 0; r < rest; ++r) {
      Vec<T> value = load(x + (first[P - 1] + r % Tile) * ldx);
      int digits = r / Tile;
      for (int m = P - 2; m >= 1; --m) {
        value *= load(x + (first[m] + digits % Tile) * ldx);
        digits /= Tile;
      }
      product[r] = value;
      sum[r] = Vec<T>{};
    }
    for (int a = 0; a < Tile; ++a) {
      Vec<T> xa = load(x + (first[0] + a) * ldx), ga = Vec<T>{};
#pragma GCC unroll 8
      for (int r = 0; r < rest; ++r) {
        Vec<T> gr = load(g + (a * rest + r) * ld);
        ga += gr * product[r];
        sum[r] += gr * xa;
      }
      T *at = dx + (first[0] + a) * ldx;
      store(at, load(at) + ga * weight);
    }
    for (int r = 0; r < rest; ++r) store(left + r * kLanes<T>, sum[r]);
    block_gradient<P - 1, Tile, T>(first + 1, weight, left, kLanes<T>, x, dx, ldx);
  }
}

// dx += gradient of Σ_row g[row]·feature[row](x) for n tokens (a multiple of the vector length); x, dx [d, ldx], g [64, ld].
template <int P, class T>
inline void features_gradient(const Panel<P> &panel, bool weighted, const T *g, int64_t ld, const T *x, T *dx, int64_t ldx,
                              int64_t n) {
  for (int block = 0; block < panel.blocks; ++block)
    for (int64_t i = 0; i < n; i += kLanes<T>)
      block_gradient<P, Layout<P>::tile, T>(panel.first[block], weighted ? T(panel.multiplicity[block]) : T(1),
                                            g + block * Layout<P>::rows * ld + i, ld, x + i, dx + i, ldx);
}

}  // namespace POWER_ISA
}  // namespace power_cpu

// What forward and backward of power attention share: sizes, a block of tokens in cache, gates, states, and the three products
// with a state. Symbols as in the contract: c tokens a chunk, E = e + 1 value columns (the last is 1, its sum the normaliser).
#pragma once

#include "features.h"
#include "gemm.h"

namespace power_cpu {
namespace POWER_ISA {

// Tokens worked on at once. 192 is 12 register tiles; scores, one panel of features and the accumulators of a block then stay
// in a 512 KB level-2 cache, and the O(c) work inside a chunk is a tenth of the work with the state at d = 64, p = 2.
constexpr int64_t kBlockTokens = 192;
constexpr int64_t kScoreRows = 96;  // keys scored at once: 16 (8 with AVX-512) register tiles; 48 cost 5% in reloaded sums

template <class T> struct Sizes {
  const PowerAttentionShape &shape;
  int64_t group;       // query heads a key-value head
  int64_t block;       // tokens of a chunk
  int64_t lanes;       // the same, padded: leading dimension of everything with tokens contiguous
  int64_t d, e, E;     // E = e + 1
  int64_t d_ld, e_ld;  // leading dimensions of packed rows of q, k and of v with its column of ones
  int64_t panels;      // of 64 state rows; 0 in the attention form
  int deg;

  explicit Sizes(const PowerAttentionShape &s) : shape(s) {
    group = s.h_q / s.h_kv;
    block = min64(kBlockTokens, max64(s.form == POWER_ATTENTION ? kBlockTokens : s.chunk_size, 1));
    block = min64(block, max64(max64(s.t, s.t_kv), 1));
    lanes = round_up(block, kTileM<T>);
    d = s.d;
    e = s.e;
    E = e + 1;
    d_ld = round_up(d, kTileM<T>);
    e_ld = round_up(E, kTileM<T>);
    deg = s.deg;
    panels = s.form == POWER_ATTENTION ? 0 : (rows() + kPanelRows - 1) / kPanelRows;
  }
  int64_t rows() const {
    return deg == 1 ? feature_rows<1>(d) : deg == 2 ? feature_rows<2>(d) : deg == 3 ? feature_rows<3>(d) : feature_rows<4>(d);
  }
  int64_t state_size() const { return panels * E * kPanelRows; }
  int64_t blocks(int64_t t) const { return (t + block - 1) / block; }
};

// Running sum of the log gates inside one chunk, as a pair of numbers (a sum of −50s has no digits left for a −0.01), and the
// decays that are at most 1 when gates forget.
template <class T> struct Gates {
  T *high, *low;     // g_i = high + low
  T *since_start;    // exp(g_i)
  T *until_end;      // exp(g_c − g_i)
  double sum;        // g_c
  T decay;           // exp(g_c)
  bool present;

  void reserve(Arena &arena, int64_t lanes) {
    high = arena.take<T>(lanes);
    low = arena.take<T>(lanes);
    since_start = arena.take<T>(lanes);
    until_end = arena.take<T>(lanes);
  }
  // `running` [lanes] is scratch.
  void load(const T *log_g, int64_t stride, int64_t n, int64_t lanes, double *running) {
    present = log_g != nullptr;
    sum = 0;
    decay = 1;
    if (!present) return;
    for (int64_t i = 0; i < n; ++i) {
      sum += double(log_g[i * stride]);
      running[i] = sum;
    }
    for (int64_t i = 0; i < lanes; ++i) {
      double g = i < n ? running[i] : sum;
      high[i] = T(g);
      low[i] = T(g - double(high[i]));
      since_start[i] = T(g);
      until_end[i] = T(sum - g);
    }
    for (int64_t i = 0; i < lanes; i += kLanes<T>) {
      store(since_start + i, exp(POWER_ISA::load(since_start + i)));
      store(until_end + i, exp(POWER_ISA::load(until_end + i)));
    }
    decay = exp_scalar(T(sum));
  }
};

// One block of keys and values: rows, zero past the end; values carry a column of ones.
template <class T> struct KeyBlock {
  T *k, *v;
  void reserve(Arena &arena, const Sizes<T> &z) {
    k = arena.take<T>(z.lanes * z.d_ld);
    v = arena.take<T>(z.lanes * z.e_ld);
  }
  void load(const Sizes<T> &z, const PowerAttentionArrays &a, int64_t b, int64_t h, int64_t start, int64_t n) {
    const T *no_scale = nullptr;
    pack_rows(rows_from(a.k, b, start, h, 1), n, z.d, no_scale, k, z.d_ld, z.lanes);
    pack_rows(rows_from(a.v, b, start, h, 1), n, z.e, no_scale, v, z.e_ld, z.lanes);
    for (int64_t j = 0; j < n; ++j) v[j * z.e_ld + z.e] = 1;
  }
};

// The power of two that brings a positive number into [½, 1); 1 for 0, for infinities and for NaN.
template <class T> inline T power_of_two(T largest) {
  if (!(largest > 0) || largest > T(sizeof(T) == 4 ? 1e38 : 1e300)) return 1;
  if (sizeof(T) == 4) return T(bits_to_float(uint32_t(min64(253 - int64_t(float_to_bits(float(largest)) >> 23), 252)) << 23));
  uint64_t bits;
  double x = double(largest);
  memcpy(&bits, &x, sizeof bits);
  bits = uint64_t(min64(2045 - int64_t(bits >> 52), 2044)) << 52;
  memcpy(&x, &bits, sizeof x);
  return T(x);
}

// What a row of queries, padded with zeros to d_ld, is multiplied by. With normalize = 1, y does not depend on its length: a power of
// two brings the largest coordinate into [½, 1), and `scale` matters only where it is 0.
template <class T> inline T query_factor(const PowerAttentionShape &shape, const T *q, int64_t d_ld) {
  if (!shape.normalize || shape.scale == 0) return T(shape.scale);
  Vec<T> largest = Vec<T>{};
  for (int64_t c = 0; c < d_ld; c += kLanes<T>) {
    Vec<T> x = load(q + c);
    largest = maximum<T>(maximum<T>(x, -x), largest);
  }
  T result = 0;
  for (int64_t c = 0; c < kLanes<T>; ++c) result = largest[c] > result ? largest[c] : result;
  return power_of_two(result);
}

// One block of queries q' = factor·q, as rows and with tokens contiguous.
template <class T> struct QueryBlock {
  T *rows, *columns, *factor;
  void reserve(Arena &arena, const Sizes<T> &z) {
    rows = arena.take<T>(z.lanes * z.d_ld);
    columns = arena.take<T>(z.d_ld * z.lanes);
    factor = arena.take<T>(z.lanes);
  }
  void load(const Sizes<T> &z, const PowerAttentionArrays &a, int64_t b, int64_t h, int64_t start, int64_t n) {
    const T *no_scale = nullptr;
    pack_rows(rows_from(a.q, b, start, h, 1), n, z.d, no_scale, rows, z.d_ld, z.lanes);
    for (int64_t i = 0; i < n; ++i) {
      factor[i] = query_factor(z.shape, rows + i * z.d_ld, z.d_ld);
      for (int64_t c = 0; c < z.d_ld; ++c) rows[i * z.d_ld + c] *= factor[i];
    }
    transpose(rows, z.d_ld, z.lanes, z.d, columns, z.lanes);
  }
};

// The time axis of a key-value head in pieces of whole chunks, for cores that would be idle with one task a head. Each piece costs
// more updates a token (what it adds to a state has to be known before any can start), so none is shorter than 4 chunks.
struct Segments {
  int64_t count, block, chunks, t;
  template <class T> Segments(const Sizes<T> &z, int threads) : block(z.block), chunks(z.blocks(z.shape.t)), t(z.shape.t) {
    int64_t heads = max64(1, z.shape.b * z.shape.h_kv);
    bool few = z.shape.form != POWER_ATTENTION && z.shape.causal && 2 * int64_t(threads) > 3 * heads;
    count = max64(1, few ? min64((threads + heads - 1) / heads, chunks / 4) : 1);
  }
  int64_t start(int64_t segment) const { return min64(chunks * segment / count * block, t); }
  int64_t end(int64_t segment) const { return start(segment + 1); }
};

// exp of the sum of log gates of tokens [from, to); 1 without gates.
template <class T> inline T decay_between(const PowerArray &log_g, int64_t b, int64_t h, int64_t from, int64_t to) {
  const T *x = pointer<T>(log_g, b, 0, h);
  double sum = 0;
  for (int64_t i = from; x && i < to; ++i) sum += double(x[i * log_g.stride[1]]);
  return exp_scalar(T(sum));
}

// ---- The state: panels of 64 rows, each [E, 64] with rows contiguous; the last column is z ------------------------------

template <class T>
inline void load_state(const Sizes<T> &z, const PowerArray &s, const PowerArray &norm, int64_t b, int64_t h, T *state) {
  memset(state, 0, size_t(z.state_size()) * sizeof(T));
  const T *s_in = pointer<T>(s, b, h), *z_in = pointer<T>(norm, b, h);
  for (int64_t row = 0; row < z.rows(); ++row) {
    T *out = state + row / kPanelRows * z.E * kPanelRows + row % kPanelRows;
    if (s_in)
      for (int64_t c = 0; c < z.e; ++c) out[c * kPanelRows] = s_in[row * s.stride[2] + c * s.stride[3]];
    if (z_in) out[z.e * kPanelRows] = z_in[row * norm.stride[2]];
  }
}

template <class T>
inline void store_state(const Sizes<T> &z, const T *state, const PowerArray &s, const PowerArray &norm, int64_t b, int64_t h) {
  T *s_out = pointer<T>(s, b, h), *z_out = pointer<T>(norm, b, h);
  for (int64_t row = 0; row < z.rows(); ++row) {
    const T *in = state + row / kPanelRows * z.E * kPanelRows + row % kPanelRows;
    if (s_out)
      for (int64_t c = 0; c < z.e; ++c) s_out[row * s.stride[2] + c * s.stride[3]] = in[c * kPanelRows];
    if (z_out) z_out[row * norm.stride[2]] = in[z.e * kPanelRows];
  }
}

// state = decay·state + features(x)ᵀ u.  x: rows [n, d_ld]; u: E columns packed in tiles.
template <int P, class T>
inline void update_state(const Sizes<T> &z, bool weighted, T decay, const T *x, int64_t n, const T *u, T *features, T *state) {
  Panel<P> panel;
  for (PanelWalk<P> walk(z.d); walk.next(panel); state += z.E * kPanelRows) {
    features_by_token<P>(panel, weighted, x, z.d_ld, n, features);
    gemm(kPanelRows, z.E, n, features, kPanelRows, packed(u, n), decay, state, kPanelRows);
  }
}

// out[column, token] = <features(x_token), state[:, column]> for the first `columns` columns. x: [d, lanes], out: [columns, lanes].
template <int P, class T>
inline void query_state(const Sizes<T> &z, bool weighted, const T *x, int64_t lanes, const T *state, int64_t columns, T *features,
                        T *out) {
  Panel<P> panel;
  T beta = 0;
  for (PanelWalk<P> walk(z.d); walk.next(panel); state += z.E * kPanelRows, beta = 1) {
    features_by_row<P>(panel, weighted, x, z.lanes, lanes, features, z.lanes);
    gemm(lanes, columns, panel.rows(), features, z.lanes, strided(state, 1, kPanelRows), beta, out, z.lanes);
  }
}

// dx += gradient of Σ_column u[column, token]·<features(x_token), state[:, column]>. x, dx: [d, lanes], u: [E, lanes].
template <int P, class T>
inline void query_gradient(const Sizes<T> &z, bool weighted, const T *u, const T *x, int64_t lanes, const T *state, T *features,
                           T *dx) {
  Panel<P> panel;
  for (PanelWalk<P> walk(z.d); walk.next(panel); state += z.E * kPanelRows)
    for (int64_t i = 0; i < lanes; i += kTileM<T>) {  // a slice of tokens at a time: its 64 feature gradients stay in level 1
      int64_t width = min64(kTileM<T>, lanes - i);
      gemm(width, panel.rows(), z.E, u + i, z.lanes, strided(state, kPanelRows, 1), T(0), features, kTileM<T>);
      features_gradient<P>(panel, weighted, features, kTileM<T>, x + i, dx + i, z.lanes, width);
    }
}

template <int P> struct Degree {
  static constexpr int value = P;
};
template <class F> inline void dispatch_degree(int deg, F f) {
  switch (deg) {
    case 1: return f(Degree<1>());
    case 2: return f(Degree<2>());
    case 3: return f(Degree<3>());
    default: return f(Degree<4>());
  }
}

// ---- Inside a block: scores of one stripe of keys against a block of queries --------------------------------------------

// Query i of the block sees key j of the stripe when i ≥ j + offset. Row j of a stripe is valid from lane `first_lane(j)` on.
struct Visible {
  int64_t offset;
  template <class T> int64_t first_lane(int64_t j) const {
    int64_t first = j / kTileN * kTileN + offset;
    return first <= 0 ? 0 : first / kTileM<T> * kTileM<T>;
  }
  // Keys of the stripe that a tile of queries ending before lane `end` may see.
  int64_t keys(int64_t end, int64_t n) const { return max64(0, min64(n, end - offset)); }
};
constexpr int64_t kSeeAll = -(int64_t(1) << 40);

// out[j, i] = Σ_c a[c, i]·rows[j, c]: all products of a stripe that anybody may see.
template <class T>
inline void stripe_products(const T *columns, int64_t ld, const T *rows, int64_t rows_ld, int64_t depth, int64_t n, int64_t lanes,
                            Visible visible, T *out) {
  for (int64_t j = 0; j < n; j += kTileN) {
    int64_t from = visible.first_lane<T>(j);
    if (from < lanes)
      gemm(lanes - from, min64(kTileN, n - j), depth, columns + from, ld, strided(rows + j * rows_ld, 1, rows_ld), T(0),
           out + j * ld + from, ld);
  }
}

// out[c, i] += Σ_j stripe[j, i]·rows[j, c]
template <class T>
inline void add_over_keys(const T *stripe, int64_t ld, const T *rows, int64_t rows_ld, int64_t n, int64_t lanes, Visible visible,
                          int64_t columns, T *out) {
  if (visible.offset <= -n) return gemm(lanes, columns, n, stripe, ld, strided(rows, rows_ld, 1), T(1), out, ld);
  for (int64_t i = 0; i < lanes; i += kTileM<T>) {
    int64_t keys = visible.keys(i + kTileM<T>, n);
    if (keys > 0) gemm(kTileM<T>, columns, keys, stripe + i, ld, strided(rows, rows_ld, 1), T(1), out + i, ld);
  }
}

// out[j, c] += Σ_i stripe[j, i]·rows[i, c] for the first n_queries queries; `columns` is padded to the vector length.
template <class T>
inline void add_over_queries(const T *stripe, int64_t ld, const T *rows, int64_t rows_ld, int64_t n, int64_t n_queries,
                             Visible visible, int64_t columns, T *out) {
  for (int64_t j = 0; j < n; j += kTileN) {
    int64_t from = visible.first_lane<T>(j);
    if (from < n_queries)
      gemm(columns, min64(kTileN, n - j), n_queries - from, rows + from * rows_ld, rows_ld, strided(stripe + j * ld + from, 1, ld),
           T(1), out + j * rows_ld, rows_ld);
  }
}

template <class T> POWER_INLINE Vec<T> integer_power(Vec<T> x, int p) {
  switch (p) {
    case 0: return broadcast(T(1));
    case 1: return x;
    case 2: return x * x;
    case 3: return x * x * x;
    case 4: return (x * x) * (x * x);
  }
  Vec<T> result = broadcast(T(1));
  for (; p; p >>= 1, x *= x)
    if (p & 1) result *= x;
  return result;
}

// How much of key j is left when query i reads it: exp(g_i − g_j) with both in one chunk (`pairwise`), or a factor of the query
// times a factor of the key when the key's chunk is an earlier one; both are at most 1 when gates forget.
template <class T> struct Decay {
  enum Kind { none, pairwise, product } kind;
  const Gates<T> *queries;
  const Gates<T> *keys;    // pairwise: the same chunk
  const T *key_factor;     // product
  int64_t first_key;       // of the stripe, in its block

  POWER_INLINE Vec<T> at(int64_t i, int64_t j) const {
    if (kind == product) return load(queries->since_start + i) * key_factor[first_key + j];
    Vec<T> high = load(queries->high + i) - keys->high[first_key + j], low = load(queries->low + i) - keys->low[first_key + j];
    return exp(high + low);
  }
};

// stripe[j, i] = s^p · decay, 0 where unseen
template <class T>
inline void weigh(int deg, const Decay<T> &decay, Visible visible, int64_t n, int64_t lanes, int64_t ld, T *stripe) {
  for (int64_t j = 0; j < n; ++j) {
    T *row = stripe + j * ld;
    T first = T(j + visible.offset);
    for (int64_t i = visible.first_lane<T>(j); i < lanes; i += kLanes<T>) {
      Vec<T> w = integer_power<T>(load(row + i), deg);
      if (decay.kind != Decay<T>::none) w *= decay.at(i, j);
      if (j + visible.offset > i) w = select<T>(lane_index<T>() + T(i) >= first, w, Vec<T>{});
      store(row + i, w);
    }
  }
}

// Backward of `weigh`: from scores s and dw (the gradient of the weights), writes w over `stripe` and ds over `dstripe`, and adds
// A_ij = w_ij·dw_ij, the gradient of the exponent, to row_sum[i] and key_sum[j], leaving out i = j, whose exponent is 0.
template <class T>
inline void weigh_gradient(int deg, const Decay<T> &decay, Visible visible, int64_t n, int64_t lanes, int64_t ld, T *stripe,
                           T *dstripe, T *row_sum, T *key_sum) {
  for (int64_t j = 0; j < n; ++j) {
    T *row = stripe + j * ld, *drow = dstripe + j * ld;
    T first = T(j + visible.offset);
    Vec<T> sum = Vec<T>{};
    for (int64_t i = visible.first_lane<T>(j); i < lanes; i += kLanes<T>) {
      Vec<T> s = load(row + i), dw = load(drow + i), w = integer_power<T>(s, deg - 1);
      if (decay.kind != Decay<T>::none) w *= decay.at(i, j);
      Vec<T> ds = w * dw * T(deg), a;
      w *= s;
      a = w * dw;
      if (j + visible.offset >= i) {
        Vec<T> index = lane_index<T>() + T(i);
        w = select<T>(index >= first, w, Vec<T>{});
        ds = select<T>(index >= first, ds, Vec<T>{});
        a = select<T>(index > first, a, Vec<T>{});
      }
      store(row + i, w);
      store(drow + i, ds);
      if (decay.kind != Decay<T>::none) {
        sum += a;
        store(row_sum + i, load(row_sum + i) + a);
      }
    }
    if (decay.kind != Decay<T>::none) key_sum[j] += horizontal_sum<T>(sum);
  }
}

}  // namespace POWER_ISA
}  // namespace power_cpu

/* The tile table of the power attention kernels: what every kernel's shapes come from, and why each number is what it is. */
#pragma once
#include <stdint.h>

namespace power {

/* Tokens per staged tile: one 64-row matrix instruction of queries, four k-steps of keys, rows of a 128-byte swizzle. */
constexpr int TILE = 64;
/* Side of the feature tiles of degree 2; a pair of them is 64 state rows (README, "State"). */
constexpr int FEATURE_TILE = 8;
constexpr int TILE_BYTES = 64 * 64 * 2;

/* Ranges of the scaled float16 operands, as powers of two: |q^| < 2^Q_RANGE (each row on its own), |k^| < 2^K_RANGE,
 * |v^| < 2^V_RANGE, |dy^| < 2^DY_RANGE (each per key-value head).
 * k is put high because it enters squared: a key 2^10 smaller than the largest still has normal float16 features. */
constexpr int Q_RANGE = 1, K_RANGE = 4, V_RANGE = 0, DY_RANGE = 0;

/* Squared scores are at most (d · 2^(Q_RANGE + K_RANGE))²; times 2^score_exponent they fit float16 (< 2^15). */
constexpr int score_exponent(int padded_d) { return 15 - 2 * ((padded_d == 64 ? 6 : 7) + Q_RANGE + K_RANGE); }

/* Consumer warpgroups of a block, 64 rows each, beside one that loads. At d = e = 64 the tensor pipe was busy 36–47 % of the time with two: products, waits
 * and arithmetic follow one another within a warpgroup, so more of them fill the gaps, as many as 65536 registers leave room for (flagship, chunks
 * of 768: query 0.484 → 0.450 ms with four, dq 0.725 → 0.654 with three; dk and dv are level with two). Wider heads need 232 registers a thread. */
constexpr int query_warpgroups(int padded_d, int padded_e) { return padded_d == 64 && padded_e == 64 ? 4 : 2; }
constexpr int gradient_warpgroups(int padded_d, int padded_e) { return padded_d == 64 && padded_e == 64 ? 3 : 2; }
/* Threads of a block, and registers of a thread: (warpgroups · consumer_registers + loader_registers) · 128 ≤ 65536. */
constexpr int threads(int warpgroups) { return 128 * (warpgroups + 1); }
constexpr int consumer_registers(int warpgroups) { return warpgroups == 2 ? 232 : warpgroups == 3 ? 160 : 112; }
constexpr int loader_registers(int warpgroups) { return warpgroups == 2 ? 40 : 32; }

/* Chunk length. Per token and head the sum inside a chunk costs c/2 · (d + e) and the two state products 2 · D · e, so c only has to stay
 * well under 4D; each chunk also writes and reads a state of 2 · D · e bytes. Lengths are multiples of the rows of query and gradient blocks: 256 and
 * 192 for d, e ≤ 64, else 128. d = e = 64, t = 65536, 8 heads: 768 took 3 % less time than 1024, and a third more memory for states.
 * d = 128 (D = 8704, a state is 2.2 MB): 1024, 2048 and 4096 take as long, but dlog_g, whose running sum errs by the roundings of a chunk's tokens, is off by
 * 1.9e-3, 2.7e-3 and 3.2e-3; float16's bound is 2e-3 and bfloat16's 5e-3. Memory at t = 65536, 8 heads: 3.3, 2.2, 1.9 GB. */
inline int chunk_length(int64_t t, int d, int e, bool float16) {
  if (d <= 64 && e <= 64) return 768;
  if (t <= 256) return 256;
  if (t <= 1024) return 512; /* short sequences need blocks to fill the chip */
  return t >= 16384 && !float16 ? 2048 : 1024;
}

/* Tokens after which the running sum behind dlog_g starts anew from the states (chunked_gate_gradient.cuh). Its rounding errors walk: at d = 64, t = 65536 and
 * 262144 dlog_g was off by 3.2e-3 and 8.0e-3 without, is by 1.7e-3 and 2.1e-3 every 16384 tokens, 1.4e-3 and 1.5e-3 every 3072 (float16's bound is 2e-3). A
 * start reads a state and a gradient, 0.6 MB a head at d = e = 64: 0.01 of 3.3 ms at the flagship. */
constexpr int ANCHOR_TOKENS = 3072;

/* State gradients move into dk and dv (chunked_host.cuh) where that saves this much memory: dk and dv then take a second launch. */
constexpr int64_t LENT_BYTES = 32 << 20;

}  // namespace power

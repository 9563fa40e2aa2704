// The C entry points of the CPU kernels: check what cannot be served, choose the instruction set, call.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "variants.h"

namespace {

using power_cpu::Variant;

thread_local char last_error[512] = "no error";

struct Isa {
  const char *name;
  const Variant *in_float32, *in_float64;
  const Variant &operator[](int32_t dtype) const { return dtype == POWER_FLOAT64 ? *in_float64 : *in_float32; }
};
#define POWER_VARIANTS(ISA) \
  {#ISA, &power_cpu::ISA::in_float32, &power_cpu::ISA::in_float64}

const Isa generic = POWER_VARIANTS(generic);
#if defined(__x86_64__)
const Isa avx2 = POWER_VARIANTS(avx2), avx512 = POWER_VARIANTS(avx512);
#endif

const Isa &choose_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const char *asked = getenv("POWER_CPU_ISA");
  if (asked && !strcmp(asked, "generic")) return generic;
  if (asked && !strcmp(asked, "avx2")) has_avx512 = false;
  if (has_avx512) return avx512;
  if (has_avx2) return avx2;
#endif
  return generic;
}

const Isa &isa() {
  static const Isa &chosen = choose_isa();
  return chosen;
}

int threads_of(const void *stream) {
  const PowerExecutor *executor = static_cast<const PowerExecutor *>(stream);
  return executor && executor->threads > 1 ? executor->threads : 1;
}

const int32_t kPowerTile[] = {0, 8, 8, 4, 2};

int32_t check(const PowerAttentionShape &s) {
  if (s.b < 0 || s.t < 0 || s.t_kv < 0 || s.h_kv < 1 || s.h_q < 1 || s.h_q % s.h_kv || s.d < 1 || s.e < 0 || s.deg < 1)
    return power_fail(POWER_INVALID, "sizes b=%lld t=%lld t_kv=%lld h_q=%lld h_kv=%lld d=%lld e=%lld deg=%d", (long long)s.b,
                      (long long)s.t, (long long)s.t_kv, (long long)s.h_q, (long long)s.h_kv, (long long)s.d, (long long)s.e, s.deg);
  if (s.causal && s.t != s.t_kv) return power_fail(POWER_INVALID, "causal, but t=%lld and t_kv=%lld", (long long)s.t, (long long)s.t_kv);
  if (s.dtype < 0 || s.dtype > POWER_FLOAT16) return power_fail(POWER_UNSUPPORTED, "dtype %d", s.dtype);
  if (s.form != POWER_ATTENTION && (s.deg > 4 || s.d % kPowerTile[s.deg]))
    return power_fail(POWER_UNSUPPORTED, "no state layout for d=%lld deg=%d", (long long)s.d, s.deg);
  if (s.form != POWER_ATTENTION && s.chunk_size < 1) return power_fail(POWER_INVALID, "chunk_size=%lld", (long long)s.chunk_size);
  return POWER_OK;
}

int32_t check(const PowerSdpaShape &s) {
  if (s.b < 0 || s.t_q < 0 || s.t_kv < 0 || s.h_kv < 1 || s.h_q < 1 || s.h_q % s.h_kv || s.d < 1 || s.e < 0)
    return power_fail(POWER_INVALID, "sizes b=%lld t_q=%lld t_kv=%lld h_q=%lld h_kv=%lld d=%lld e=%lld", (long long)s.b,
                      (long long)s.t_q, (long long)s.t_kv, (long long)s.h_q, (long long)s.h_kv, (long long)s.d, (long long)s.e);
  if (!(s.dropout_p >= 0 && s.dropout_p <= 1)) return power_fail(POWER_INVALID, "dropout_p=%g is not in [0, 1]", s.dropout_p);
  if (s.dtype < 0 || s.dtype > POWER_FLOAT16) return power_fail(POWER_UNSUPPORTED, "dtype %d", s.dtype);
  if (s.causal > POWER_CAUSAL || s.window) return power_fail(POWER_UNSUPPORTED, "windows and the bottom-right causal mask are served by sm90");
  return POWER_OK;
}

int32_t wide(int32_t dtype) { return dtype == POWER_FLOAT64 ? POWER_FLOAT64 : POWER_FLOAT32; }

// A named array must be there (unless optional) and have one dtype.
struct Wanted {
  const char *name;
  const PowerArray &array;
  int32_t dtype;
  bool optional;
};
template <int N> int32_t check(const Wanted (&wanted)[N], bool empty) {
  for (const Wanted &w : wanted) {
    if (!w.array.data) {
      if (!w.optional && !empty) return power_fail(POWER_INVALID, "%s is absent", w.name);
    } else if (w.array.dtype != w.dtype) {
      return power_fail(POWER_INVALID, "%s has dtype %d, expected %d", w.name, w.array.dtype, w.dtype);
    }
  }
  return POWER_OK;
}

int32_t check_workspace(const void *workspace, int64_t bytes, int64_t needed) {
  if (bytes < needed) return power_fail(POWER_WORKSPACE, "workspace of %lld bytes, %lld needed", (long long)bytes, (long long)needed);
  if (reinterpret_cast<uintptr_t>(workspace) % 64) return power_fail(POWER_WORKSPACE, "workspace is not aligned to 64 bytes");
  return POWER_OK;
}

// Under AddressSanitizer the kernels mark the gaps between their arrays (Arena); the workspace goes back to its owner whole.
void release(void *workspace, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(workspace, size_t(bytes));
#endif
  (void)workspace, (void)bytes;
}

template <class F> void each(const PowerArray &a, int64_t n0, int64_t n1, int64_t n2, int64_t n3, F f) {
  char *data = static_cast<char *>(a.data);
  int64_t size = a.dtype == POWER_FLOAT64 ? 8 : a.dtype == POWER_FLOAT32 ? 4 : 2;
  if (!data) return;
  for (int64_t i = 0; i < n0; ++i)
    for (int64_t j = 0; j < n1; ++j)
      for (int64_t k = 0; k < n2; ++k)
        for (int64_t l = 0; l < n3; ++l) {
          int64_t at[] = {i, j, k, l};
          f(data + size * (i * a.stride[0] + j * a.stride[1] + k * a.stride[2] + l * a.stride[3]), at, size);
        }
}
void zero(const PowerArray &a, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
  each(a, n0, n1, n2, n3, [](char *p, const int64_t *, int64_t size) { memset(p, 0, size_t(size)); });
}
void copy_or_zero(const PowerArray &to, const PowerArray &from, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
  if (!from.data) return zero(to, n0, n1, n2, n3);
  const char *source = static_cast<const char *>(from.data);
  each(to, n0, n1, n2, n3, [&](char *p, const int64_t *i, int64_t size) {
    memcpy(p, source + size * (i[0] * from.stride[0] + i[1] * from.stride[1] + i[2] * from.stride[2] + i[3] * from.stride[3]),
           size_t(size));
  });
}

int64_t state_rows(const PowerAttentionShape &s) {
  if (s.deg > 4 || s.d % kPowerTile[s.deg]) return 0;
  int64_t tile = kPowerTile[s.deg], tiles = s.d / tile, count = 1;
  for (int m = 0; m < s.deg; ++m) count = count * (tiles + m) / (m + 1) * tile;
  return count;
}

}  // namespace

extern "C" {

int32_t power_abi_version(void) { return POWER_ABI_VERSION; }

const char *power_last_error(void) { return last_error; }

int32_t power_fail(int32_t status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

const char *power_cpu_isa(void) { return isa().name; }

int32_t power_has_sm90(void) {
#ifdef POWER_WITH_SM90
  return 1;
#else
  return 0;
#endif
}

int64_t power_attention_forward_workspace_cpu(const PowerAttentionShape *s, const void *stream) {
  if (check(*s) != POWER_OK) return -1;
  return isa()[s->dtype].power.forward_workspace(*s, threads_of(stream));
}

int32_t power_attention_forward_cpu(const PowerAttentionShape *s, const PowerAttentionArrays *a, void *workspace,
                                    int64_t workspace_bytes, void *stream) {
  if (int32_t status = check(*s)) return status;
  bool empty = s->b == 0 || s->t == 0 || s->e == 0;
  int32_t t = wide(s->dtype);
  const Wanted wanted[] = {{"q", a->q, s->dtype, false}, {"k", a->k, s->dtype, s->t_kv == 0}, {"v", a->v, s->dtype, s->t_kv == 0},
                           {"log_g", a->log_g, t, true}, {"s0", a->s0, t, true}, {"z0", a->z0, t, true},
                           {"y", a->y, t, false}, {"norm", a->norm, t, false}, {"s", a->s, t, true}, {"z", a->z, t, true}};
  if (int32_t status = check(wanted, empty)) return status;
  if (s->form == POWER_ATTENTION && (a->s0.data || a->z0.data || a->s.data || a->z.data))
    return power_fail(POWER_UNSUPPORTED, "the attention form has no state; use the chunked form");
  if (int32_t status = check_workspace(workspace, workspace_bytes, power_attention_forward_workspace_cpu(s, stream))) return status;
  if (s->b == 0) return POWER_OK;
  if (s->causal && s->t == 0) {
    copy_or_zero(a->s, a->s0, s->b, s->h_kv, state_rows(*s), s->e);
    copy_or_zero(a->z, a->z0, s->b, s->h_kv, state_rows(*s), 1);
    return POWER_OK;
  }
  isa()[s->dtype].power.forward(*s, *a, workspace, static_cast<const PowerExecutor *>(stream));
  release(workspace, workspace_bytes);
  return POWER_OK;
}

int64_t power_attention_backward_workspace_cpu(const PowerAttentionShape *s, const void *stream) {
  if (check(*s) != POWER_OK) return -1;
  return isa()[s->dtype].power.backward_workspace(*s, threads_of(stream));
}

int32_t power_attention_backward_cpu(const PowerAttentionShape *s, const PowerAttentionArrays *a, void *workspace,
                                     int64_t workspace_bytes, void *stream) {
  if (int32_t status = check(*s)) return status;
  bool empty = s->b == 0 || s->t == 0 || s->e == 0;
  int32_t t = wide(s->dtype);
  const Wanted wanted[] = {{"q", a->q, s->dtype, false}, {"k", a->k, s->dtype, s->t_kv == 0}, {"v", a->v, s->dtype, s->t_kv == 0},
                           {"log_g", a->log_g, t, true}, {"s0", a->s0, t, true}, {"z0", a->z0, t, true},
                           {"y", a->y, t, false}, {"norm", a->norm, t, false}, {"dy", a->dy, t, false},
                           {"ds", a->ds, t, true}, {"dz", a->dz, t, true}, {"dq", a->dq, s->dtype, false},
                           {"dk", a->dk, s->dtype, s->t_kv == 0}, {"dv", a->dv, s->dtype, s->t_kv == 0},
                           {"dlog_g", a->dlog_g, t, true}, {"ds0", a->ds0, t, true}, {"dz0", a->dz0, t, true}};
  if (int32_t status = check(wanted, empty)) return status;
  if (a->dlog_g.data && !a->log_g.data) return power_fail(POWER_INVALID, "dlog_g is wanted, but log_g is absent");
  if (s->form == POWER_ATTENTION && (a->s0.data || a->z0.data || a->ds.data || a->dz.data))
    return power_fail(POWER_UNSUPPORTED, "the attention form has no state; use the chunked form");
  if (int32_t status = check_workspace(workspace, workspace_bytes, power_attention_backward_workspace_cpu(s, stream))) return status;
  if (s->b == 0) return POWER_OK;
  if (s->causal && s->t == 0) {
    copy_or_zero(a->ds0, a->ds, s->b, s->h_kv, state_rows(*s), s->e);
    copy_or_zero(a->dz0, a->dz, s->b, s->h_kv, state_rows(*s), 1);
    return POWER_OK;
  }
  isa()[s->dtype].power.backward(*s, *a, workspace, static_cast<const PowerExecutor *>(stream));
  release(workspace, workspace_bytes);
  return POWER_OK;
}

int64_t power_sdpa_forward_workspace_cpu(const PowerSdpaShape *s, const void *stream) {
  if (check(*s) != POWER_OK) return -1;
  return isa()[s->dtype].sdpa.forward_workspace(*s, threads_of(stream));
}

int32_t power_sdpa_forward_cpu(const PowerSdpaShape *s, const PowerSdpaArrays *a, void *workspace, int64_t workspace_bytes,
                               void *stream) {
  if (int32_t status = check(*s)) return status;
  bool empty = s->b == 0 || s->t_q == 0;
  int32_t t = wide(s->dtype);
  const Wanted wanted[] = {{"q", a->q, s->dtype, false}, {"k", a->k, s->dtype, s->t_kv == 0}, {"v", a->v, s->dtype, s->t_kv == 0 || s->e == 0},
                           {"bias", a->bias, t, true}, {"mask", a->mask, POWER_BOOL, true}, {"out", a->out, a->out.dtype == t ? t : s->dtype, s->e == 0}, {"lse", a->lse, t, false}};
  if (int32_t status = check(wanted, empty)) return status;
  if (s->dropout_p > 0 && !a->seed.data) return power_fail(POWER_INVALID, "seed is absent");
  if (int32_t status = check_workspace(workspace, workspace_bytes, power_sdpa_forward_workspace_cpu(s, stream))) return status;
  if (!empty) isa()[s->dtype].sdpa.forward(*s, *a, workspace, static_cast<const PowerExecutor *>(stream));
  release(workspace, workspace_bytes);
  return POWER_OK;
}

int64_t power_sdpa_backward_workspace_cpu(const PowerSdpaShape *s, const void *stream) {
  if (check(*s) != POWER_OK) return -1;
  return isa()[s->dtype].sdpa.backward_workspace(*s, threads_of(stream));
}

int32_t power_sdpa_backward_cpu(const PowerSdpaShape *s, const PowerSdpaArrays *a, void *workspace, int64_t workspace_bytes,
                                void *stream) {
  if (int32_t status = check(*s)) return status;
  bool empty = s->b == 0 || (s->t_q == 0 && s->t_kv == 0);
  int32_t t = wide(s->dtype);
  const Wanted wanted[] = {{"q", a->q, s->dtype, s->t_q == 0}, {"k", a->k, s->dtype, s->t_kv == 0},
                           {"v", a->v, s->dtype, s->t_kv == 0 || s->e == 0}, {"bias", a->bias, t, true}, {"mask", a->mask, POWER_BOOL, true},
                           {"out", a->out, a->out.dtype == t ? t : s->dtype, s->t_q == 0 || s->e == 0}, {"dout", a->dout, a->dout.dtype == t ? t : s->dtype, s->t_q == 0 || s->e == 0},
                           {"lse", a->lse, t, s->t_q == 0}, {"dq", a->dq, s->dtype, s->t_q == 0}, {"dk", a->dk, s->dtype, s->t_kv == 0},
                           {"dv", a->dv, s->dtype, s->t_kv == 0 || s->e == 0}, {"dbias", a->dbias, t, true}};
  if (int32_t status = check(wanted, empty)) return status;
  if (a->dbias.data && !a->bias.data) return power_fail(POWER_INVALID, "dbias is wanted, but bias is absent");
  if (s->dropout_p > 0 && !a->seed.data) return power_fail(POWER_INVALID, "seed is absent");
  if (int32_t status = check_workspace(workspace, workspace_bytes, power_sdpa_backward_workspace_cpu(s, stream))) return status;
  if (!empty) isa()[s->dtype].sdpa.backward(*s, *a, workspace, static_cast<const PowerExecutor *>(stream));
  release(workspace, workspace_bytes);
  return POWER_OK;
}

}  // extern "C"

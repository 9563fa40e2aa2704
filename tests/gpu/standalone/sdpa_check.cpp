/* Scaled dot-product attention on a GPU without a framework, for compute-sanitizer (whose start-up multiplies that of Python and torch):
 *
 *     nvcc -std=c++17 -O1 -o sdpa_check tests/gpu/standalone/sdpa_check.cpp -ldl
 *     ./sdpa_check torch_power/lib/libpower_kernels.so [case number, or -1 for all] [passes]
 *
 * Forward and backward of small calls that between them run every branch of the kernels, against sums in double on the host; with `passes`, the
 * backward pass that often, whose bits must be those of the first. Results begin as NaN, so that one that is not written is wrong; initcheck does
 * not see all that the copy engine writes and would name them. Workspaces are as cudaMalloc gives them: a word that is read before it is
 * written is initcheck's to find. racecheck wants a library whose kernels were compiled with -DPOWER_RACECHECK (csrc/sm90/mbarrier.cuh).
 */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../../torch_power/csrc/sdpa/abi_sdpa.h"

namespace {

/* What only the general kernels do. Masks hide a third of the keys, and every key from the first queries. */
enum Extra : int { NONE = 0, MASK = 1, BIAS = 2, BIAS_OF_KEYS = 4, DROPOUT = 8 };
constexpr double kDropped = 0.25;
constexpr int kUnseeing = 70;  // queries that a mask hides every key from: a tile and a part of one

struct Case {
  const char *name;
  int b, h_q, h_kv, t_q, t_kv, d, e, causal;
  int extra = NONE;
  int left = -1, right = -1;  // window; -1: none
};
constexpr Case kCases[] = {
    {"d64 causal gqa", 1, 4, 2, 300, 300, 64, 64, 1},
    {"d64 full", 1, 2, 2, 200, 330, 64, 64, 0},
    {"d128 causal gqa", 1, 4, 2, 300, 300, 128, 128, 1},
    {"d128 full", 1, 2, 2, 200, 330, 128, 128, 0},
    {"d96 e72 causal, short keys", 2, 2, 1, 130, 70, 96, 72, 1},
    {"d256 causal gqa", 1, 2, 1, 200, 200, 256, 256, 1},
    {"d256 full", 1, 1, 1, 130, 200, 256, 256, 0},
    {"d64 mask, dropout", 1, 2, 1, 200, 260, 64, 64, 0, MASK | DROPOUT},
    {"d128 window, bias", 1, 2, 2, 260, 260, 128, 128, 0, BIAS, 100, 30},
    {"d128 causal, mask, keys' bias", 2, 2, 2, 200, 200, 128, 128, 1, MASK | BIAS_OF_KEYS},
    {"d64 bottom right, bias, dropout", 1, 2, 1, 130, 260, 64, 64, 2, BIAS | DROPOUT},
    {"d256 window, mask, bias", 1, 1, 1, 200, 130, 256, 192, 0, MASK | BIAS, 60, 60},
};

void must(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error)), std::exit(2);
}

/* [b, h, t, x] in bfloat16, on the host as the numbers that were rounded. */
struct Tensor {
  int b, h, t, x;
  std::vector<float> host;
  __nv_bfloat16 *device = nullptr;
  Tensor(int b, int h, int t, int x) : b(b), h(h), t(t), x(x), host(size_t(b) * h * t * x) {
    must(cudaMalloc(&device, host.size() * 2));
    must(cudaMemset(device, 0xff, host.size() * 2));
  }
  ~Tensor() { cudaFree(device); }
  float &at(int i, int j, int k, int l) { return host[((size_t(i) * h + j) * t + k) * x + l]; }
  void fill(std::mt19937 &random) {
    std::normal_distribution<float> normal;
    std::vector<__nv_bfloat16> rounded;
    for (float &value : host) rounded.push_back(__float2bfloat16(normal(random))), value = __bfloat162float(rounded.back());
    must(cudaMemcpy(device, rounded.data(), host.size() * 2, cudaMemcpyHostToDevice));
  }
  void fetch() {
    std::vector<__nv_bfloat16> rounded(host.size());
    must(cudaMemcpy(rounded.data(), device, host.size() * 2, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < host.size(); ++i) host[i] = __bfloat162float(rounded[i]);
  }
  PowerArray array() const { return {device, {int64_t(h) * t * x, int64_t(t) * x, x, 1}, POWER_BFLOAT16}; }
};

double error(const std::vector<float> &got, const std::vector<double> &want) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) difference += std::pow(got[i] - want[i], 2), size += want[i] * want[i];
  return std::sqrt(difference / size);
}

/* An array of numbers that are no operands of products: lse, masks, biases, seeds. */
template <typename Number>
struct Plain {
  std::vector<Number> host;
  Number *device = nullptr;
  explicit Plain(size_t size) : host(size) {
    must(cudaMalloc(&device, size * sizeof(Number)));
    must(cudaMemset(device, 0xff, size * sizeof(Number)));
  }
  ~Plain() { cudaFree(device); }
  void send() { must(cudaMemcpy(device, host.data(), host.size() * sizeof(Number), cudaMemcpyHostToDevice)); }
  void fetch() { must(cudaMemcpy(host.data(), device, host.size() * sizeof(Number), cudaMemcpyDeviceToHost)); }
};

/* Whether dropout keeps a weight: Philox 4×32-7 as csrc/abi.h says. */
bool keeps(uint64_t seed, int head, int query, int key) {
  uint32_t x[4] = {uint32_t(key / 4), uint32_t(query), uint32_t(head), 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * x[0], b = uint64_t(0xCD9E8D57u) * x[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ x[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k[1], uint32_t(a)};
    std::copy(next, next + 4, x);
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  return x[key % 4] >= uint32_t(kDropped * 4294967296.0);
}

struct Library {
  decltype(&power_sdpa_forward_workspace_sm90) forward_workspace, backward_workspace;
  decltype(&power_sdpa_forward_sm90) forward, backward;
  decltype(&power_last_error) last_error;
};

void run(const Library &library, bool backward, const PowerSdpaShape &shape, const PowerSdpaArrays &arrays) {
  const int64_t bytes = (backward ? library.backward_workspace : library.forward_workspace)(&shape, nullptr);
  void *workspace = nullptr;
  must(cudaMalloc(&workspace, bytes > 0 ? bytes : 1));
  if ((backward ? library.backward : library.forward)(&shape, &arrays, workspace, bytes, nullptr))
    std::fprintf(stderr, "%s\n", library.last_error()), std::exit(2);
  must(cudaDeviceSynchronize());
  cudaFree(workspace);
}

/* The operands and results of one case. */
struct Call {
  const Case &c;
  Tensor q, k, v, dy, y, dq, dk, dv;
  Plain<uint8_t> residual, mask;
  Plain<float> lse, bias, dbias;
  Plain<uint64_t> seed;
  PowerSdpaShape shape;
  PowerSdpaArrays arrays = {};

  explicit Call(const Case &c)
      : c(c), q(c.b, c.h_q, c.t_q, c.d), k(c.b, c.h_kv, c.t_kv, c.d), v(c.b, c.h_kv, c.t_kv, c.e), dy(c.b, c.h_q, c.t_q, c.e),
        y(c.b, c.h_q, c.t_q, c.e), dq(c.b, c.h_q, c.t_q, c.d), dk(c.b, c.h_kv, c.t_kv, c.d), dv(c.b, c.h_kv, c.t_kv, c.e),
        residual(y.host.size()), mask(size_t(c.t_q) * c.t_kv), lse(size_t(c.b) * c.h_q * c.t_q), bias(bias_size(c)), dbias(bias_size(c)),
        seed(c.b) {
    std::mt19937 random(1);
    for (Tensor *x : {&q, &k, &v, &dy}) x->fill(random);
    for (size_t i = 0; i < mask.host.size(); ++i) mask.host[i] = random() % 3 != 0 && i >= size_t(kUnseeing) * c.t_kv;
    std::normal_distribution<float> normal;
    for (float &x : bias.host) x = normal(random);
    for (uint64_t &x : seed.host) x = uint64_t(random()) << 32 | random();
    mask.send(), bias.send(), seed.send();
    shape = {c.b, c.h_q, c.h_kv, c.t_q, c.t_kv, c.d, c.e, 1 / std::sqrt(double(c.d)), c.extra & DROPOUT ? kDropped : 0.0,
             POWER_BFLOAT16, c.causal, c.left >= 0, 0, c.left, c.right};
    arrays.q = q.array(), arrays.k = k.array(), arrays.v = v.array(), arrays.out = y.array(), arrays.residual = y.array();
    arrays.residual.data = residual.device;
    arrays.lse = {lse.device, {int64_t(c.h_q) * c.t_q, c.t_q, 1, 0}, POWER_FLOAT32};
    const int64_t row = c.extra & BIAS_OF_KEYS ? 0 : c.t_kv;
    if (c.extra & MASK) arrays.mask = {mask.device, {0, 0, c.t_kv, 1}, POWER_BOOL};
    if (c.extra & (BIAS | BIAS_OF_KEYS)) arrays.bias = {bias.device, {0, row * c.t_q, row, 1}, POWER_FLOAT32};
    if (c.extra & DROPOUT) arrays.seed = {seed.device, {1, 0, 0, 0}, 0};
    arrays.dout = dy.array(), arrays.dq = dq.array(), arrays.dk = dk.array(), arrays.dv = dv.array();
    if (arrays.bias.data) arrays.dbias = arrays.bias, arrays.dbias.data = dbias.device;
  }
  /* [h_q, t_q, t_kv], or [t_kv] */
  static size_t bias_size(const Case &c) { return c.extra & BIAS ? size_t(c.h_q) * c.t_q * c.t_kv : c.t_kv; }
  size_t bias_at(int head, int query, int key) const {
    return c.extra & BIAS ? (size_t(head) * c.t_q + query) * c.t_kv + key : key;
  }
  bool seen(int query, int key) const {
    const int shift = c.causal == POWER_CAUSAL_BOTTOM_RIGHT ? c.t_kv - c.t_q : 0, at = query + shift;
    if ((c.causal && key > at) || (c.left >= 0 && (key < at - c.left || key > at + c.right))) return false;
    return !(c.extra & MASK) || mask.host[size_t(query) * c.t_kv + key];
  }
};

/* y, dq, dk, dv and dbias in double. */
struct Exact {
  std::vector<double> y, dq, dk, dv, dbias;
  explicit Exact(Call &x)
      : y(x.y.host.size()), dq(x.dq.host.size()), dk(x.dk.host.size()), dv(x.dv.host.size()), dbias(x.dbias.host.size()) {
    for (int i = 0; i < x.c.b; ++i)
      for (int h = 0; h < x.c.h_q; ++h)
        for (int m = 0; m < x.c.t_q; ++m) add_row(x, i, h, m);
  }
  void add_row(Call &x, int i, int h, int m) {
    const Case &c = x.c;
    const int group = h / (c.h_q / c.h_kv);
    const size_t row = (size_t(i) * c.h_q + h) * c.t_q + m;
    std::vector<double> p(c.t_kv), gain(c.t_kv, 1);
    double sum = 0, delta = 0;
    for (int n = 0; n < c.t_kv; ++n) {
      if (!x.seen(m, n)) continue;
      double score = 0;
      for (int l = 0; l < c.d; ++l) score += double(x.q.at(i, h, m, l)) * x.k.at(i, group, n, l);
      score = score * x.shape.scale + (x.arrays.bias.data ? x.bias.host[x.bias_at(h, m, n)] : 0);
      if (c.extra & DROPOUT) gain[n] = keeps(x.seed.host[i], h, m, n) ? 1 / (1 - kDropped) : 0;
      sum += p[n] = std::exp(score);
    }
    if (sum == 0) return;
    for (int n = 0; n < c.t_kv; ++n)
      for (int l = 0; l < c.e; ++l) y[row * c.e + l] += p[n] / sum * gain[n] * x.v.at(i, group, n, l);
    for (int l = 0; l < c.e; ++l) delta += y[row * c.e + l] * x.dy.at(i, h, m, l);
    for (int n = 0; n < c.t_kv; ++n) {
      if (p[n] == 0) continue;
      const size_t key = (size_t(i) * c.h_kv + group) * c.t_kv + n;
      double dp = 0;
      for (int l = 0; l < c.e; ++l) dp += double(x.dy.at(i, h, m, l)) * x.v.at(i, group, n, l);
      const double ds = p[n] / sum * (dp * gain[n] - delta);
      if (x.arrays.dbias.data) dbias[x.bias_at(h, m, n)] += ds;
      for (int l = 0; l < c.e; ++l) dv[key * c.e + l] += p[n] / sum * gain[n] * x.dy.at(i, h, m, l);
      for (int l = 0; l < c.d; ++l) {
        dk[key * c.d + l] += ds * x.shape.scale * x.q.at(i, h, m, l);
        dq[row * c.d + l] += ds * x.shape.scale * x.k.at(i, group, n, l);
      }
    }
  }
};

/* How many of `passes` further backward passes have bits other than those of the first. */
int other_bits(const Library &library, Call &x, int passes) {
  std::vector<std::vector<float>> first;
  int found = 0;
  for (int pass = 0; pass <= passes; ++pass) {
    if (pass) run(library, true, x.shape, x.arrays);
    for (Tensor *gradient : {&x.dq, &x.dk, &x.dv}) gradient->fetch();
    const std::vector<std::vector<float>> got = {x.dq.host, x.dk.host, x.dv.host};
    if (!pass) first = got;
    for (size_t i = 0; i < got.size(); ++i)
      if (std::memcmp(got[i].data(), first[i].data(), got[i].size() * sizeof(float))) ++found;
  }
  return found;
}

/* The largest relative error of the results. */
double check(const Library &library, const Case &c, int passes) {
  Call x(c);
  run(library, false, x.shape, x.arrays);
  run(library, true, x.shape, x.arrays);
  const int others = passes ? other_bits(library, x, passes) : 0;
  for (Tensor *result : {&x.y, &x.dq, &x.dk, &x.dv}) result->fetch();
  x.dbias.fetch();
  const Exact exact(x);
  const bool biased = x.arrays.dbias.data;
  const double errors[5] = {error(x.y.host, exact.y), error(x.dq.host, exact.dq), error(x.dk.host, exact.dk), error(x.dv.host, exact.dv),
                            biased ? error(x.dbias.host, exact.dbias) : 0};
  double worst = others ? 1 : 0;
  for (double found : errors) worst = found <= worst ? worst : found;  // NaN stays
  std::printf("%-32s y %.1e  dq %.1e  dk %.1e  dv %.1e  dbias %.1e", c.name, errors[0], errors[1], errors[2], errors[3], errors[4]);
  std::printf(passes ? "  other bits in %d of %d passes\n" : "\n", others, passes);
  std::fflush(stdout);
  return worst;
}

}  // namespace

int main(int argc, char **argv) {
  void *file = argc > 1 ? dlopen(argv[1], RTLD_LAZY) : nullptr;
  if (!file) return std::fprintf(stderr, "%s\n", argc > 1 ? dlerror() : "usage: sdpa_check LIBRARY [case number or -1] [passes]"), 2;
  const auto find = [file](auto &function, const char *name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, name));
    if (!function) std::fprintf(stderr, "%s\n", dlerror()), std::exit(2);
  };
  Library library;
  find(library.forward_workspace, "power_sdpa_forward_workspace_sm90"), find(library.forward, "power_sdpa_forward_sm90");
  find(library.backward_workspace, "power_sdpa_backward_workspace_sm90"), find(library.backward, "power_sdpa_backward_sm90");
  find(library.last_error, "power_last_error");
  int wrong = 0, number = 0;
  for (const Case &c : kCases) {
    const bool asked = argc < 3 || std::atoi(argv[2]) < 0 || std::atoi(argv[2]) == number;
    ++number;
    if (asked && !(check(library, c, argc > 3 ? std::atoi(argv[3]) : 0) <= 3.7e-3)) ++wrong;  // the contract's bound of a bfloat16 gradient
  }
  return wrong != 0;
}

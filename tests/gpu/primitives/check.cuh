/* What the tests of csrc/sm90 share: device buffers that start as NaN or -1 bytes, errors that end the program, and the verdict. */
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

inline void check(cudaError_t status, const char *what) {
  if (status == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(status));
  exit(2);
}
#define CHECK(call) check(call, #call)

/* `count` numbers in device memory, every byte 0xff (NaN, or −1) until written. */
template <typename T>
struct Buffer {
  T *data;
  size_t count;
  explicit Buffer(size_t n) : count(n) {
    CHECK(cudaMalloc(&data, n * sizeof(T)));
    CHECK(cudaMemset(data, 0xff, n * sizeof(T)));
  }
  explicit Buffer(const std::vector<T> &from) : Buffer(from.size()) {
    CHECK(cudaMemcpy(data, from.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> host() const {
    CHECK(cudaDeviceSynchronize());
    std::vector<T> to(count);
    CHECK(cudaMemcpy(to.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }
};

/* Launches with dynamic shared memory; an error of the launch or of the kernel ends the program. */
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int blocks, int threads, int smem, Args... args) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
  kernel<<<blocks, threads, smem>>>(args...);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
}

/* Counts and prints what is wrong; `main` returns the count. */
inline int failures = 0;
inline void expect(bool right, const char *what, int detail = 0) {
  if (!right) failures++;
  printf("%s %s %d\n", right ? "ok   " : "WRONG", what, detail);
}

// What makes the library an (empty) Python module: importing it registers the operators.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject *PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.torch_power.*_cpp and *_cuda.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

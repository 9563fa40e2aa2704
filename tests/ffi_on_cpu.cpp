/* The handlers of csrc/ffi_binding.cpp with the CPU's entry points behind them, so that a machine without a GPU can run a call: the same
 * reading of attributes and buffers, no stream. Built by tests/test_cuda_ffi.py. */
#include "../torch_power/csrc/ffi_binding.cpp"

namespace {

template <Entry entry>
ffi::Error handle_on_cpu(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return call(entry, nullptr, operands, results, attributes);
}

auto binding_on_cpu() { return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs(); }

}  // namespace

extern "C" POWER_API XLA_FFI_Error *forward_on_cpu(XLA_FFI_CallFrame *);
extern "C" POWER_API XLA_FFI_Error *backward_on_cpu(XLA_FFI_CallFrame *);
XLA_FFI_DEFINE_HANDLER_SYMBOL(forward_on_cpu, handle_on_cpu<power_attention_forward_cpu>, binding_on_cpu());
XLA_FFI_DEFINE_HANDLER_SYMBOL(backward_on_cpu, handle_on_cpu<power_attention_backward_cpu>, binding_on_cpu());

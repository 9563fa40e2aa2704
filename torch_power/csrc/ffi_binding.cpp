/* The kernels of power attention as targets of `jax.ffi.ffi_call`: one XLA FFI handler for each GPU entry point of abi.h, so that JAX runs
 * the very library that PyTorch does. Needs jaxlib's headers, and neither torch nor CUDA ones.
 *
 * A call names its buffers: the attributes `operands` and `results` hold fields of PowerAttentionArrays, separated by spaces, in the order
 * of the buffers. One more result, last, is the workspace: memory that XLA plans for at compile time, so that nothing is allocated at run
 * time and a call can be recorded in a command buffer (a CUDA graph). Sizes and flags of PowerAttentionShape are attributes of their names.
 */
#include <xla/ffi/api/ffi.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "abi.h"
#include "power/abi_attention.h"
#include "power/abi_chunked.h"

namespace {

namespace ffi = xla::ffi;

using Shape = PowerAttentionShape;
using Arrays = PowerAttentionArrays;

constexpr std::pair<std::string_view, PowerArray Arrays::*> FIELDS[] = {
    {"q", &Arrays::q},           {"k", &Arrays::k},       {"v", &Arrays::v},   {"log_g", &Arrays::log_g}, {"s0", &Arrays::s0},
    {"z0", &Arrays::z0},         {"y", &Arrays::y},       {"norm", &Arrays::norm}, {"s", &Arrays::s},     {"z", &Arrays::z},
    {"dy", &Arrays::dy},         {"ds", &Arrays::ds},     {"dz", &Arrays::dz}, {"dq", &Arrays::dq},       {"dk", &Arrays::dk},
    {"dv", &Arrays::dv},         {"dlog_g", &Arrays::dlog_g}, {"ds0", &Arrays::ds0}, {"dz0", &Arrays::dz0}, {"saved", &Arrays::saved},
};
constexpr std::pair<std::string_view, int64_t Shape::*> SIZES[] = {
    {"b", &Shape::b},       {"t", &Shape::t}, {"t_kv", &Shape::t_kv}, {"h_q", &Shape::h_q},
    {"h_kv", &Shape::h_kv}, {"d", &Shape::d}, {"e", &Shape::e},       {"chunk_size", &Shape::chunk_size},
};
constexpr std::pair<std::string_view, int32_t Shape::*> FLAGS[] = {
    {"deg", &Shape::deg}, {"form", &Shape::form}, {"dtype", &Shape::dtype}, {"causal", &Shape::causal}, {"normalize", &Shape::normalize},
    {"saved", &Shape::saved}, {"gates", &Shape::gates},
};

/* What a workspace must be aligned to; XLA promises less, so the caller asks for this many bytes more. */
constexpr uintptr_t ALIGNMENT = 256;

ffi::Error invalid(std::string message) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::move(message)); }

bool describe(const ffi::AnyBuffer &buffer, PowerArray &array) {
  const auto dimensions = buffer.dimensions();
  if (dimensions.size() > 4) return false;
  switch (buffer.element_type()) {
    case ffi::DataType::F32: array.dtype = POWER_FLOAT32; break;
    case ffi::DataType::BF16: array.dtype = POWER_BFLOAT16; break;
    case ffi::DataType::F16: array.dtype = POWER_FLOAT16; break;
    case ffi::DataType::U8: break; /* opaque */
    default: return false;
  }
  array.data = buffer.untyped_data();
  int64_t stride = 1;
  for (size_t i = dimensions.size(); i-- > 0; stride *= dimensions[i]) array.stride[i] = stride;
  return true;
}

/* Take the next word off a list separated by spaces. */
std::string_view next_word(std::string_view &words) {
  const size_t end = words.find(' ');
  const std::string_view word = words.substr(0, end);
  words.remove_prefix(end == std::string_view::npos ? words.size() : end + 1);
  return word;
}

/* Put the buffer under the field that the next word names. */
ffi::Error assign(std::string_view &words, const ffi::AnyBuffer &buffer, Arrays &arrays) {
  const std::string_view word = next_word(words);
  for (const auto &[name, field] : FIELDS)
    if (name == word) return describe(buffer, arrays.*field) ? ffi::Error::Success() : invalid(std::string(name) + ": dtype or rank");
  return invalid("no field of PowerAttentionArrays: '" + std::string(word) + "'");
}

ffi::Error read_shape(const ffi::Dictionary &attributes, Shape &shape) {
  for (const auto &[name, size] : SIZES) {
    const auto value = attributes.get<int64_t>(name);
    if (value.has_error()) return value.error();
    shape.*size = *value;
  }
  for (const auto &[name, flag] : FLAGS) {
    const auto value = attributes.get<int64_t>(name);
    if (value.has_error()) return value.error();
    shape.*flag = static_cast<int32_t>(*value);
  }
  const auto scale = attributes.get<double>("scale");
  if (scale.has_error()) return scale.error();
  shape.scale = *scale;
  return ffi::Error::Success();
}

using Entry = int32_t (*)(const Shape *, const Arrays *, void *workspace, int64_t workspace_bytes, void *stream);

ffi::Error call(Entry entry, void *stream, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) {
  Shape shape = {};
  Arrays arrays = {};
  if (ffi::Error error = read_shape(attributes, shape); error.failure()) return error;
  const auto operand_names = attributes.get<std::string_view>("operands"), result_names = attributes.get<std::string_view>("results");
  if (operand_names.has_error()) return operand_names.error();
  if (result_names.has_error()) return result_names.error();
  if (results.size() == 0) return invalid("results: the last must be the workspace");

  std::string_view words = *operand_names;
  for (size_t i = 0; i < operands.size(); ++i) {
    const auto buffer = operands.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    if (ffi::Error error = assign(words, *buffer, arrays); error.failure()) return error;
  }
  words = *result_names;
  for (size_t i = 0; i + 1 < results.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    if (ffi::Error error = assign(words, **buffer, arrays); error.failure()) return error;
  }
  auto workspace = results.get<ffi::AnyBuffer>(results.size() - 1);
  if (workspace.has_error()) return workspace.error();
  const uintptr_t begin = reinterpret_cast<uintptr_t>((*workspace)->untyped_data()), aligned = (begin + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  const int64_t bytes = static_cast<int64_t>((*workspace)->size_bytes()) - static_cast<int64_t>(aligned - begin);

  switch (entry(&shape, &arrays, reinterpret_cast<void *>(aligned), bytes, stream)) {
    case POWER_OK: return ffi::Error::Success();
    case POWER_UNSUPPORTED: return ffi::Error(ffi::ErrorCode::kUnimplemented, power_last_error());
    case POWER_INVALID: return invalid(power_last_error());
    default: return ffi::Error(ffi::ErrorCode::kInternal, power_last_error());
  }
}

template <Entry entry>
ffi::Error handle(void *stream, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return call(entry, stream, operands, results, attributes);
}

auto binding() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void *>>().RemainingArgs().RemainingRets().Attrs(); }

}  // namespace

/* Every entry point is the same work on the device each time it is called with the same shape: fit for a command buffer. */
#define POWER_FFI_HANDLER(name, entry)                         \
  extern "C" POWER_API XLA_FFI_Error *name(XLA_FFI_CallFrame *); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, handle<entry>, binding(), {ffi::Traits::kCmdBufferCompatible})

POWER_FFI_HANDLER(power_ffi_attention_quadratic_forward, power_attention_quadratic_forward_sm90);
POWER_FFI_HANDLER(power_ffi_attention_quadratic_backward, power_attention_quadratic_backward_sm90);
POWER_FFI_HANDLER(power_ffi_chunked_forward, power_chunked_forward_sm90);
POWER_FFI_HANDLER(power_ffi_chunked_backward, power_chunked_backward_sm90);

// A device that is not the CPU, for tests without a GPU: its tensors lie in ordinary memory, its arithmetic is the CPU's, and it refuses what a GPU refuses:
// operations that mix its tensors with the CPU's, and reading its memory without a copy. PyTorch calls such a device PrivateUse1.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <torch/library.h>
#include <cstring>
#include <set>

namespace {
using at::Tensor;
constexpr auto HERE = c10::DeviceType::PrivateUse1;

void release(void* data) { c10::free_cpu(data); }

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &release, at::Device(HERE, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(HERE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface { // one device, one stream, nothing asynchronous
  static at::Device device() { return {HERE, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::DeviceType type() const override { return HERE; }
  at::Device exchangeDevice(at::Device) const override { return device(); }
  at::Device getDevice() const override { return device(); }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return stream(); }
  c10::Stream getDefaultStream(at::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
};
Hooks hooks;
const bool known = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
Tensor seen(const Tensor& x) { // the same memory, as the CPU's
  if (!x.defined() || x.is_cpu()) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), at::TensorOptions().dtype(x.dtype()));
}
Tensor moved(const Tensor& x) { return at::empty_strided(x.sizes(), x.strides(), x.options().device(at::Device(HERE, 0))).copy_(x); }
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  seen(to).copy_(seen(from));
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}
at::Scalar scalar(const Tensor& x) { return seen(x).item(); }
Tensor& set_from(Tensor& x, at::Storage from, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) { return at::native::set_storage_cpu_(x, from, offset, size, stride); }
Tensor& set_whole(Tensor& x, at::Storage from) { return at::native::set_(x, std::move(from)); }
const Tensor& resize(const Tensor& x, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) { return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format); }

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, at::IntArrayRef stride, at::IntArrayRef pad, at::IntArrayRef dilation, bool transposed, at::IntArrayRef out, int64_t groups) {
  TORCH_CHECK(x.device() == w.device(), "Expected all tensors to be on the same device: input on ", x.device(), ", weight on ", w.device());
  std::optional<Tensor> bias;
  if (b.has_value() && b->defined()) bias = seen(*b);
  return moved(at::convolution(seen(x), seen(w), bias, stride, pad, dilation, transposed, out, groups));
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& g, const Tensor& x, const Tensor& w, at::IntArrayRef stride, at::IntArrayRef pad, at::IntArrayRef dilation, bool transposed, at::IntArrayRef out, int64_t groups, std::array<bool, 3> mask) {
  std::optional<at::IntArrayRef> sizes;
  at::DimVector bias{transposed ? w.size(1) * groups : w.size(0)};
  sizes = bias;
  auto [a, b, c] = at::convolution_backward(seen(g), seen(x), seen(w), sizes, stride, pad, dilation, transposed, out, groups, mask);
  auto back = [](const Tensor& t) { return t.defined() ? moved(t) : t; };
  return {back(a), back(b), back(c)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b, const std::optional<Tensor>& mean, const std::optional<Tensor>& var, bool training, double momentum, double eps) {
  auto look = [&](const std::optional<Tensor>& t) { // the running statistics are written in place, which the schema does not say
    if (t.has_value() && t->defined()) TORCH_CHECK(t->device() == x.device(), "Expected all tensors to be on the same device: batch norm");
    return t.has_value() ? std::optional<Tensor>(seen(*t)) : t;
  };
  auto [y, m, v] = at::native_batch_norm(seen(x), look(w), look(b), look(mean), look(var), training, momentum, eps);
  return {moved(y), moved(m), moved(v)};
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { // a GPU takes the CPU's tensors in two places: numbers without dimensions, and indices
  static const std::set<std::string> indexing{"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  const auto& name = op.schema().name();
  bool here = false, cpu = false;
  auto look = [&](const Tensor& t) { if (t.defined() && !(t.dim() == 0 && t.is_cpu())) (t.is_cpu() ? cpu : here) = true; };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    else if (indexing.count(name)) continue;
    else if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) look(t);
    else if (value.isList()) for (const c10::IValue& v : value.toListRef()) if (v.isTensor()) look(v.toTensor());
  }
  TORCH_CHECK(cpu ? !here && !indexing.count(name) : true, "Expected all tensors to be on the same device, but ", name, " was given tensors on two");
  at::native::cpu_fallback(op, stack);
}
} // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &scalar);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("alias", &at::native::alias);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_from);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// A device "ghost" for tests where there is no accelerator: its memory is the CPU's, its operations are the CPU's, and
// it refuses what an accelerator refuses: tensors of the CPU beside its own, unless they are scalars or indices, and
// generators of the CPU, and, as some do, float64. It counts copies from and to the CPU, for which an accelerator would be
// waited.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::SymIntArrayRef;
using Optional = std::optional<Tensor>;

namespace {
constexpr auto GHOST = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEY(c10::DispatchKey::PrivateUse1);
int64_t waits = 0;
bool has_float64 = true;
thread_local int depth = 0;

struct OnCpu {  // while it lives copies are those of an operation of the CPU: an accelerator would make none
  at::NoGradGuard guard;
  OnCpu() { ++depth; }
  ~OnCpu() { --depth; }
};

struct Memory final : at::Allocator {
  static void release(void* memory) { c10::free_cpu(memory); }
  at::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &release, Device(GHOST, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const final { std::memcpy(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(GHOST, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return GHOST; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(GHOST, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {  // the CPU's operations take `inner` alone
  at::Generator inner = at::make_generator<at::CPUGeneratorImpl>();
  Generator() { device_ = Device(GHOST, 0), key_set_ = KEY; }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const auto generator = at::make_generator<Generator>();
    return generator;
  }
} hooks;

c10::ScalarType checked(std::optional<at::ScalarType> dtype) {
  TORCH_CHECK(has_float64 || dtype != at::kDouble, "the ghost device has no float64");
  return c10::dtype_or_default(dtype);
}

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEY, checked(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, KEY,
                                           checked(dtype));
}

// The same memory, as the CPU's.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  const int64_t entries = tensor.storage().nbytes() / tensor.itemsize();
  auto* data = const_cast<void*>(tensor.storage().data());
  auto flat = at::from_blob(data, {entries}, tensor.options().device(at::kCPU));
  return flat.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool) {
  at::NoGradGuard guard;
  waits += target.is_cpu() != self.is_cpu() && !depth;
  if (self.numel()) on_cpu(target).copy_(on_cpu(self));
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == sizes) return self;
  const auto bytes = at::detail::computeStorageNbytesContiguous(sizes, self.itemsize(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto larger = memory.allocate(bytes);
    if (storage->nbytes()) std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& self, at::Storage storage, c10::SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset.expect_int());
  tensor->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const int64_t entries = storage.nbytes() / self.itemsize();
  return set_storage(self, std::move(storage), 0, {entries}, {1});
}

at::Scalar local_scalar_dense(const Tensor& self) {
  waits += !depth;
  return on_cpu(self).item();
}

void check(const Tensor& tensor, const std::string& name) {
  const bool takes_indices = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  TORCH_CHECK(!tensor.defined() || !tensor.is_cpu() || tensor.dim() == 0 || takes_indices, name,
              " takes a tensor of the CPU, of shape ", tensor.sizes(), ", beside tensors on the ghost device");
}

// Everything that has nothing of its own below.
void on_cpu_checked(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto& name = op.schema().name();
  for (auto& value : torch::jit::last(*stack, arguments.size())) {
    if (value.isTensor()) check(value.toTensor(), name);
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) check(tensor, name);
    if (value.isOptionalTensorList())
      for (const Optional& tensor : value.toOptionalTensorList())
        if (tensor) check(*tensor, name);
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() != "generator") continue;
    auto& value = (*stack)[stack->size() - arguments.size() + i];
    const auto given = value.isGenerator() ? value.toGenerator() : hooks.getDefaultGenerator(0);
    TORCH_CHECK(given.device().type() == GHOST, name, " takes a generator of the CPU for a tensor on the ghost device");
    value = c10::IValue(static_cast<Generator*>(given.unsafeGetGeneratorImpl())->inner);
  }
  OnCpu running;
  at::native::cpu_fallback(op, stack);
}

Tensor moved(const Tensor& tensor) { return tensor.defined() ? tensor.to(Device(GHOST, 0)) : tensor; }

Optional optional_on_cpu(const Optional& tensor, const char* name) {
  if (tensor) check(*tensor, name);
  return tensor ? Optional(on_cpu(*tensor)) : tensor;
}

Tensor convolution(const Tensor& x, const Tensor& weight, const Optional& bias, IntArrayRef stride, IntArrayRef padding,
                   IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  OnCpu running;
  check(x, "convolution"), check(weight, "convolution");
  return moved(at::convolution(on_cpu(x), on_cpu(weight), optional_on_cpu(bias, "convolution"), stride, padding,
                               dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  OnCpu running;
  const std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [x_grad, weight_grad, bias_grad] =
      at::convolution_backward(on_cpu(grad), on_cpu(x), on_cpu(weight), IntArrayRef(bias), stride, padding, dilation,
                               transposed, output_padding, groups, mask);
  return {moved(x_grad), moved(weight_grad), moved(bias_grad)};
}

// Its schema does not say that it writes the running statistics, so that the fallback would lose them.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const Optional& weight, const Optional& bias,
                                              const Optional& mean, const Optional& variance, bool training,
                                              double momentum, double eps) {
  OnCpu running;
  const auto get = [](const Optional& tensor) { return optional_on_cpu(tensor, "batch_norm"); };
  auto [output, batch_mean, batch_scale] = at::native_batch_norm(on_cpu(x), get(weight), get(bias), get(mean),
                                                                 get(variance), training, momentum, eps);
  return {moved(output), moved(batch_mean), moved(batch_scale)};
}

// The CPU has no fused one. Differentiated by autograd, operation by operation.
std::tuple<Tensor, Tensor> gru_cell(const Tensor& of_input, const Tensor& of_hidden, const Tensor& hidden,
                                    const Optional& input_bias, const Optional& hidden_bias) {
  const auto a = (input_bias ? of_input + *input_bias : of_input).chunk(3, 1);
  const auto b = (hidden_bias ? of_hidden + *hidden_bias : of_hidden).chunk(3, 1);
  const auto reset = (a[0] + b[0]).sigmoid(), keep = (a[1] + b[1]).sigmoid(), fresh = (a[2] + reset * b[2]).tanh();
  return {(hidden - fresh) * keep + fresh, at::empty({0}, hidden.options())};
}
}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu_checked>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("resize_", &resize_);
  library.impl("_local_scalar_dense", &local_scalar_dense);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("native_batch_norm", &batch_norm);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("unfold", &at::native::unfold);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) { library.impl("_thnn_fused_gru_cell", &gru_cell); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using at::autocast::CastPolicy;
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  module.def("waits", [] { return waits; });
  module.def("set_float64", [](bool has) { has_float64 = has; });
  module.def("default_generator", [] { return hooks.getDefaultGenerator(0); });
}

// Tensors as the headers of one minor version of torch describe them. No function calls the dispatcher, except those
// that allocate or copy memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/COWDeleter.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <cstring>
#include <span>

namespace dracopt {

inline c10::Device c10_device(Device device) {
  return {static_cast<c10::DeviceType>(device.type),
          static_cast<c10::DeviceIndex>(device.is_cpu() ? -1 : device.index)};
}

// Headers tell all places at compile time.
inline void define_places(pybind11::module_&) {}

class HeldMemory {
 public:
  static constexpr int64_t kWorthBytes = 4 << 20;  // parameters of this size, in all, are worth holding their memory

  explicit HeldMemory(const c10::TensorImpl* tensor) : storage_(tensor->unsafe_storage()) {}

 private:
  c10::Storage storage_;
};

class Tensor {
 public:
  Tensor() = default;

  // The object must be a tensor.
  static Tensor in(PyObject* object) { return Tensor(THPVariable_Unpack(object).unsafeGetTensorImpl()); }

  bool is_defined() const { return tensor_ != nullptr; }
  bool operator==(const Tensor&) const = default;

  Tensor grad() const {
    const at::Tensor& grad = tensor_->grad();
    return grad.defined() ? Tensor(grad.unsafeGetTensorImpl()) : Tensor();
  }

  // Says whether Python may decide a tensor's shape, device or layout. No parallel region can ask for these.
  bool is_python_subclass() const { return tensor_->key_set().has(c10::DispatchKey::Python); }

  // Returns the object of a Python subclass, borrowed.
  PyObject* python_object() const {
    const at::Tensor held(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(tensor_));
    PyObject* const object = THPVariable_Wrap(held);
    Py_DECREF(object);  // the tensor keeps its object
    return object;
  }

  // Tensors that have equal key sets and a storage are all plain, or none of them is.
  uint64_t key_set() const { return tensor_->key_set().raw_repr(); }

  DRACOPT_INLINE bool is_plain_on_cpu() const { return has_only(kCpu, kCpuKeys); }
  DRACOPT_INLINE bool is_plain_on_gpu() const { return has_only(kGpu, kGpuKeys); }

  // The following functions may call Python for a Python subclass.
  DRACOPT_INLINE Device device() const {
    return {static_cast<int>(tensor_->device().type()), tensor_->device().index()};
  }
  bool is_strided() const { return tensor_->layout() == c10::kStrided; }
  bool is_sparse_coo() const { return tensor_->layout() == c10::kSparse; }
  bool is_conjugated() const { return tensor_->is_conj(); }
  int dtype() const { return static_cast<int>(tensor_->dtype().toScalarType()); }
  int64_t itemsize() const { return static_cast<int64_t>(tensor_->itemsize()); }
  DRACOPT_INLINE std::span<const int64_t> sizes() const { return {tensor_->sizes().data(), tensor_->sizes().size()}; }
  int64_t numel() const { return tensor_->numel(); }

  // The following functions are for plain tensors.
  DRACOPT_INLINE std::span<const int64_t> strides() const {
    return {tensor_->strides().data(), tensor_->strides().size()};
  }
  bool is_contiguous() const { return tensor_->is_contiguous(); }
  bool is_non_overlapping_and_dense() const { return tensor_->is_non_overlapping_and_dense(); }
  int64_t storage_offset() const { return tensor_->storage_offset(); }
  DRACOPT_INLINE int64_t storage_bytes() const { return static_cast<int64_t>(tensor_->unsafe_storage().nbytes()); }
  bool is_inference() const { return tensor_->is_inference(); }

  // Says whether a write must copy the storage first, as for torch's lazy clones. No parallel region may do that.
  DRACOPT_INLINE bool is_lazily_cloned() const {
    return tensor_->unsafe_storage().data_ptr().get_deleter() == &c10::impl::cow::cow_deleter;
  }

  // Returns the address of the first element. The address is no pointer yet, because an empty tensor's lies in no
  // storage.
  DRACOPT_INLINE uintptr_t address() const {
    return reinterpret_cast<uintptr_t>(tensor_->unsafe_storage().data()) +
           static_cast<uintptr_t>(storage_offset()) * static_cast<uintptr_t>(tensor_->itemsize());
  }

  // Reads the facts, without asking before each who decides a tensor's sizes. Returns false if not the tensor does.
  DRACOPT_INLINE bool read(TensorFacts& facts) const {
    const c10::StorageImpl* const storage = tensor_->unsafe_storage().unsafeGetStorageImpl();
    if (storage == nullptr || (tensor_->*Opened::matches)(Opened::kCustomStrides)) return false;
    const auto& layout = tensor_->*Opened::layout;
    const c10::DataPtr& data = storage->data_ptr();
    facts = {dtype(),
             layout.size(),
             layout.sizes_data(),
             layout.strides_data(),
             tensor_->*Opened::numel,
             tensor_->*Opened::offset,
             storage_bytes(),
             reinterpret_cast<uintptr_t>(data.get()),
             data.get_deleter() == &c10::impl::cow::cow_deleter};
    return true;
  }

  // Returns the index of a plain tensor's GPU.
  DRACOPT_INLINE int gpu_index() const { return (tensor_->*Opened::device)->index(); }

  // Says whether a graph may lead to the tensor.
  bool may_have_graph() const { return tensor_->requires_grad(); }

  // Counts a change, as torch's in-place operations do. Inference tensors have no count.
  void bump_version() const {
    if (!is_inference()) tensor_->bump_version();
  }

  // Fetches what torch knows of a tensor into the cache. Works for a tensor that is gone, and for none.
  DRACOPT_INLINE void prefetch() const { prefetch_members(tensor_, sizeof(c10::TensorImpl)); }

  // Fetches what is asked of the tensor's storage, which lies before its last 32 bytes.
  DRACOPT_INLINE void prefetch_storage() const {
    prefetch_members(tensor_->unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl) - 32);
  }

  // Fetches the count of the tensor's changes.
  DRACOPT_INLINE void prefetch_version() const {
    const c10::VariableVersion& version = tensor_->version_counter();
    static_assert(sizeof(version) == sizeof(uintptr_t), "it holds nothing else than a pointer");
    uintptr_t count;
    std::memcpy(&count, &version, sizeof(count));
    dracopt::prefetch(reinterpret_cast<void*>(count + kFirstMember));
  }

  HeldMemory hold_memory() const { return HeldMemory(tensor_); }

 private:
  static constexpr uintptr_t kFirstMember = sizeof(c10::intrusive_ptr_target);

  friend class Memory;
  explicit Tensor(c10::TensorImpl* tensor) : tensor_(tensor) {}

  // Fetches the members of an object, which begin behind what all such objects have. The object may be null.
  DRACOPT_INLINE static void prefetch_members(const void* object, size_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(object);
    for (uintptr_t at = kFirstMember; at < bytes; at += 64) dracopt::prefetch(reinterpret_cast<void*>(first + at));
    dracopt::prefetch(reinterpret_cast<void*>(first + bytes - 1));  // objects seldom begin with a line
  }

  // Names members that torch lets only derived classes see.
  struct Opened : c10::TensorImpl {
    static constexpr auto kCustomStrides = SizesStridesPolicy::CustomStrides;
    static constexpr auto matches = &Opened::matches_policy;
    static constexpr auto layout = &Opened::sizes_and_strides_;
    static constexpr auto device = &Opened::device_opt_;
    static constexpr auto numel = &Opened::numel_;
    static constexpr auto offset = &Opened::storage_offset_;
  };

  static constexpr c10::DispatchKeySet kCpu{c10::DispatchKey::CPU};
  static constexpr c10::DispatchKeySet kCpuKeys =
      kCpu | c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) | c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);
#if defined(DRACOPT_SIMULATED_GPU)
  static constexpr c10::DispatchKeySet kGpu{c10::DispatchKey::PrivateUse1};
  static constexpr c10::DispatchKeySet kGpuKeys = kGpu | c10::DispatchKeySet(c10::DispatchKey::AutogradPrivateUse1) |
                                                  c10::DispatchKeySet(c10::DispatchKey::AutocastPrivateUse1);
#else
  static constexpr c10::DispatchKeySet kGpu{c10::DispatchKey::CUDA};
  static constexpr c10::DispatchKeySet kGpuKeys =
      kGpu | c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) | c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA);
#endif

  // Says whether the tensor has the key of a backend, otherwise only allowed keys, and a storage.
  DRACOPT_INLINE bool has_only(c10::DispatchKeySet key, c10::DispatchKeySet allowed) const {
    const uint64_t keys = key_set();
    const uint64_t any = allowed.raw_repr() | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView).raw_repr();
    return (keys & ~any) == 0 && (keys & key.raw_repr()) == key.raw_repr() && tensor_->unsafe_storage();
  }

  c10::TensorImpl* tensor_ = nullptr;
};

class Memory {
 public:
  Memory() = default;

  // Allocates memory on a device for use in its current stream.
  Memory(size_t bytes, Device device)
      : tensor_(at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(c10_device(device)).dtype(at::kByte))) {}

  // Allocates memory on the host from which a device copies without the host's waiting.
  static Memory on_host(size_t bytes, Device for_device) {
    const auto options = at::TensorOptions(c10::kCPU).dtype(at::kByte).pinned_memory(for_device.needs_pinned_memory());
    Memory memory;
    memory.tensor_ = at::empty({static_cast<int64_t>(bytes)}, options);
    return memory;
  }

  // Holds a number, or a copy on the device that is made in the current stream's order.
  static Memory of(Tensor number, Device device) {
    const at::Tensor held(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(number.tensor_));
    Memory memory;
    memory.tensor_ = held.to(c10_device(device), true);
    return memory;
  }

  // Copies as many bytes in the current stream's order. The host does not wait.
  void copy_from(const Memory& other) { tensor_.copy_(other.tensor_, true); }

  // Returns null if there is no memory.
  char* data() const { return tensor_.defined() ? static_cast<char*>(tensor_.mutable_data_ptr()) : nullptr; }

 private:
  at::Tensor tensor_;
};

class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) : guard_(c10_device(device)) {}

 private:
  c10::DeviceGuard guard_;
};

inline c10::Stream c10_stream(Device device) {
  return c10::impl::VirtualGuardImpl(static_cast<c10::DeviceType>(kGpuType)).getStream(c10_device(device));
}

// Returns torch's number of a GPU's current stream.
inline int64_t current_stream(Device device) { return c10_stream(device).id(); }

// Returns the cudaStream_t of a GPU's current stream.
inline void* current_cuda_stream(Device device) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 11
  // An import would search sys.meta_path, which may run anyone's code in the middle of a step.
  const auto module = pybind11::reinterpret_borrow<pybind11::object>(PyImport_AddModule("torch._C"));
  return reinterpret_cast<void*>(module.attr("_cuda_getCurrentRawStream")(device.index).cast<uintptr_t>());
#else
  return c10_stream(device).native_handle();
#endif
}

// Says whether an object is a tensor. Python's isinstance() is avoided, because torch overrides it in Python.
inline bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Says whether an object is a tensor or a parameter of no subclass.
inline bool is_exact_tensor(PyObject* object) { return THPVariable_CheckExact(object); }

inline bool in_inference_mode() { return c10::InferenceMode::is_enabled(); }

// Says whether a TorchDispatchMode is active. Modes trace, count or replace the operations of torch, which kernels are
// not. torch keeps the modes of make_fx with pre_dispatch=True apart from the others.
inline bool is_under_mode() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch);
}

}  // namespace dracopt

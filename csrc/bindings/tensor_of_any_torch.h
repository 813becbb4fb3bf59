// Tensors of every torch from 2.10 on. Most facts come from torch's stable C interface. That interface does not tell a
// tensor's key set, gradient, version and lazy clone. Their places in torch's objects are found by value when Python
// imports this module (see dracopt_ext/any_torch.py), which refuses a torch in which a place is not certain.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

namespace dracopt {

// The places hold what dracopt_ext/any_torch.py has found. Offsets are in bytes.
struct Places {
  uint64_t tensor;                        // of the at::Tensor in a Python object; it is a pointer to a TensorImpl
  uint64_t keys;                          // of the key set in a TensorImpl
  uint64_t object;                        // of the Python object in a TensorImpl
  uint64_t storage, autograd, version;    // of pointers in a TensorImpl
  uint64_t deleter, grad, count;          // in what these point to
  uint64_t lazy_deleter;                  // the deleter of lazy clones
  uint64_t undefined;                     // where an undefined at::Tensor points
  uint64_t cpu, cpu_keys, gpu, gpu_keys;  // key sets: a backend's key, and all keys that a plain tensor may have
  uint64_t python, conjugated, in_place;  // single keys
  PyObject *type, *parameter;             // torch's classes
  PyObject *in_inference_mode, *mode_count, *has_key;  // functions that run no Python code
  PyObject* pre_dispatch;                              // a key
};

inline Places places;

// Gives a module the function that sets the places.
inline void define_places(pybind11::module_& m) {
  m.def("set_places", [](const pybind11::dict& found) {
    constexpr std::pair<const char*, uint64_t Places::*> numbers[] = {
        {"tensor", &Places::tensor},         {"keys", &Places::keys},
        {"object", &Places::object},         {"storage", &Places::storage},
        {"autograd", &Places::autograd},     {"version", &Places::version},
        {"deleter", &Places::deleter},       {"grad", &Places::grad},
        {"count", &Places::count},           {"lazy_deleter", &Places::lazy_deleter},
        {"undefined", &Places::undefined},   {"cpu", &Places::cpu},
        {"cpu_keys", &Places::cpu_keys},     {"gpu", &Places::gpu},
        {"gpu_keys", &Places::gpu_keys},     {"python", &Places::python},
        {"conjugated", &Places::conjugated}, {"in_place", &Places::in_place}};
    constexpr std::pair<const char*, PyObject * Places::*> objects[] = {
        {"type", &Places::type},
        {"parameter", &Places::parameter},
        {"in_inference_mode", &Places::in_inference_mode},
        {"mode_count", &Places::mode_count},
        {"has_key", &Places::has_key},
        {"pre_dispatch", &Places::pre_dispatch}};
    for (const auto& [name, place] : numbers) places.*place = found[name].cast<uint64_t>();
    for (const auto& [name, place] : objects) places.*place = pybind11::object(found[name]).release().ptr();
  });
}

namespace any_torch {

template <typename T>
T& at(const void* object, size_t offset) {
  return *reinterpret_cast<T*>(static_cast<char*>(const_cast<void*>(object)) + offset);
}

inline void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("torch could not ") + what);
}

}  // namespace any_torch

class HeldMemory {
 public:
  static constexpr int64_t kWorthBytes = 16 << 20;  // more than with torch's headers, because a tensor is made

  // Takes over a tensor.
  explicit HeldMemory(AtenTensorHandle tensor) : tensor_(tensor, &aoti_torch_delete_tensor_object) {}

 private:
  std::unique_ptr<AtenTensorOpaque, AOTITorchError (*)(AtenTensorHandle)> tensor_;
};

class Tensor {
 public:
  Tensor() = default;

  static Tensor in(PyObject* object) { return Tensor(&any_torch::at<void*>(object, places.tensor)); }

  bool is_defined() const { return place_ != nullptr; }
  bool operator==(const Tensor&) const = default;

  Tensor grad() const {
    void* const autograd = any_torch::at<void*>(impl(), places.autograd);
    void** const grad = autograd == nullptr ? nullptr : &any_torch::at<void*>(autograd, places.grad);
    return grad == nullptr || reinterpret_cast<uint64_t>(*grad) == places.undefined ? Tensor() : Tensor(grad);
  }

  bool is_python_subclass() const { return (key_set() & places.python) != 0; }

  PyObject* python_object() const {
    constexpr uint64_t kMark = 1;  // some versions of torch mark an object that only the tensor keeps alive
    return reinterpret_cast<PyObject*>(any_torch::at<uint64_t>(impl(), places.object) & ~kMark);
  }

  uint64_t key_set() const { return any_torch::at<uint64_t>(impl(), places.keys); }

  bool is_plain_on_cpu() const { return has_only(places.cpu, places.cpu_keys); }
  bool is_plain_on_gpu() const { return has_only(places.gpu, places.gpu_keys); }

  Device device() const {
    return {ask<int32_t>(aoti_torch_get_device_type), ask<int32_t>(aoti_torch_get_device_index)};
  }
  bool is_strided() const { return ask<int32_t>(aoti_torch_get_layout) == aoti_torch_layout_strided(); }
  bool is_sparse_coo() const { return ask<int32_t>(aoti_torch_get_layout) == aoti_torch_layout_sparse_coo(); }
  bool is_conjugated() const { return (key_set() & places.conjugated) != 0; }
  int dtype() const { return ask<int32_t>(aoti_torch_get_dtype); }
  int64_t itemsize() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype())); }
  std::span<const int64_t> sizes() const { return list_of(aoti_torch_get_sizes); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }

  std::span<const int64_t> strides() const { return list_of(aoti_torch_get_strides); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }

  bool is_non_overlapping_and_dense() const {
    if (is_contiguous()) return true;
    const auto of_sizes = sizes(), of_strides = strides();
    // Among all dimensions, one must stride over the elements of the faster ones, and only one.
    const int64_t count = numel();
    for (int64_t elements = 1; elements < count;) {
      int64_t size = 0;
      for (size_t d = 0; d < of_sizes.size(); ++d) {
        if (of_sizes[d] == 1 || of_strides[d] != elements) continue;
        if (size != 0) return false;
        size = of_sizes[d];
      }
      if (size == 0) return false;
      elements *= size;
    }
    return true;
  }

  int64_t storage_offset() const { return ask<int64_t>(aoti_torch_get_storage_offset); }
  int64_t storage_bytes() const { return ask<int64_t>(aoti_torch_get_storage_size); }
  bool is_inference() const { return (key_set() & places.in_place) == 0; }

  bool is_lazily_cloned() const { return any_torch::at<uint64_t>(storage(), places.deleter) == places.lazy_deleter; }

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(ask<const void*>(torch_get_const_data_ptr)); }

  bool read(TensorFacts& facts) const {
    if (storage() == nullptr) return false;
    const uintptr_t before_it = static_cast<uintptr_t>(storage_offset()) * static_cast<uintptr_t>(itemsize());
    facts = {dtype(),          sizes().size(),  sizes().data(),        strides().data(),  numel(),
             storage_offset(), storage_bytes(), address() - before_it, is_lazily_cloned()};
    return true;
  }

  int gpu_index() const { return device().index; }

  bool may_have_graph() const { return any_torch::at<void*>(impl(), places.autograd) != nullptr; }

  void bump_version() const {
    void* const version = any_torch::at<void*>(impl(), places.version);
    if (version != nullptr) ++any_torch::at<std::atomic<uint32_t>>(version, places.count);
  }

  // A tensor that is gone must not be read, not even for its address.
  DRACOPT_INLINE void prefetch() const { dracopt::prefetch(place_); }

  DRACOPT_INLINE void prefetch_storage() const { dracopt::prefetch(storage()); }

  DRACOPT_INLINE void prefetch_version() const { dracopt::prefetch(any_torch::at<void*>(impl(), places.version)); }

  HeldMemory hold_memory() const {
    AtenTensorHandle alias;
    any_torch::check(aoti_torch__reinterpret_tensor(handle(), 0, nullptr, nullptr, 0, &alias),
                     "keep the memory of a tensor");
    return HeldMemory(alias);
  }

 private:
  friend class Memory;
  explicit Tensor(void** place) : place_(place) {}

  bool has_only(uint64_t key, uint64_t allowed) const {
    const uint64_t keys = key_set();
    return (keys & ~(allowed | places.in_place)) == 0 && (keys & key) == key && storage() != nullptr;
  }

  const void* impl() const { return *place_; }
  AtenTensorHandle handle() const { return reinterpret_cast<AtenTensorHandle>(place_); }
  const void* storage() const { return any_torch::at<void*>(impl(), places.storage); }
  template <typename Answer>
  Answer ask(AOTITorchError (*function)(AtenTensorHandle, Answer*)) const {
    Answer answer{};
    function(handle(), &answer);  // fails only for tensors that are not plain, and leaves a zero
    return answer;
  }

  // Returns a number for each dimension; none if torch does not tell.
  std::span<const int64_t> list_of(AOTITorchError (*function)(AtenTensorHandle, int64_t**)) const {
    const int64_t* const list = ask<int64_t*>(function);
    if (list == nullptr) return {};
    return {list, static_cast<size_t>(ask<int64_t>(aoti_torch_get_dim))};
  }

  void** place_ = nullptr;  // the at::Tensor that holds the tensor
};

class Memory {
 public:
  Memory() = default;

  Memory(size_t bytes, Device device) : Memory(bytes, aoti_torch_dtype_uint8(), device, aoti_torch_empty_strided) {}

  static Memory on_host(size_t bytes, Device for_device) {
    const auto allocate = for_device.needs_pinned_memory() ? aoti_torch_empty_strided_pinned : aoti_torch_empty_strided;
    return Memory(bytes, aoti_torch_dtype_uint8(), {0, 0}, allocate);
  }

  static Memory of(Tensor number, Device device) {
    Memory memory;
    memory.data_ = reinterpret_cast<char*>(number.address());
    if (number.device() == device) return memory;
    memory = Memory(1, number.dtype(), device, aoti_torch_empty_strided);
    any_torch::check(aoti_torch_copy_(memory.handle(), number.handle(), true), "copy a number to a GPU");
    return memory;
  }

  void copy_from(const Memory& other) {
    any_torch::check(aoti_torch_copy_(handle(), other.handle(), true), "copy to a GPU");
  }

  char* data() const { return data_; }

 private:
  Memory(size_t count, int32_t dtype, Device device, decltype(&aoti_torch_empty_strided) allocate) {
    const auto size = static_cast<int64_t>(count), stride = int64_t(1);
    AtenTensorHandle made;
    any_torch::check(allocate(1, &size, &stride, dtype, device.type, device.index, &made), "allocate memory");
    tensor_ = std::shared_ptr<AtenTensorOpaque>(made, aoti_torch_delete_tensor_object);
    void* data = nullptr;
    any_torch::check(aoti_torch_get_data_ptr(made, &data), "allocate memory");
    data_ = static_cast<char*>(data);
  }

  AtenTensorHandle handle() const { return tensor_.get(); }

  std::shared_ptr<AtenTensorOpaque> tensor_;
  char* data_ = nullptr;
};

// Makes a GPU the current device.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    if (device.is_gpu()) any_torch::check(aoti_torch_create_device_guard(device.index, &guard_), "select a GPU");
  }
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

inline int64_t current_stream(Device device) {
  StreamHandle stream;
  any_torch::check(aoti_torch_get_current_stream(device.index, &stream), "find a GPU's stream");
  int64_t number = 0;
  aoti_torch_stream_id(stream, &number);
  aoti_torch_delete_stream(stream);
  return number;
}

inline void* current_cuda_stream(Device device) {
#if defined(DRACOPT_SIMULATED_GPU)
  return reinterpret_cast<void*>(current_stream(device));
#else
  // The library that defines this function is loaded only if torch was built with CUDA.
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto current = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<CurrentStream>(function);
  }();
  void* handle = nullptr;
  any_torch::check(current == nullptr ? 1 : current(device.index, &handle), "find a GPU's stream");
  return handle;
#endif
}

inline bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(places.type));
}

inline bool is_exact_tensor(PyObject* object) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == places.type || type == places.parameter;
}

namespace any_torch {

inline bool is_true(PyObject* function, PyObject* argument = nullptr) {
  const auto answer = pybind11::reinterpret_steal<pybind11::object>(
      argument == nullptr ? PyObject_CallNoArgs(function) : PyObject_CallOneArg(function, argument));
  if (!answer) throw pybind11::error_already_set();
  return PyObject_IsTrue(answer.ptr()) == 1;
}

}  // namespace any_torch

inline bool in_inference_mode() { return any_torch::is_true(places.in_inference_mode); }

inline bool is_under_mode() {
  return any_torch::is_true(places.mode_count) || any_torch::is_true(places.has_key, places.pre_dispatch);
}

}  // namespace dracopt

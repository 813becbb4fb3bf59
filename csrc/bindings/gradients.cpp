#include "bindings/gradients.h"

#include <algorithm>
#include <atomic>

#include "bindings/cuda_launches.h"
#include "bindings/runner.h"
#include "bindings/tensor_facts.h"
#include "bindings/written_memory.h"
#include "core/squares.h"

namespace py = pybind11;

namespace dracopt {
namespace {

// A thread is not worth waking for fewer bytes, because it takes the gradients out of another core's cache.
constexpr int64_t kGrainBytes = 1 << 20;

// Says whether kernels can read a plain tensor.
bool is_readable(Tensor tensor) {
  const Format& format = format_of(tensor);
  return format.is_native && !lacks_memory(tensor, extent_of(tensor), tensor.itemsize()) &&
         is_aligned(data_of(tensor), format.dtype);
}

// The gradients of a list that the kernels of a device serve, and the list's other items.
class Served {
 public:
  // The list holds gradients, or parameters with gradients if `of_parameters`.
  Served(const py::list& list, bool of_parameters, bool writes, Device device = kHost) {
    const bool under_mode = is_under_mode(), inference_mode = in_inference_mode();
    // These objects rarely lie in the cache, so each pass over a block fetches what the next one follows.
    constexpr size_t block = 16;
    for (size_t begin = 0; begin < list.size(); begin += block) {
      const size_t end = std::min(begin + block, list.size());
      Tensor tensors[block];
      for (size_t i = begin; i < end; ++i) {
        PyObject* const item = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
        if (!is_tensor(item)) throw py::type_error("gradients must be tensors");
        tensors[i - begin] = Tensor::in(item);
        tensors[i - begin].prefetch();
      }
      for (size_t i = begin; of_parameters && i < end; ++i) {
        Tensor& tensor = tensors[i - begin];
        tensor = tensor.grad();
        if (tensor.is_defined()) tensor.prefetch();
      }
      for (size_t i = begin; i < end; ++i) {
        const Tensor tensor = tensors[i - begin];
        if (!tensor.is_defined()) continue;
        const py::handle item = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
        const bool is_here =
            device.is_cpu() ? tensor.is_plain_on_cpu() : tensor.is_plain_on_gpu() && tensor.device() == device;
        const bool serves = !under_mode && is_here && is_readable(tensor);
        take(item, tensor, serves && (!writes || is_writable(tensor, inference_mode)));
      }
    }
    if (writes) leave_out_shared_memory();
  }

  const std::vector<Segment>& segments() const { return segments_; }

  // Changes all gradients by a kernel, whose scalar is `number`.
  void change(const UpdateFn (&kernels)[2], double number) {
    Update updates[2] = {{kernels[0], &number, 1, 1, false, false}, {kernels[1], &number, 1, 1, false, false}};
    for (Segment& segment : segments_) segment.update = &updates[segment.dtypes[kGrad] == Dtype::fp64];
    for (const Tensor tensor : tensors_) tensor.bump_version();
    cpu::Work work{segments_.data(), segments_.size(), number_units(segments_.data(), segments_.size())};
    run([&] { in_parallel(work.units, kGrainBytes / kUnitBytes, cpu::run_range, &work); });
  }

  // Lets other threads run Python meanwhile if the work is long.
  template <typename Body>
  void run(const Body& body) {
    if (bytes_ < HeldMemory::kWorthBytes) return body();
    for (const Tensor tensor : tensors_) memory_.push_back(tensor.hold_memory());
    const py::gil_scoped_release release;
    body();
  }

  py::list others;
  py::list samples;  // one item for each dtype

 private:
  void take(py::handle item, Tensor tensor, bool serves) {
    if (!serves) {
      others.append(item);
      return;
    }
    if (std::find(dtypes_.begin(), dtypes_.end(), tensor.dtype()) == dtypes_.end()) {
      dtypes_.push_back(tensor.dtype());
      samples.append(item);
    }
    items_.push_back(py::reinterpret_borrow<py::object>(item));
    tensors_.push_back(tensor);
    segments_.push_back(segment_of_gradient(tensor, layouts_));
    bytes_ += tensor.numel() * tensor.itemsize();
  }

  // Threads must not change the same memory. torch takes one tensor after the other.
  void leave_out_shared_memory() {
    std::vector<std::pair<const void*, int64_t>> memory;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      memory.emplace_back(segments_[i].data[kGrad], extent_of(tensors_[i]) * tensors_[i].itemsize());
    }
    const std::vector<size_t> shared = overlapping(memory);
    for (size_t i : shared) others.append(items_[i]);
    for (auto i = shared.rbegin(); i != shared.rend(); ++i) {
      const auto at = static_cast<int64_t>(*i);
      items_.erase(items_.begin() + at);
      tensors_.erase(tensors_.begin() + at);
      segments_.erase(segments_.begin() + at);
    }
  }

  std::vector<Segment> segments_;
  std::deque<Layout> layouts_;
  std::vector<Tensor> tensors_;
  std::vector<int> dtypes_;
  int64_t bytes_ = 0;
  // Other code may run while the GIL is released, and take any of this away.
  std::vector<py::object> items_;
  std::vector<HeldMemory> memory_;
};

py::tuple sum_of_squares_in(const py::list& list, bool of_parameters) {
  Served served(list, of_parameters, false);
  cpu::Squares squares{};
  served.run([&] { squares = sum_of_squares(served.segments(), kGrainBytes); });
  return py::make_tuple(squares.sum, served.samples, served.others);
}

// Returns a function that changes the gradients of a list by a kernel.
auto changing(UpdateFn (cpu::Kernels::*kernels)[2]) {
  return [kernels](const py::list& list, bool of_parameters, double number) {
    Served served(list, of_parameters, true);
    served.change(cpu::kernels().*kernels, number);
    return served.others;
  };
}

// Finds the norm of gradients that lie on the GPU of `norm`, in one launch. Returns the list's other gradients, which
// do not count.
py::list measure_on_gpu(const py::list& list, const py::object& norm, const py::object& grad_scale) {
  const Tensor out = Tensor::in(norm.ptr());
  const Served served(list, false, false, out.device());
  CudaLaunches launches({out.device(), Backend::cuda, Arithmetic::fp32, 0}, cpu::kernels().rules[0]);
  const Update update{nullptr, nullptr, 1, 1, false, false};
  const Group group{};
  const uint64_t no_scalars = 0;
  Ready ready{};
  ready.streams.count = kGrad + 1;
  for (Segment segment : served.segments()) {
    // The gradient takes the place of the parameter, too.
    segment.data[kParam] = segment.data[kGrad];
    segment.dtypes[kParam] = segment.dtypes[kGrad];
    segment.dense[kParam] = segment.dense[kGrad];
    segment.update = &update;
    launches.add(segment, ready, group, &no_scalars, 1, segment.layout == nullptr ? nullptr : &segment);
  }
  const Clipping clipping{0, out, false, false, {}};
  if (launches.count() == 0) return served.others;
  launches.upload({{}, grad_scale.is_none() ? Tensor() : Tensor::in(grad_scale.ptr()), {}}, Backends(true, true, {}),
                  true);
  launches.measure({launches.norm(), &clipping, launches.blocks()});
  return served.others;
}

}  // namespace

Segment segment_of_gradient(Tensor gradient, std::deque<Layout>& layouts) {
  const Format& format = format_of(gradient);
  Segment segment{};
  segment.data[kGrad] = data_of(gradient);
  segment.dtypes[kGrad] = format.dtype;
  segment.numel = gradient.numel() * format.reals();
  segment.dense[kGrad] = segment.numel == 0 || gradient.is_non_overlapping_and_dense();
  segment.unit_numel = kUnitBytes / itemsize(format.dtype);
  if (segment.dense[kGrad]) return segment;
  std::vector<int64_t> sizes(gradient.sizes().begin(), gradient.sizes().end()), strides;
  for (int64_t stride : gradient.strides()) strides.push_back(stride * format.reals());
  if (format.is_complex) {
    sizes.push_back(2);
    strides.push_back(1);
  }
  const int64_t* const of_streams[] = {strides.data(), strides.data()};  // of the parameter, which is absent
  segment.layout =
      &layouts.emplace_back(make_layout(static_cast<int>(sizes.size()), sizes.data(), kGrad + 1, of_streams));
  return segment;
}

cpu::Squares sum_of_squares(const std::vector<Segment>& gradients, int64_t grain_bytes) {
  struct Share {
    const std::vector<Segment>& gradients;
    std::vector<int64_t> first_chunks;
    decltype(cpu::Kernels::squares) squares;
    ExactSum sum{};
  } share{gradients, std::vector<int64_t>(gradients.size() + 1), cpu::kernels().squares};
  int64_t bytes = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    share.first_chunks[i + 1] = share.first_chunks[i] + chunks_of(gradients[i].numel);
    bytes += gradients[i].numel * itemsize(gradients[i].dtypes[kGrad]);
  }
  const int64_t chunks = share.first_chunks.back();
  in_parallel(
      chunks, std::max<int64_t>(chunks * grain_bytes / std::max<int64_t>(bytes, 1), 1),
      [](int64_t begin, int64_t end, void* context) {
        auto& mine = *static_cast<Share*>(context);
        ExactSum sum{};
        const auto next = std::upper_bound(mine.first_chunks.begin(), mine.first_chunks.end(), begin);
        for (auto i = static_cast<size_t>(next - mine.first_chunks.begin()) - 1; begin < end; ++i) {
          for (; begin < end && begin < mine.first_chunks[i + 1]; ++begin) {
            const cpu::Squares chunk = mine.squares(mine.gradients[i], begin - mine.first_chunks[i]);
            sum.add(chunk.sum);
            sum.words[ExactSum::kOther] += !chunk.finite;
          }
        }
        for (int k = 0; k < ExactSum::kWords; ++k) {
          if (sum.words[k] != 0) std::atomic_ref<int64_t>(mine.sum.words[k]) += sum.words[k];
        }
      },
      &share);
  return {share.sum.rounded(), share.sum.words[ExactSum::kOther] == 0};
}

void define_gradients(py::module_& m) {
  m.def("sum_of_squares", &sum_of_squares_in, py::arg("gradients"), py::arg("of_parameters"));
  const auto define = [&m](const char* name, UpdateFn(cpu::Kernels::* kernels)[2]) {
    m.def(name, changing(kernels), py::arg("gradients"), py::arg("of_parameters"), py::arg("number") = 0.0);
  };
  m.def("measure_on_gpu", &measure_on_gpu, py::arg("gradients"), py::arg("norm"), py::arg("grad_scale"));
  define("multiply_gradients", &cpu::Kernels::multiply);
  define("limit_gradients", &cpu::Kernels::limit);
  define("zero_gradients", &cpu::Kernels::zero);
}

}  // namespace dracopt

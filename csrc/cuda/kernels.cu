// The update kernel, for every rule and both arithmetics, and its launcher.
#include "cuda/kernels.h"

#include <cuda_runtime.h>

#include <cstring>
#include <vector>

#include "cuda/squares.h"
#include "cuda/update.h"
#include "rules/all.h"

namespace dracopt {
namespace cuda {
namespace {

template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? kBlocks : 1)
    step_kernel(const __grid_constant__ Arguments arguments) {
  using RuleScalars = typename Rule::template Scalars<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const bool skips = arguments.found_inf != nullptr && *arguments.found_inf != 0;
  if (skips && arguments.zeroes == 0) return;

  const Tile found = tile_of(arguments, blockIdx.x,
                             [](const auto& holds) -> uint32_t { return __syncthreads_count(holds(threadIdx.x)); });
  // One thread prepares the scalars for all. Shared memory takes no registers, which are scarce in the loops.
  __shared__ Tile tile;
  __shared__ uint64_t shared[sizeof(RuleScalars) / sizeof(uint64_t) + 1];
  RuleScalars& scalars = *reinterpret_cast<RuleScalars*>(shared);
  if (thread == 0) {
    tile = found;
    const Row& row = arguments.rows[found.row];
    scalars = row.has_recipe ? scalars_from_recipe<Rule, T>(arguments, row)
                             : *reinterpret_cast<const RuleScalars*>(arguments.words + row.slot);
  }
  __syncthreads();
  if (!skips) update<Rule, T>(arguments, tile, scalars, thread);
  if (arguments.zeroes != 0) {
    __syncthreads();
    zero_gradient(arguments, tile, thread);
  }

  if (skips || arguments.finished == nullptr) return;
  // The last block to come here advances the state scalars, because all others have read them.
  __shared__ bool last;
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    last = atomicInc(arguments.finished, arguments.blocks - 1) == arguments.blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  for (uint32_t i = threadIdx.x; i < arguments.count; i += kThreads) advance<Rule>(arguments, arguments.rows[i]);
}

// Adds what all threads of a block hold. Each gets the sum.
__device__ double sum_of_block(double sum) {
  constexpr int lanes = 32, warps = kThreads / lanes;
  __shared__ double of_warps[warps];
  for (int distance = 1; distance < lanes; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % lanes == 0) of_warps[threadIdx.x / lanes] = sum;
  __syncthreads();
  double sums[warps];
  DRACOPT_UNROLL
  for (int warp = 0; warp < warps; ++warp) sums[warp] = of_warps[warp];
  return sum_of_pairs(sums, warps);
}

// Measures the gradients. The last block of all launches derives what the update kernel needs.
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ Arguments arguments) {
  const int thread = static_cast<int>(threadIdx.x);
  const Tile tile = tile_of(arguments, blockIdx.x,
                            [](const auto& holds) -> uint32_t { return __syncthreads_count(holds(threadIdx.x)); });
  const Part mine = squares_of_thread(arguments, tile, thread);
  const bool finite = __syncthreads_and(mine.finite) != 0;
  const double sum = sum_of_block(mine.sum);
  Norm& norm = *arguments.norm;
  __shared__ bool last;
  if (thread == 0) {
    int64_t* const words = norm.sums[blockIdx.x % Norm::kSums].words;
    const auto add = [&](int word, int64_t value) {
      atomicAdd(reinterpret_cast<unsigned long long*>(words + word), static_cast<unsigned long long>(value));
    };
    ExactSum::take_apart(sum, add);
    if (!finite) add(ExactSum::kOther, 1);
    __threadfence();
    last = atomicInc(&norm.finished, arguments.blocks_in_all - 1) == arguments.blocks_in_all - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  __shared__ ExactSum total;
  for (int k = thread; k < ExactSum::kWords; k += kThreads) {
    int64_t word = 0;
    for (ExactSum& part : norm.sums) {
      word += *static_cast<volatile int64_t*>(part.words + k);
      part.words[k] = 0;  // for the next step
    }
    total.words[k] = word;
  }
  __syncthreads();
  if (thread == 0) finish(arguments, total);
}

// The kernels, by the rule's index and the arithmetic.
#define DRACOPT_KERNELS(Rule) {step_kernel<Rule, float>, step_kernel<Rule, double>},
void (*const kKernels[][2])(Arguments) = {DRACOPT_FOR_EACH_RULE(DRACOPT_KERNELS)};

// A piece of a table, passed by value.
struct Piece {
  static constexpr size_t kBytes = kArgumentBytes / sizeof(Vector) * sizeof(Vector) - sizeof(Vector);
  Vector vectors[kBytes / sizeof(Vector)];
  Vector* to;
  uint32_t count;
};
static_assert(sizeof(Piece) <= kArgumentBytes);

// Each thread writes one vector. The threads of a warp wait for each other where they index the arguments; many
// multiprocessors therefore share the work.
__global__ void write_piece(const __grid_constant__ Piece piece) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < piece.count) piece.to[i] = piece.vectors[i];
}

const char* name_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorName(error); }

template <typename Argument>
const char* launch_kernel(void (*kernel)(Argument), uint32_t blocks, const Argument& argument, void* stream) {
  void* pointer = const_cast<Argument*>(&argument);
  return name_of(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads), &pointer, 0,
                                  static_cast<cudaStream_t>(stream)));
}

// Machine code runs on later GPUs of its generation, and PTX on all later GPUs.
bool serves(int major, int minor) {
  const int capability = 100 * major + 10 * minor;
  for (const int architecture : architectures()) {
    if (architecture / 100 == major && architecture <= capability) return true;
  }
  return capability >= DRACOPT_PTX;
}

}  // namespace

const char* unavailable(int device) {
  static const std::vector<const char*> reasons = [] {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error, which no later call must report
      return std::vector<const char*>{cudaGetErrorString(error)};
    }
    std::vector<const char*> found;
    for (int i = 0; i < devices; ++i) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
      found.push_back(serves(major, minor) ? nullptr : "they were not compiled for its compute capability");
    }
    return found;
  }();
  if (reasons.empty()) return "no CUDA-capable device is detected";
  const auto index = static_cast<size_t>(device);
  return index < reasons.size() ? reasons[index] : reasons.front();
}

const std::vector<int>& architectures() {
  static const std::vector<int> list = [] {
    std::vector<int> found = {__CUDA_ARCH_LIST__};
    std::erase(found, DRACOPT_PTX);
    return found;
  }();
  return list;
}

const char* launch(int rule, Arithmetic arithmetic, const Arguments& arguments, void* stream) {
  return launch_kernel(kKernels[rule][static_cast<int>(arithmetic)], arguments.blocks, arguments, stream);
}

const char* measure(const Arguments& arguments, void* stream) {
  if constexpr (kMeasures) return launch_kernel(squares_kernel, arguments.blocks, arguments, stream);
  return name_of(cudaErrorNotSupported);
}

const char* write_table(void* to, const void* from, size_t bytes, void* stream) {
  Piece piece;
  for (size_t done = 0; done < bytes; done += Piece::kBytes) {
    const size_t size = bytes - done < Piece::kBytes ? bytes - done : Piece::kBytes;
    std::memcpy(piece.vectors, static_cast<const char*>(from) + done, size);
    piece.to = reinterpret_cast<Vector*>(static_cast<char*>(to) + done);
    piece.count = static_cast<uint32_t>(size / sizeof(Vector));
    const char* const error = launch_kernel(write_piece, (piece.count + kThreads - 1) / kThreads, piece, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

const char* is_capturing(void* stream, bool& answer) {
  cudaStreamCaptureStatus status;
  const char* const error = name_of(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  answer = error == nullptr && status != cudaStreamCaptureStatusNone;
  return error;
}

}  // namespace cuda
}  // namespace dracopt

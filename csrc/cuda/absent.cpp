// Replaces kernels.cu in a build without nvcc.
#include "cuda/kernels.h"

namespace dracopt {
namespace cuda {

const char* unavailable(int) { return "compiled without the CUDA kernels"; }

const std::vector<int>& architectures() {
  static const std::vector<int> none;
  return none;
}

const char* launch(int, Arithmetic, const Arguments&, void*) { return unavailable(0); }
const char* measure(const Arguments&, void*) { return unavailable(0); }
const char* write_table(void*, const void*, size_t, void*) { return unavailable(0); }
const char* is_capturing(void*, bool& answer) { return answer = false, nullptr; }

}  // namespace cuda
}  // namespace dracopt

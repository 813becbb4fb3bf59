// The project's own kernels, compiled again with other constants (-DDRACOPT_TILE=4096 and so on) in a namespace of
// their own (-Ddracopt=NAME).
#include "cuda/kernels.cu"
#include "variants.h"

#define DRACOPT_TEXT(name) #name
#define DRACOPT_NAME(name) DRACOPT_TEXT(name)

namespace dracopt {
namespace cuda {
namespace {

const bool kKnown = [] {
  const auto* const kernel =
      reinterpret_cast<const void*>(kKernels[rule_index<Adam>()][static_cast<int>(Arithmetic::fp32)]);
  variants().push_back({DRACOPT_NAME(dracopt), DRACOPT_ABOUT, kThreads, kTile, kernel});
  return true;
}();

}  // namespace
}  // namespace cuda
}  // namespace dracopt

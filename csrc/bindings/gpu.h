// The devices that the CUDA kernels serve.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>

namespace dracopt {

#if defined(DRACOPT_SIMULATED_GPU)  // the tests' device, which lies in the host's memory
constexpr c10::DeviceType kGpu = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kGpuKey(c10::DispatchKey::PrivateUse1);
constexpr c10::DispatchKeySet kGpuKeys = kGpuKey | c10::DispatchKeySet(c10::DispatchKey::AutogradPrivateUse1) |
                                         c10::DispatchKeySet(c10::DispatchKey::AutocastPrivateUse1);
#else
constexpr c10::DeviceType kGpu = c10::DeviceType::CUDA;
constexpr c10::DispatchKeySet kGpuKey(c10::DispatchKey::CUDA);
constexpr c10::DispatchKeySet kGpuKeys =
    kGpuKey | c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) | c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA);
#endif

}  // namespace dracopt

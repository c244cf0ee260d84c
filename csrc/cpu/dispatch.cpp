#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(EDITR2_X86)
#include <cpuid.h>
namespace editr2_avx512 { extern const editr2::Kernels kernels; }
namespace editr2_avx2 { extern const editr2::Kernels kernels; }
#endif
namespace editr2_baseline { extern const editr2::Kernels kernels; }

namespace editr2 {
namespace {

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
#if defined(EDITR2_X86)
  // __builtin_cpu_supports also asks the operating system whether the registers are saved; F16C has
  // no name there before GCC 11, hence the bit itself.
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29)) != 0;
  __builtin_cpu_init();
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&editr2_avx512::kernels);
  if (avx2) found.push_back(&editr2_avx2::kernels);
#endif
  found.push_back(&editr2_baseline::kernels);
  return found;
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> list = detect();
  return list;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& active_kernels() { return *active().load(); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : supported()) names.emplace_back(k->name);
  return names;
}

void set_isa(const std::string& name) {
  std::string accepted;
  for (const Kernels* k : supported()) {
    if (name == k->name) {
      active().store(k);
      return;
    }
    accepted += (accepted.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("name: got '" + name + "', this processor and build have: " + accepted);
}

}  // namespace editr2

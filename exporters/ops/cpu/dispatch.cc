// Which table of kernels runs: decided by what the CPU says that it has.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace swquant::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool here;
};

const Kernels& choose() {
  const Choice choices[] = {
#if defined(SWQUANT_SIMDE)  // the AVX-512 source, emulated: tests on a CPU without it
      {&kAvx512, true},
#elif defined(__x86_64__)
      {&kAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")},
#endif
#if defined(__x86_64__)
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kPortable, true},
  };
  const char* wanted = std::getenv("SWQUANT_CPU");
  for (const Choice& choice : choices) {
    if (!wanted || !*wanted) {
      if (choice.here) return *choice.kernels;
    } else if (!std::strcmp(wanted, choice.kernels->name)) {
      if (!choice.here) fail("SWQUANT_CPU is %s, which this CPU does not have", wanted);
      return *choice.kernels;
    }
  }
  fail("SWQUANT_CPU is %s; known are portable, avx2 and avx512 (the latter two on x86-64)", wanted);
}

}  // namespace

const Kernels& kernels() { return choose(); }  // asked once per node, so that tests can change their mind

}  // namespace swquant::cpu

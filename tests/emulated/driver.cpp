// NVIDIA's and AMD's driver APIs for a device that is the CPU: a module is the path of a library of emulated kernels, a launch
// runs them. What was called, with what, is kept.
#include <dlfcn.h>

#include <cstddef>
#include <string>

namespace {

std::string called;

using Kernel = const char* (*)(unsigned blocks, int threads, unsigned seed, void** arguments);

void keep(const char* name, const void* of, size_t a, size_t b = 0, size_t c = 0, const void* d = nullptr) {
  Dl_info info{};
  if (of) dladdr(of, &info);
  called += std::string(name) + " " + (info.dli_sname ? info.dli_sname : "-");
  for (const size_t n : {a, b, c, reinterpret_cast<size_t>(d)}) called += " " + std::to_string(n);
  called += "\n";
}

int load(const char* name, void** module, const void* image) {
  keep(name, nullptr, 0);
  *module = dlopen(static_cast<const char*>(image), RTLD_NOW);
  return *module ? 0 : 200;  // invalid image
}

int find(const char* name, void** function, void* module, const char* kernel) {
  *function = dlsym(module, (std::string("emulate_") + kernel).c_str());
  keep(name, *function, 0);
  return *function ? 0 : 500;  // not found
}

int start(const char* name, void* function, unsigned blocks, unsigned threads, unsigned shared, void* stream, void** arguments) {
  keep(name, function, blocks, threads, shared, stream);
  if (!blocks || threads > 1024) return 1;  // invalid value
  return reinterpret_cast<Kernel>(function)(blocks, static_cast<int>(threads), 3, arguments) ? 719 : 0;
}

}  // namespace

extern "C" {

const char* emulated_calls() {
  static std::string last;
  last.swap(called);
  called.clear();
  return last.c_str();
}

int cuModuleLoadData(void** module, const void* image) { return load("cuModuleLoadData", module, image); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return find("cuModuleGetFunction", function, module, name); }
int cuFuncSetAttribute(void* function, int attribute, int value) {
  keep("cuFuncSetAttribute", function, attribute, value);
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned, unsigned shared, void* stream, void** arguments, void**) {
  return start("cuLaunchKernel", function, gx, bx, shared, stream, arguments);
}
int cuGetErrorString(int error, const char** words) {
  *words = error == 1 ? "invalid argument" : "unspecified launch failure";
  return 0;
}
int cuGetProcAddress_v2(const char* symbol, void** function, int, unsigned long long, int* status) {
  static void* const self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *function = dlsym(self, symbol);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}

int hipModuleLoadData(void** module, const void* image) { return load("hipModuleLoadData", module, image); }
int hipModuleGetFunction(void** function, void* module, const char* name) { return find("hipModuleGetFunction", function, module, name); }
int hipModuleLaunchKernel(void* function, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned, unsigned shared, void* stream, void** arguments, void**) {
  return start("hipModuleLaunchKernel", function, gx, bx, shared, stream, arguments);
}

}  // extern "C"

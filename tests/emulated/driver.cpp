// NVIDIA's and AMD's driver APIs for two devices that are the CPU: a module is the path of a library of emulated kernels, a launch
// runs them. NVIDIA's does nothing on a thread without a context, AMD's gives every thread the first device; a module belongs to
// the context that loaded it. What was called, with what, is kept.
#include <dlfcn.h>

#include <cstddef>
#include <map>
#include <string>

namespace {

constexpr int INVALID_CONTEXT = 201, INVALID_HANDLE = 400;

std::string called;
std::map<void*, size_t> homes;      // of modules and functions: their contexts
thread_local size_t context = 0;    // of NVIDIA's driver: the ordinal and 1, or none
thread_local size_t device = 1;     // of AMD's
size_t capture = 0;                 // under way, or none

using Kernel = const char* (*)(unsigned blocks, int threads, unsigned seed, void** arguments);

void keep(const char* name, const void* of, size_t a, size_t b = 0, size_t c = 0, const void* d = nullptr) {
  Dl_info info{};
  if (of) dladdr(of, &info);
  called += std::string(name) + " " + (info.dli_sname ? info.dli_sname : "-");
  for (const size_t n : {a, b, c, reinterpret_cast<size_t>(d)}) called += " " + std::to_string(n);
  called += "\n";
}

int load(const char* name, void** module, const void* image, size_t home) {
  keep(name, nullptr, home);
  if (!home) return INVALID_CONTEXT;
  void* const library = dlopen(static_cast<const char*>(image), RTLD_NOW);
  if (!library) return 200;  // invalid image
  *module = new void*(library);
  homes[*module] = home;
  return 0;
}

int find(const char* name, void** function, void* module, const char* kernel, size_t home) {
  void* const found = dlsym(*static_cast<void**>(module), (std::string("emulate_") + kernel).c_str());
  keep(name, found, 0);
  if (!home) return INVALID_CONTEXT;
  if (!found) return 500;  // not found
  *function = new void*(found);
  homes[*function] = homes[module];
  return 0;
}

int start(const char* name, void* of, unsigned blocks, unsigned threads, unsigned shared, void* stream, void** arguments, size_t home) {
  void* const function = *static_cast<void**>(of);
  keep(name, function, blocks, threads, shared, stream);
  if (!home) return INVALID_CONTEXT;
  if (homes[of] != home) return INVALID_HANDLE;
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

// What torch does when its current device changes.
void emulated_set_device(int ordinal) { device = context = ordinal + 1; }
void emulated_capture(size_t number) { capture = number; }

int cuCtxGetCurrent(void** current) {
  *current = reinterpret_cast<void*>(context);
  return 0;
}
int cuCtxSetCurrent(void* chosen) {
  context = reinterpret_cast<size_t>(chosen);
  keep("cuCtxSetCurrent", nullptr, context);
  return 0;
}
int cuDeviceGet(int* found, int ordinal) {
  *found = ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** primary, int of) {
  *primary = reinterpret_cast<void*>(static_cast<size_t>(of) + 1);
  keep("cuDevicePrimaryCtxRetain", nullptr, of);
  return 0;
}
int cuStreamGetCaptureInfo(void*, int* status, unsigned long long* number, void**, const void**, const void**, size_t*) {
  *status = capture != 0;
  *number = capture;
  return context ? 0 : INVALID_CONTEXT;
}
int cuModuleLoadData(void** module, const void* image) { return load("cuModuleLoadData", module, image, context); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return find("cuModuleGetFunction", function, module, name, context); }
int cuFuncSetAttribute(void* function, int attribute, int value) {
  keep("cuFuncSetAttribute", *static_cast<void**>(function), attribute, value);
  return context ? 0 : INVALID_CONTEXT;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned, unsigned shared, void* stream, void** arguments, void**) {
  return start("cuLaunchKernel", function, gx, bx, shared, stream, arguments, context);
}
int cuGetErrorString(int error, const char** words) {
  *words = error == 1 ? "invalid argument" : error == INVALID_CONTEXT ? "invalid device context" : error == INVALID_HANDLE ? "invalid resource handle" : "unspecified launch failure";
  return 0;
}
int cuGetProcAddress_v2(const char* symbol, void** function, int, unsigned long long, int* status) {
  static void* const self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *function = dlsym(self, symbol);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}

int hipStreamGetCaptureInfo(void*, int* status, unsigned long long* number) {
  *status = capture != 0;
  *number = capture;
  return 0;
}
int hipModuleLoadData(void** module, const void* image) { return load("hipModuleLoadData", module, image, device); }
int hipModuleGetFunction(void** function, void* module, const char* name) { return find("hipModuleGetFunction", function, module, name, device); }
int hipModuleLaunchKernel(void* function, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned, unsigned shared, void* stream, void** arguments, void**) {
  return start("hipModuleLaunchKernel", function, gx, bx, shared, stream, arguments, device);
}

}  // extern "C"

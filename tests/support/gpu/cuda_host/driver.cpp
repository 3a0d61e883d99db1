// The functions of libcuda that loader/cuda/device/driver.py calls, with kernels on the CPU.
#include <cstdint>
#include <cstring>

extern "C" {
int host_launch(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, void** arguments);

thread_local void* current = nullptr;

int cuCtxGetCurrent(void** context) {
  current = *context = const_cast<char*>("context");
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}
// Whole pages only, as in the real driver.
int cuMemHostRegister_v2(void* at, size_t bytes, unsigned flags) {
  return !current ? 201 : flags == 1 && uintptr_t(at) % 4096 == 0 && bytes % 4096 == 0 ? 0 : 1;
}
int cuMemHostUnregister(void*) { return current ? 0 : 201; }

int max_shared = 48 << 10;

int cuModuleLoadData(void** module, const char* image) {
  *module = const_cast<char*>("module");
  return std::strcmp(image, "cubin") ? 200 : 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = strdup(name);
  return std::strcmp(name, "nothing") ? 0 : 500;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  if (attribute != 8 || value > 64 << 10) return 1;
  max_shared = value;
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared_bytes, void* stream, void** arguments, void**) {
  if (!current) return 201;
  if (stream != reinterpret_cast<void*>(7) || int(shared_bytes) > max_shared) return 1;
  const unsigned grid[3] = {x, y, z};
  return host_launch(static_cast<const char*>(function), grid, threads, shared_bytes, arguments);
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 500 ? "named symbol not found" : error == 200 ? "device kernel image is invalid" : "invalid value";
  return 0;
}
}

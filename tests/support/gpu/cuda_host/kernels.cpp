// The kernels of loader/cuda/kernels as CPU functions, launched by name, and the C functions that tests call.
#define MOE_ON_HOST 1
#include "../../loader/cuda/kernels/moe_kernels.cu"

namespace {

using Body = void (*)(void** arguments);

template <auto kFunction>
struct Call;
template <class... A, void (*kFunction)(A...)>
struct Call<kFunction> {
  template <size_t... I>
  static void with(void** arguments, std::index_sequence<I...>) {
    kFunction(*static_cast<A*>(arguments[I])...);
  }
  static void run(void** arguments) { with(arguments, std::index_sequence_for<A...>{}); }
};

struct Entry {
  const char* name;
  Body run;
};

#define X(name) {#name, &Call<&name>::run},
const Entry kEntries[] = {
#include "names.inc"
};
#undef X

}  // namespace

extern "C" {

// Sets the order of threads: 0 ascending, 1 descending, 2 odd ones first.
void host_set_order(int order) { host::machine.order = order; }

// Returns 0, or 1 with a message in host_error: unknown kernel, or a barrier that some threads do not reach.
int host_launch(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, void** arguments) {
  const Entry* entry = nullptr;
  for (const Entry& e : kEntries)
    if (std::strcmp(e.name, name) == 0) entry = &e;
  host::machine.error.clear();
  try {
    if (!entry) throw std::runtime_error(std::string("no kernel ") + name);
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; ++z)
      for (unsigned y = 0; y < grid[1]; ++y)
        for (unsigned x = 0; x < grid[0]; ++x) {
          blockIdx = {x, y, z};
          host::machine.dynamic_shared.assign(shared_bytes + 16, char(0xcd));
          struct Work {
            Body run;
            void** arguments;
          } work{entry->run, arguments};
          host::run_block(
              threads, [](void* w) { static_cast<Work*>(w)->run(static_cast<Work*>(w)->arguments); }, &work);
        }
  } catch (const std::exception& e) {
    host::machine.error = e.what();
    return 1;
  }
  return 0;
}

const char* host_error() { return host::machine.error.c_str(); }

}  // extern "C"

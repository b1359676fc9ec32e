// Linked into wheels, which hold GCC's libstdc++ and must run on systems with an older glibc than that expects.
#include <ios>

// It tells std::shared_ptr whether the process has one thread alone: 0 is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Headers of frameworks include <iostream>, and so have std::cout made ready: no library here writes to it, and what
// it takes, locales and all, is most of libstdc++.
std::ios_base::Init::Init() {}
std::ios_base::Init::~Init() {}

// This is linked into wheels. They contain GCC's libstdc++, and must run with an older glibc than libstdc++ expects.
#include <ios>

// An older glibc lacks this variable. It tells std::shared_ptr whether the process has only one thread, and 0, which
// means that it may have more, is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// The headers of frameworks include <iostream>, and whoever includes it calls this constructor, which sets up std::cout.
// No library here writes to std::cout, and the code that it needs, with locales, is most of libstdc++. So the constructor
// does nothing here.
std::ios_base::Init::Init() {}
std::ios_base::Init::~Init() {}

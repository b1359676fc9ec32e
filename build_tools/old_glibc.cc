// Linked into wheels for systems with an older glibc than GCC's libraries expect. It tells std::shared_ptr whether the
// process has one thread alone: 0 is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

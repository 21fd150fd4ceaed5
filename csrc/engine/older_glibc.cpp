// Linked into wheels that are built on a glibc or libstdc++ newer than those they are to run with
// (FUSEDOPT_OLDER_GLIBC). What is here does what the newer symbols do, by older ones.

#include <new>

#if defined(__x86_64__)
#define FUSEDOPT_FIRST_GLIBC "GLIBC_2.2.5"
#define FUSEDOPT_JUMP(to) "jmp " to "@PLT"
#elif defined(__aarch64__)
#define FUSEDOPT_FIRST_GLIBC "GLIBC_2.17"
#define FUSEDOPT_JUMP(to) "b " to
#endif

// These have been in glibc ever since, and got a second version when they moved to another library
// (in 2.34), or left errno alone (pow, in 2.29). The linker is told to --wrap each of them.
#define FUSEDOPT_OLDER(name)                                                   \
  __asm__(".symver older_" name ", " name "@" FUSEDOPT_FIRST_GLIBC             \
          "\n.pushsection .text\n.globl __wrap_" name "\n.hidden __wrap_" name \
          "\n.type __wrap_" name ", %function\n__wrap_" name                   \
          ":\n" FUSEDOPT_JUMP("older_" name) "\n.popsection")
FUSEDOPT_OLDER("dlopen");
FUSEDOPT_OLDER("dlsym");
FUSEDOPT_OLDER("pow");

// Of glibc 2.32: whether the process never had a second thread, so that counts of shared_ptr need
// not be atomic. False is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Of GCC 11: what `new T[n]` and containers throw of a size that is none.
namespace std {
__attribute__((visibility("hidden"), noreturn)) void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std

// Of GCC 11, which inlines what copies and destroys an exception_ptr, and calls these within.
extern "C" {
void copy_pointer(void* to, const void* from) asm("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_pointer(void* pointer) asm("_ZNSt15__exception_ptr13exception_ptrD1Ev");

__attribute__((visibility("hidden"))) void add_reference(void* pointer) asm(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(void* pointer) {
  void* never_destroyed;
  copy_pointer(&never_destroyed, pointer);
}

__attribute__((visibility("hidden"))) void release(void* pointer) asm(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void* pointer) { destroy_pointer(pointer); }
}

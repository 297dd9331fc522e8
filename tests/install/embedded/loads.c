// Loads a library, as a program does for a plugin, and fails if that changes MXCSR: how this thread
// rounds, and whether subnormal numbers are 0 to it.
#include <dlfcn.h>
#include <stdio.h>
#include <xmmintrin.h>

int main(int argc, char** argv) {
  unsigned before = 0x1f80, after; /* as programs begin without -ffast-math */
  _mm_setcsr(before);
  if (argc != 2 || !dlopen(argv[1], RTLD_NOW)) {
    fprintf(stderr, "cannot load %s\n", argc == 2 ? dlerror() : "anything but one library");
    return 1;
  }
  after = _mm_getcsr();
  printf("MXCSR before 0x%x, after 0x%x\n", before, after);
  return before != after;
}

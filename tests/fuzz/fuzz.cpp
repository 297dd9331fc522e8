// Where a sanitizer finds something, the call is printed as well.
#include "fuzz.hpp"

extern "C" {
void __asan_on_error();
void __asan_on_error() { softmaxlib::fuzz::print_call(); }
void __ubsan_on_report();
void __ubsan_on_report() { softmaxlib::fuzz::print_call(); }
}

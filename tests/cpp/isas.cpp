// Prints which ISAs the tests ran on.
#include <stdio.h>

#include "support.hpp"

int main() { puts(softmaxlib::test::isa_summary().c_str()); }

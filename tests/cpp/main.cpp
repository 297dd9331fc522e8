// Runs the tests and says on which ISAs; --require-isa=avx512,avx2 or SOFTMAXLIB_REQUIRE_ISA makes
// a missing one a failure.
#include <stdlib.h>
#include <string.h>

#include <iostream>
#include <sstream>
#include <string>

#include "support.hpp"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const char* from_environment = getenv("SOFTMAXLIB_REQUIRE_ISA");
  std::string required = from_environment ? from_environment : "";
  constexpr char kFlag[] = "--require-isa=";
  for (int i = 1; i < argc; ++i) {
    if (strncmp(argv[i], kFlag, sizeof(kFlag) - 1)) {
      std::cerr << "unknown argument: " << argv[i] << "\n";
      return 2;
    }
    required = argv[i] + sizeof(kFlag) - 1;
  }
  for (char& c : required)
    if (c == ',') c = ' ';

  bool complete = true;
  std::istringstream names(required);
  for (std::string name; names >> name;) {
    bool found = false;
    for (const softmaxlib_isa isa : softmaxlib::test::isas())
      found |= name == softmaxlib_isa_name(isa);
    if (!found) std::cerr << "required ISA is missing: " << name << "\n";
    complete &= found;
  }
  const int result = RUN_ALL_TESTS();
  std::cout << softmaxlib::test::isa_summary() << "\n";
  return complete ? result : 1;
}

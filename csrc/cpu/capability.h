// Names of the instruction sets, for Python and for tests.
#pragma once
#include <string>

#include "kernels.h"

namespace vitkern {

std::string capability();                      // the set in use
std::string capabilities();                    // those this machine has, best first, separated by spaces
void set_capability(const std::string& name);  // tests only: not while another thread runs a kernel

}  // namespace vitkern

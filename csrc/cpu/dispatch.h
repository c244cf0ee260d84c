// Which instruction set runs: the best one this processor has, or the one chosen by set_isa.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace editr2 {

const Kernels& active_kernels();
std::vector<std::string> supported_isas();   // best first
void set_isa(const std::string& name);       // throws std::invalid_argument when unsupported

}  // namespace editr2

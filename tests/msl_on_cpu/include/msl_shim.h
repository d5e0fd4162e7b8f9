// msl_shim.h - the part of <metal_stdlib> that compute kernels use, for clang on a CPU.
#pragma once
#include "msl_atomic.h"

#ifdef MSL_CHECK  // words of the language that may not be identifiers
#define vertex msl_reserved_word(
#define fragment msl_reserved_word(
#define sampler msl_reserved_word(
#define patch_control_point msl_reserved_word(
#endif

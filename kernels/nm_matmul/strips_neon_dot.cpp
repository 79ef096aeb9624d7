// NEON with vdotq_s32, compiled with +dotprod.
#define EDGESFT_NEON neon_dot
#include "strips_neon.cpp"

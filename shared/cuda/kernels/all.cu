// All kernels, as one translation unit.
#include "layout.cuh"

// All kernels of the product: the one translation unit that is compiled. A line for each file.
#include "attention.cu"
#include "embed.cu"
#include "filter.cu"
#include "linear.cu"
#include "norm.cu"
#include "reduce.cu"
#include "rope.cu"
#include "sampling.cu"

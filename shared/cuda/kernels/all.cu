// All kernels of the product: the one translation unit that is compiled. A line for each file.
#include "embed.cu"
#include "linear.cu"

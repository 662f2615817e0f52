// Included before test_adamw*.cpp: the same tests for the CUDA kernels.
#include "fastft/adamw.h"
#define adamw_cpu(tensors, count, options, threads) adamw_cuda(tensors, count, options, 0, nullptr)

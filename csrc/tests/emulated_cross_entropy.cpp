#include "../cuda/cross_entropy.cu"

// Another emulation runs that kernel: emulated_cross_entropy_bulk.cpp.
bool fastft::cuda::cross_entropy_bulk(const CrossEntropyArgs&, int, cudaStream_t) { return false; }

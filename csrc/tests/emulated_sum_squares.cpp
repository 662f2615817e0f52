#include "../cuda/sum_squares.cu"

#include "../cuda/adamw.cu"

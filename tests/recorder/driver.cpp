// What is asked of CUDA's driver itself; see runtime.cpp.
extern "C" {
int cudaGetDeviceCount(int* count);

int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count); }
}

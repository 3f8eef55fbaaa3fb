/* CUDA's runtime and driver without a GPU, for LD_PRELOAD: device memory is memory of the host, and no kernel runs.

   Meaner than a GPU: memory that nobody wrote is NaN, and what is copied asynchronously arrives when somebody waits for
   it or asks, never before. SVDQ_GPU_MIB is the size of the memory, SVDQ_GPU_ARCH the compute capability (89), and with
   SVDQ_GPU_NO_WAIT=1 streams do not wait for events, which shows that a test would see a missing wait. With
   SVDQ_GPU_IDLE=1 kernels are launched, and do nothing: what is left is the time that the host needs.
   Of the API there is what torch, ComfyUI and comfy-aimdo call; everything else fails as on a machine without a driver.
   Names and meanings: CUDA Runtime API and CUDA Driver API, version 13. */

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define SHARED (setting("SVDQ_GPU_IDLE", 0) ? 232448 : 101376) /* bytes; compiled code is not looked at if idle */
#define PAGE ((size_t)2 << 20) /* of virtual memory */
#define API __attribute__((visibility("default")))

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static size_t setting(const char *name, size_t otherwise) {
    const char *value = getenv(name);
    return value ? strtoull(value, NULL, 10) : otherwise;
}
static size_t capacity(void) { return setting("SVDQ_GPU_MIB", 12288) << 20; }
static int arch(void) { return (int)setting("SVDQ_GPU_ARCH", 89); }
static int devices(void) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    return !(visible && !*visible);
}

/* ---- errors, as cudaGetLastError has them: the last one of each thread */

static __thread int last;
static int fail(int error) { return last = error; }
static const char *text(int error) {
    switch (error) {
    case 0: return "no error";
    case 2: return "out of memory";
    case 98: return "invalid device function";
    case 900: return "operation not permitted when stream is capturing";
    default: return "an error of the emulated GPU";
    }
}
API cudaError_t cudaGetLastError(void) { int e = last; last = 0; return e; }
API cudaError_t cudaPeekAtLastError(void) { return last; }
API const char *cudaGetErrorString(cudaError_t e) { return text(e); }
API const char *cudaGetErrorName(cudaError_t e) { return text(e); }
API CUresult cuGetErrorString(CUresult e, const char **s) { *s = text(e); return 0; }
API CUresult cuGetErrorName(CUresult e, const char **s) { *s = text(e); return 0; }

/* ---- streams and events: a queue of copies each; the legacy stream copies at once */

struct copy { void *to; const void *from; size_t size; unsigned long number; struct copy *next; };
struct stream { int capturing; unsigned long number; struct copy *first, **end; struct stream *next; };
struct event { struct stream *stream; unsigned long number; struct timespec time; };

static struct stream legacy, *streams;

static struct stream *stream_of(void *handle) { return (size_t)handle <= 2 ? &legacy : handle; }
static void arrive(struct stream *s, unsigned long number) {
    while (s->first && s->first->number <= number) {
        struct copy *c = s->first;
        if (!(s->first = c->next)) s->end = &s->first;
        memmove(c->to, c->from, c->size);
        free(c);
    }
}
static void arrive_all(void) {
    for (struct stream *s = streams; s; s = s->next) arrive(s, ~0ul);
}
API void svdq_gpu_arrive(void *handle) { /* what a kernel on this stream would see */
    pthread_mutex_lock(&lock);
    arrive(stream_of(handle), ~0ul);
    pthread_mutex_unlock(&lock);
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    struct stream *made = calloc(1, sizeof *made);
    made->end = &made->first;
    pthread_mutex_lock(&lock);
    made->next = streams;
    streams = made;
    pthread_mutex_unlock(&lock);
    *s = (void *)made;
    return 0;
}
API cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return 0; }
API cudaError_t cudaStreamQuery(cudaStream_t s) { svdq_gpu_arrive(s); return 0; }
API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (stream_of(s)->capturing) return fail(cudaErrorStreamCaptureUnsupported);
    svdq_gpu_arrive(s);
    return 0;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = stream_of(s)->capturing;
    return 0;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *count) {
    if (id) *id = 1;
    if (graph) *graph = (void *)1;
    if (count) *count = 0;
    return cudaStreamIsCapturing(s, status);
}
API cudaError_t cudaDeviceSynchronize(void) {
    pthread_mutex_lock(&lock);
    arrive_all();
    pthread_mutex_unlock(&lock);
    return 0;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    *e = calloc(1, sizeof(struct event));
    return 0;
}
API cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return 0; }
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t s) {
    struct event *e = (void *)handle;
    pthread_mutex_lock(&lock);
    e->stream = stream_of(s);
    e->number = e->stream->number;
    clock_gettime(CLOCK_MONOTONIC, &e->time);
    pthread_mutex_unlock(&lock);
    return 0;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    struct event *e = (void *)handle;
    pthread_mutex_lock(&lock);
    if (e->stream) arrive(e->stream, e->number);
    pthread_mutex_unlock(&lock);
    return 0;
}
API cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaEventSynchronize(e); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
    return setting("SVDQ_GPU_NO_WAIT", 0) ? 0 : cudaEventSynchronize(e);
}
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    struct timespec a = ((struct event *)from)->time, b = ((struct event *)to)->time;
    *ms = (b.tv_sec - a.tv_sec) * 1e3f + (b.tv_nsec - a.tv_nsec) / 1e6f;
    return 0;
}

/* ---- graphs: what is captured runs at once, and never again */

API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return 0; }
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    if (stream_of(s) == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
    stream_of(s)->capturing = 1;
    return 0;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    stream_of(s)->capturing = 0;
    *graph = (void *)1;
    return 0;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags) {
    *e = (void *)1;
    return 0;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return 0; }
API cudaError_t cudaGraphDestroy(cudaGraph_t g) { return 0; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return 0; }

/* ---- memory */

enum { HOST = 1, DEVICE = 2 };
struct block { char *start; size_t size; int kind; struct block *next; };

static struct block *blocks;
static size_t used;

static struct block **find(const void *address) {
    struct block **b = &blocks;
    while (*b && !((char *)address >= (*b)->start && (char *)address < (*b)->start + (*b)->size)) b = &(*b)->next;
    return b;
}
static void remember(void *start, size_t size, int kind) {
    struct block *b = malloc(sizeof *b);
    *b = (struct block){start, size, kind, blocks};
    blocks = b;
}
static size_t forget(void *start) { /* the size of the block that began here, or 0 */
    struct block **b = find(start), *found = *b;
    if (!found || found->start != start) return 0;
    size_t size = found->size;
    *b = found->next;
    free(found);
    return size;
}
static int reserve(size_t size) {
    if (used + size > capacity()) return fail(cudaErrorMemoryAllocation);
    used += size;
    return 0;
}
API cudaError_t cudaMalloc(void **p, size_t size) {
    pthread_mutex_lock(&lock);
    int error = reserve(size);
    if (!error && (*p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) == MAP_FAILED) {
        used -= size;
        error = fail(cudaErrorMemoryAllocation);
    }
    if (!error) {
        memset(*p, 0xFF, size); /* NaN */
        remember(*p, size, DEVICE);
    }
    pthread_mutex_unlock(&lock);
    return error;
}
API cudaError_t cudaFree(void *p) {
    if (!p) return 0;
    pthread_mutex_lock(&lock);
    arrive_all();
    size_t size = forget(p);
    if (size) munmap(p, size);
    used -= size;
    pthread_mutex_unlock(&lock);
    return size ? 0 : fail(cudaErrorInvalidValue);
}
API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = capacity();
    *free = *total - used;
    return 0;
}
API cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) {
    pthread_mutex_lock(&lock);
    int error = *find(p) ? fail(cudaErrorHostMemoryAlreadyRegistered) : 0;
    if (!error) remember(p, size, HOST);
    pthread_mutex_unlock(&lock);
    return error;
}
API cudaError_t cudaHostUnregister(void *p) {
    pthread_mutex_lock(&lock);
    arrive_all();
    int error = forget(p) ? 0 : fail(cudaErrorHostMemoryNotRegistered);
    pthread_mutex_unlock(&lock);
    return error;
}
API cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
    *p = aligned_alloc(4096, (size + 4095) & ~(size_t)4095);
    return cudaHostRegister(*p, size, 0);
}
API cudaError_t cudaFreeHost(void *p) {
    int error = cudaHostUnregister(p);
    if (!error) free(p);
    return error;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    pthread_mutex_lock(&lock);
    struct block *b = *find(p);
    memset(a, 0, sizeof *a);
    a->type = !b ? cudaMemoryTypeUnregistered : b->kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    a->device = b ? 0 : -2;
    a->devicePointer = b ? (void *)p : NULL;
    a->hostPointer = b && b->kind == HOST ? (void *)p : NULL;
    pthread_mutex_unlock(&lock);
    return 0;
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t handle) {
    struct stream *s = stream_of(handle);
    pthread_mutex_lock(&lock);
    if (s != &legacy && *find(from) && *find(to)) { /* memory that is not pinned is read before the call returns */
        struct copy *c = malloc(sizeof *c);
        *c = (struct copy){to, from, size, ++s->number, NULL};
        *s->end = c;
        s->end = &c->next;
    } else {
        arrive(s, ~0ul);
        memmove(to, from, size);
    }
    pthread_mutex_unlock(&lock);
    return 0;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}
API cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) {
    svdq_gpu_arrive(s);
    memset(p, value, size);
    return 0;
}

/* ---- the device */

static int attribute(int which) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return arch() / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return arch() % 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 128;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 1536;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return SHARED;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: return 1;
    default: return 0;
    }
}
API cudaError_t cudaGetDeviceCount(int *n) { return (*n = devices()) ? 0 : fail(cudaErrorNoDevice); }
API cudaError_t cudaGetDevice(int *d) { *d = 0; return 0; }
API cudaError_t cudaSetDevice(int d) { return d ? fail(cudaErrorInvalidDevice) : 0; }
API cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
API cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
API cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr which, int d) { *v = attribute(which); return 0; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = *most = 0; }
API cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0; }
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Emulated GPU sm_%d", arch());
    p->major = arch() / 10;
    p->minor = arch() % 10;
    p->totalGlobalMem = capacity();
    p->multiProcessorCount = 128;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 1536;
    p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlockOptin = SHARED;
    p->maxGridSize[0] = 0x7FFFFFFF;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    return 0;
}

/* ---- kernels: none; torch registers its own, and gets an error for each that it launches, or silence */

static int launched(void) { return setting("SVDQ_GPU_IDLE", 0) ? 0 : fail(cudaErrorInvalidDeviceFunction); }

API void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) {}
API void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name, int limit,
                                void *tid, void *bid, void *block, void *grid, int *warp) {}
API void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t size,
                           int constant, int global) {}
API char __cudaInitModule(void **handle) { return 0; }
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (void *)function; return 0; }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) { return 0; }
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                   cudaStream_t stream) {
    return launched();
}
API cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                 cudaStream_t stream) {
    return launched();
}

/* ---- the driver API, as comfy-aimdo's dynamic VRAM calls it */

API CUresult cuInit(unsigned flags) { return devices() ? 0 : CUDA_ERROR_NO_DEVICE; }
API CUresult cuDeviceGet(CUdevice *d, int i) { return *d = 0; }
API CUresult cuDeviceGetName(char *name, int size, CUdevice d) {
    snprintf(name, size, "Emulated GPU sm_%d", arch());
    return 0;
}
API CUresult cuDeviceGetUuid(CUuuid *id, CUdevice d) { memset(id, 1, sizeof *id); return 0; }
API CUresult cuDeviceTotalMem(size_t *size, CUdevice d) { *size = capacity(); return 0; }
API CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute which, CUdevice d) { *v = attribute(which); return 0; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
API CUresult cuCtxGetCurrent(CUcontext *c) { *c = (void *)1; return 0; }
API CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
API CUresult cuCtxGetDevice(CUdevice *d) { return *d = 0; }
API CUresult cuCtxSynchronize(void) { return cudaDeviceSynchronize(); }
API CUresult cuMemGetInfo(size_t *free, size_t *total) { return cudaMemGetInfo(free, total); }
API CUresult cuMemAlloc(CUdeviceptr *p, size_t size) { return cudaMalloc((void **)p, size); }
API CUresult cuMemFree(CUdeviceptr p) { return cudaFree((void *)p); }
API CUresult cuMemAllocAsync(CUdeviceptr *p, size_t size, CUstream s) { return cudaMalloc((void **)p, size); }
API CUresult cuMemFreeAsync(CUdeviceptr p, CUstream s) { return cudaFree((void *)p); }
API CUresult cuMemAllocHost(void **p, size_t size) { return cudaHostAlloc(p, size, 0); }
API CUresult cuMemFreeHost(void *p) { return cudaFreeHost(p); }
API CUresult cuMemHostRegister(void *p, size_t size, unsigned flags) { return cudaHostRegister(p, size, flags); }
API CUresult cuMemHostUnregister(void *p) { return cudaHostUnregister(p); }
API CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream s) {
    return cudaMemcpyAsync((void *)to, from, size, cudaMemcpyHostToDevice, s);
}
API CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream s) {
    return cudaMemcpyAsync(to, (void *)from, size, cudaMemcpyDeviceToHost, s);
}
API CUresult cuEventCreate(CUevent *e, unsigned flags) { return cudaEventCreateWithFlags(e, flags); }
API CUresult cuEventDestroy(CUevent e) { return cudaEventDestroy(e); }
API CUresult cuEventRecord(CUevent e, CUstream s) { return cudaEventRecord(e, s); }
API CUresult cuEventSynchronize(CUevent e) { return cudaEventSynchronize(e); }

/* Triton's own driver, which is used if idle */

API CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return cuCtxGetCurrent(c); }
API CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { *size = 0; return 0; }
API CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return 0; }
API CUresult cuModuleLoadData(CUmodule *m, const void *code) { *m = (void *)1; return 0; }
API CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (void *)1; return 0; }
API CUresult cuFuncGetAttribute(int *v, CUfunction_attribute which, CUfunction f) {
    *v = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}
API CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int v) { return 0; }
API CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return 0; }
API CUresult cuPointerGetAttribute(void *v, CUpointer_attribute which, CUdeviceptr p) {
    *(CUdeviceptr *)v = p;
    return 0;
}
API CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *size, CUdeviceptr p) {
    pthread_mutex_lock(&lock);
    struct block *b = *find((void *)p);
    if (b) *start = (CUdeviceptr)b->start, *size = b->size;
    pthread_mutex_unlock(&lock);
    return b ? 0 : CUDA_ERROR_NOT_FOUND;
}
API CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }
API CUresult cuDriverGetVersion(int *v) { return cudaDriverGetVersion(v) ? CUDA_ERROR_INVALID_VALUE : 0; }
API CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) {
    return cudaStreamIsCapturing((cudaStream_t)s, (enum cudaStreamCaptureStatus *)status) ? CUDA_ERROR_INVALID_VALUE : 0;
}
API CUresult cuModuleUnload(CUmodule m) { return 0; }
API CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, CUstream s, void **arguments, void **more) { return launched(); }
API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **more) { return launched(); }

struct physical { int file; size_t size; };

API CUresult cuMemAddressReserve(CUdeviceptr *p, size_t size, size_t alignment, CUdeviceptr at, unsigned long long f) {
    char *start = mmap(NULL, size + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    *p = ((size_t)start + PAGE - 1) & ~(PAGE - 1);
    return 0;
}
API CUresult cuMemAddressFree(CUdeviceptr p, size_t size) { return munmap((void *)p, size) ? CUDA_ERROR_INVALID_VALUE : 0; }
API CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties,
                         unsigned long long flags) {
    pthread_mutex_lock(&lock);
    int error = reserve(size);
    pthread_mutex_unlock(&lock);
    if (error) return error;
    struct physical *made = malloc(sizeof *made);
    *made = (struct physical){memfd_create("gpu", 0), size};
    *handle = (size_t)made;
    return ftruncate(made->file, size) ? CUDA_ERROR_OUT_OF_MEMORY : 0;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    struct physical *p = (void *)handle;
    pthread_mutex_lock(&lock);
    used -= p->size;
    pthread_mutex_unlock(&lock);
    close(p->file);
    free(p);
    return 0;
}
API CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                      unsigned long long flags) {
    int file = ((struct physical *)handle)->file;
    if (mmap((void *)at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, offset) == MAP_FAILED)
        return CUDA_ERROR_INVALID_VALUE;
    memset((void *)at, 0xFF, size);
    pthread_mutex_lock(&lock);
    remember((void *)at, size, DEVICE);
    pthread_mutex_unlock(&lock);
    return 0;
}
API CUresult cuMemSetAccess(CUdeviceptr p, size_t size, const CUmemAccessDesc *access, size_t count) { return 0; }
API CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
    pthread_mutex_lock(&lock);
    arrive_all();
    for (size_t done = 0, each; done < size; done += each ? each : PAGE) each = forget((char *)at + done);
    mmap((void *)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* ---- looking functions up: by their plain names, whatever version is asked for */

static void *named(const char *name) {
    static const char *versions[] = {"", "_v2", "_v3"};
    char plain[96], full[100];
    snprintf(plain, sizeof plain, "%s", name);
    char *end = strstr(plain, "_ptsz");
    if (end) *end = 0;
    for (int i = 0; i < 3; i++) {
        snprintf(full, sizeof full, "%s%s", plain, versions[i]);
        void *function = dlsym(RTLD_DEFAULT, full);
        if (function) return function;
    }
    return NULL;
}
API CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                                 CUdriverProcAddressQueryResult *status) {
    *function = named(name);
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? 0 : CUDA_ERROR_NOT_FOUND;
}
#undef cuGetProcAddress
API CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                 unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    *function = named(name);
    if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return 0;
}

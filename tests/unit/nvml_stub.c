/* A libnvidia-ml.so.1 without a GPU, for test_nvml.py. Built by the test, loaded by the real pynvml, steered by environment variables:
 *   STUB_INIT=code          what nvmlInit returns               STUB_COUNT=n           number of devices (default 2)
 *   STUB_FAIL=word:code,..  memory, memory2, processes, utilisation, power, name fail with that code
 *   STUB_USED, STUB_PROCESS comma-separated MiB, one per call, the last one repeated; STUB_PROCESS=na is "not available"
 *   STUB_PID=n              the process id that the process list names instead of the caller's; 0 is an empty list
 *   STUB_LOG=path           receives a line for every init and shutdown
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { int index; } device_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory2_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { unsigned gpu, memory; } utilisation_t;

enum { OK = 0, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
static const unsigned long long MIB = 1 << 20, TOTAL = 1000ull << 20, RESERVED = 10ull << 20;
static device_t devices[3] = {{0}, {1}, {2}};
static const char *uuids[3] = {"GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000",
                               "MIG-cccccccc-0000-0000-0000-000000000000"};
static const char *buses[3] = {"00000000:0F:00.0", "00000000:2D:00.0", ""};

static int number(const char *name, int otherwise) { const char *s = getenv(name); return s ? atoi(s) : otherwise; }

static int failure(const char *word) {
    const char *s = getenv("STUB_FAIL");
    size_t n = strlen(word);
    for (; s && *s; s = strchr(s, ',') ? strchr(s, ',') + 1 : "")
        if (!strncmp(s, word, n) && s[n] == ':') return atoi(s + n + 1);
    return OK;
}

static unsigned long long next(const char *name, int *call) {
    const char *s = getenv(name);
    if (!s) return 100 * MIB;
    for (int i = 0; i < *call && strchr(s, ','); i++) s = strchr(s, ',') + 1;
    ++*call;
    return strtoull(s, NULL, 10) * MIB;
}

static void note(const char *word) {
    const char *path = getenv("STUB_LOG");
    FILE *f = path ? fopen(path, "a") : NULL;
    if (f) { fprintf(f, "%s\n", word); fclose(f); }
}

int nvmlInitWithFlags(unsigned flags) { int code = number("STUB_INIT", OK); (void)flags; if (!code) note("init"); return code; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { note("shutdown"); return OK; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : code == 3 ? "Not Supported" : "Some Error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { snprintf(out, size, "570.86.10"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = number("STUB_COUNT", 2); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **out) {
    if (index >= (unsigned)number("STUB_COUNT", 2)) return 2;
    *out = &devices[index];
    return OK;
}

static int find(const char **table, const char *key, device_t **out) {
    for (int i = 0; i < 3; i++) if (!strcmp(table[i], key)) { *out = &devices[i]; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **out) { return find(uuids, uuid, out); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, device_t **out) { return find(buses, bus, out); }
int nvmlDeviceGetUUID(device_t *d, char *out, unsigned size) { snprintf(out, size, "%s", uuids[d->index]); return OK; }

int nvmlDeviceGetName(device_t *d, char *out, unsigned size) {
    int code = failure("name");
    if (!code) snprintf(out, size, "Stub GPU %d", d->index);
    return code;
}

static int used_calls, process_calls;
int nvmlDeviceGetMemoryInfo_v2(device_t *d, memory2_t *m) {
    int code = failure("memory") ? failure("memory") : failure("memory2");
    (void)d;
    if (code) return code;
    if (m->version != (sizeof *m | 2u << 24)) return 25;
    m->total = TOTAL; m->reserved = RESERVED; m->used = next("STUB_USED", &used_calls); m->free = TOTAL - RESERVED - m->used;
    return OK;
}
int nvmlDeviceGetMemoryInfo(device_t *d, memory_t *m) {
    int code = failure("memory");
    (void)d;
    if (code) return code;
    m->total = TOTAL; m->used = RESERVED + next("STUB_USED", &used_calls); m->free = TOTAL - m->used;
    return OK;
}

/* Two entries, somebody else's first; the caller must come back with enough room, as with the real library. */
int nvmlDeviceGetComputeRunningProcesses_v3(device_t *d, unsigned *count, process_t *out) {
    int code = failure("processes"), pid = number("STUB_PID", getpid());
    const char *mine = getenv("STUB_PROCESS");
    (void)d;
    if (code) return code;
    if (!pid) { *count = 0; return OK; }
    if (!out || *count < 2) { *count = 2; return INSUFFICIENT_SIZE; }
    *count = 2;
    memset(out, 0, 2 * sizeof *out);
    out[0].pid = 1; out[0].used = 5 * MIB;
    out[1].pid = pid; out[1].used = mine && !strcmp(mine, "na") ? ~0ull : next("STUB_PROCESS", &process_calls);
    return OK;
}

int nvmlDeviceGetUtilizationRates(device_t *d, utilisation_t *u) {
    int code = failure("utilisation");
    (void)d;
    u->gpu = 40; u->memory = 20;
    return code;
}
int nvmlDeviceGetPowerUsage(device_t *d, unsigned *milliwatts) { (void)d; *milliwatts = 250500; return failure("power"); }

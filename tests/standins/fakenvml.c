/* A stand-in for libnvidia-ml.so.1, NVIDIA's management library, for tests on machines without a GPU.
 *
 * What goes in: a text file that describes a machine, read again whenever it has changed, so that a test can
 * change the machine under a running program. It is the first that exists of
 *     $NVML_STANDIN_STATE
 *     /run/nvml-standin/state       where the stand-in container runtime puts it; then only GPUs whose
 *                                   /dev/nvidiaN exists are seen, as in a real container
 *     state                         in this library's own folder
 * What comes out: the functions of NVML that the lab calls through nvidia-ml-py, with NVML's return codes,
 * structures and habits (memory v1 counts reserved memory as used, v2 does not; lists of processes are asked
 * for twice; a lost GPU answers 15 to everything).
 *
 * Lines of the file (GPU is a number or `*`; unknown lines are refused, so that a typing error shows):
 *     driver VERSION | cuda NUMBER | init CODE | delay_us NUMBER
 *     gpus NUMBER
 *     gpu GPU KEY VALUE       keys: see set(); VALUE runs to the end of the line
 *     path GPU GPU LEVEL      NVML_TOPOLOGY_*: 0 10 20 30 40 50
 *     links GPU GPU NUMBER    direct NVLinks between two
 *     fabric GPU NUMBER       NVLinks to switches
 *     reply FUNCTION GPU CODE what a function answers on a GPU instead of its result
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_GPUS 64
#define MAX_CPU_WORDS 16
#define MAX_PROCS 8
#define MAX_MIG 7
#define MAX_REPLIES 64

typedef unsigned U;
typedef unsigned long long ULL;
typedef void *Device;
typedef int R;
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, LOST = 15, UNKNOWN = 999 };
enum { VERSION_MISMATCH = 25 };

typedef struct {
  char uuid[96], bus[32], name[96];
  ULL total_mib, reserved_mib, used_mib, energy_mj, reasons, nvlink_tx_kib, nvlink_rx_kib, pcie_tx, pcie_rx;
  U util, mem_util, power_mw, limit_mw, limit_min_mw, limit_max_mw, limit_default_mw, temp_c;
  U sm_mhz, mem_mhz, max_sm_mhz, max_mem_mhz, app_sm_mhz, app_mem_mhz;
  int major, minor, persistence, mig, ecc, fail, numa, field_error;
  ULL cpus[MAX_CPU_WORDS];
  int procs, migs, fabric;
  U pid[MAX_PROCS];
  ULL pid_mib[MAX_PROCS], mig_mib[MAX_MIG];
  char mig_uuid[MAX_MIG][96];
} Gpu;

static struct {
  int gpus, init, replies;
  U delay_us, cuda;
  char driver[64];
  Gpu gpu[MAX_GPUS];
  int path[MAX_GPUS][MAX_GPUS], links[MAX_GPUS][MAX_GPUS];
  struct { char function[80]; int gpu, code; } reply[MAX_REPLIES];
} M;
static int initialised, nodes_decide;
static char state_path[PATH_MAX];
static struct stat seen;

static void find_state(void) {
  if (*state_path) return;
  const char *given = getenv("NVML_STANDIN_STATE");
  Dl_info me;
  if (given) { snprintf(state_path, sizeof state_path, "%s", given); return; }
  if (access("/run/nvml-standin/state", R_OK) == 0) {
    strcpy(state_path, "/run/nvml-standin/state");
    nodes_decide = 1;
    return;
  }
  if (!dladdr((void *)find_state, &me)) return;
  snprintf(state_path, sizeof state_path - 8, "%s", me.dli_fname);
  char *slash = strrchr(state_path, '/');
  strcpy(slash ? slash + 1 : state_path, "state");
}

static void set_cpus(ULL *words, const char *list) {
  memset(words, 0, sizeof(ULL) * MAX_CPU_WORDS);
  for (const char *at = list; *at;) {
    char *end;
    long first = strtol(at, &end, 10), last = first;
    if (end == at) return;
    if (*end == '-') last = strtol(end + 1, &end, 10);
    for (long cpu = first; cpu <= last; cpu++)
      if (cpu < MAX_CPU_WORDS * 64) words[cpu / 64] |= 1ULL << (cpu % 64);
    at = *end == ',' ? end + 1 : end;
  }
}

#define TEXT(key, field) if (!strcmp(k, key)) { snprintf(g->field, sizeof g->field, "%.*s", (int)sizeof g->field - 1, v); return 1; }
#define NUMBER(key, field) if (!strcmp(k, key)) { g->field = strtoull(v, 0, 0); return 1; }
static int set(Gpu *g, const char *k, const char *v) {
  TEXT("uuid", uuid) TEXT("bus", bus) TEXT("name", name)
  NUMBER("total_mib", total_mib) NUMBER("reserved_mib", reserved_mib) NUMBER("used_mib", used_mib)
  NUMBER("util", util) NUMBER("mem_util", mem_util) NUMBER("power_mw", power_mw) NUMBER("temp_c", temp_c)
  NUMBER("limit_mw", limit_mw) NUMBER("limit_min_mw", limit_min_mw) NUMBER("limit_max_mw", limit_max_mw)
  NUMBER("limit_default_mw", limit_default_mw) NUMBER("energy_mj", energy_mj) NUMBER("reasons", reasons)
  NUMBER("sm_mhz", sm_mhz) NUMBER("mem_mhz", mem_mhz) NUMBER("max_sm_mhz", max_sm_mhz)
  NUMBER("max_mem_mhz", max_mem_mhz) NUMBER("app_sm_mhz", app_sm_mhz) NUMBER("app_mem_mhz", app_mem_mhz)
  NUMBER("major", major) NUMBER("minor", minor) NUMBER("persistence", persistence) NUMBER("mig", mig)
  NUMBER("ecc", ecc) NUMBER("numa", numa) NUMBER("fail", fail) NUMBER("field_error", field_error)
  NUMBER("nvlink_tx_kib", nvlink_tx_kib) NUMBER("nvlink_rx_kib", nvlink_rx_kib)
  NUMBER("pcie_tx", pcie_tx) NUMBER("pcie_rx", pcie_rx)
  if (!strcmp(k, "cpus")) { set_cpus(g->cpus, v); return 1; }
  if (!strcmp(k, "proc") && g->procs < MAX_PROCS)
    return sscanf(v, "%u:%llu", &g->pid[g->procs], &g->pid_mib[g->procs]) == 2 && ++g->procs;
  if (!strcmp(k, "mig_device") && g->migs < MAX_MIG)
    return sscanf(v, "%95s %llu", g->mig_uuid[g->migs], &g->mig_mib[g->migs]) == 2 && ++g->migs;
  return 0;
}

static int line(const char *text) {
  char who[16], key[80], value[512];
  int a, b, n;
  if (*text == '#' || *text == '\n') return 1;
  if (sscanf(text, "driver %63s", M.driver) == 1 || sscanf(text, "cuda %u", &M.cuda) == 1) return 1;
  if (sscanf(text, "init %d", &M.init) == 1 || sscanf(text, "delay_us %u", &M.delay_us) == 1) return 1;
  if (sscanf(text, "gpus %d", &n) == 1) { M.gpus = n > MAX_GPUS ? MAX_GPUS : n; return 1; }
  if (sscanf(text, "path %d %d %d", &a, &b, &n) == 3 && a < MAX_GPUS && b < MAX_GPUS) { M.path[a][b] = M.path[b][a] = n; return 1; }
  if (sscanf(text, "links %d %d %d", &a, &b, &n) == 3 && a < MAX_GPUS && b < MAX_GPUS) { M.links[a][b] = M.links[b][a] = n; return 1; }
  if (sscanf(text, "fabric %d %d", &a, &n) == 2 && a < MAX_GPUS) { M.gpu[a].fabric = n; return 1; }
  if (sscanf(text, "reply %79s %15s %d", key, who, &n) == 3 && M.replies < MAX_REPLIES) {
    strcpy(M.reply[M.replies].function, key);
    M.reply[M.replies].gpu = *who == '*' ? -1 : atoi(who);
    M.reply[M.replies++].code = n;
    return 1;
  }
  if (sscanf(text, "gpu %15s %79s %511[^\n]", who, key, value) != 3) return 0;
  int from = *who == '*' ? 0 : atoi(who), to = *who == '*' ? MAX_GPUS - 1 : from, good = 1;
  for (int i = from; i <= to && i < MAX_GPUS; i++) good &= set(&M.gpu[i], key, value);
  return good;
}

static void load(void) {
  struct stat now;
  find_state();
  if (stat(state_path, &now)) { memset(&M, 0, sizeof M); return; }
  if (now.st_ino == seen.st_ino && now.st_size == seen.st_size && now.st_mtim.tv_sec == seen.st_mtim.tv_sec &&
      now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec) return;
  FILE *file = fopen(state_path, "r");
  char text[1024];
  if (!file) return;
  seen = now;
  memset(&M, 0, sizeof M);
  for (int i = 0; i < MAX_GPUS; i++) for (int j = 0; j < MAX_GPUS; j++) M.path[i][j] = i == j ? 0 : -1;
  while (fgets(text, sizeof text, file))
    if (!line(text)) { fprintf(stderr, "stand-in NVML: cannot read the line: %s", text); abort(); }
  fclose(file);
}

static int visible(int *out) {
  char node[32];
  int n = 0;
  for (int i = 0; i < M.gpus; i++) {
    snprintf(node, sizeof node, "/dev/nvidia%d", i);
    if (!nodes_decide || access(node, F_OK) == 0) out[n++] = i;
  }
  return n;
}

static R answer(const char *function, int gpu) {
  for (int i = 0; i < M.replies; i++)
    if (!strcmp(M.reply[i].function, function) && (M.reply[i].gpu == -1 || M.reply[i].gpu == gpu)) return M.reply[i].code;
  return OK;
}

/* Handles are small numbers: 0x1000 + GPU, and 0x2000 + 16 * GPU + n for a MIG device. */
static R device(const char *function, Device d, Gpu **gpu, int *index) {
  if (!initialised) return UNINITIALIZED;
  load();
  if (M.delay_us) usleep(M.delay_us);
  long h = (long)d;
  int i = h >= 0x2000 ? (int)((h - 0x2000) / 16) : (int)(h - 0x1000);
  if (i < 0 || i >= M.gpus) return INVALID;
  *gpu = &M.gpu[i];
  *index = i;
  return M.gpu[i].fail ? M.gpu[i].fail : answer(function, i);
}
#define GPU(d) Gpu *g; int at; R failed = device(__func__, d, &g, &at); (void)at; if (failed) return failed
#define SYSTEM if (!initialised) return UNINITIALIZED; load(); if (answer(__func__, -1)) return answer(__func__, -1)
#define IS_MIG(d) ((long)(d) >= 0x2000)
#define MIG_NUMBER(d) ((int)(((long)(d) - 0x2000) % 16))

static R text_out(char *out, U size, const char *text) {
  if (strlen(text) + 1 > size) return TOO_SMALL;
  strcpy(out, text);
  return OK;
}

R nvmlInitWithFlags(U flags) {
  (void)flags;
  load();
  if (M.init) return M.init;
  initialised++;
  return OK;
}
R nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
R nvmlShutdown(void) {
  if (!initialised) return UNINITIALIZED;
  initialised--;
  return OK;
}
const char *nvmlErrorString(R code) {
  switch (code) {
    case 0: return "Success";
    case 1: return "Uninitialized";
    case 2: return "Invalid Argument";
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 6: return "Not Found";
    case 7: return "Insufficient Size";
    case 9: return "Driver Not Loaded";
    case 13: return "Function Not Found";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
  }
}
R nvmlSystemGetDriverVersion(char *out, U size) { SYSTEM; return text_out(out, size, M.driver); }
R nvmlSystemGetNVMLVersion(char *out, U size) {
  SYSTEM;
  char text[96];
  snprintf(text, sizeof text, "12.%s", M.driver);
  return text_out(out, size, text);
}
R nvmlSystemGetCudaDriverVersion_v2(int *out) { SYSTEM; *out = (int)M.cuda; return OK; }
R nvmlSystemGetCudaDriverVersion(int *out) { SYSTEM; *out = (int)M.cuda; return OK; }

R nvmlDeviceGetCount_v2(U *out) { SYSTEM; int list[MAX_GPUS]; *out = (U)visible(list); return OK; }
R nvmlDeviceGetHandleByIndex_v2(U index, Device *out) {
  SYSTEM;
  int list[MAX_GPUS], n = visible(list);
  if ((int)index >= n) return INVALID;
  if (M.gpu[list[index]].fail == LOST) return LOST;
  *out = (Device)(0x1000L + list[index]);
  return OK;
}
R nvmlDeviceGetHandleByUUID(const char *uuid, Device *out) {
  SYSTEM;
  int list[MAX_GPUS], n = visible(list);
  for (int i = 0; i < n; i++)
    if (!strcmp(uuid, M.gpu[list[i]].uuid)) {
      if (M.gpu[list[i]].fail == LOST) return LOST;
      *out = (Device)(0x1000L + list[i]);
      return OK;
    }
  return NOT_FOUND;
}
R nvmlDeviceGetIndex(Device d, U *out) {
  GPU(d);
  int list[MAX_GPUS], n = visible(list);
  for (int i = 0; i < n; i++) if (list[i] == at) { *out = (U)i; return OK; }
  return NOT_FOUND;
}
R nvmlDeviceGetMinorNumber(Device d, U *out) { GPU(d); *out = (U)at; return OK; }
R nvmlDeviceGetName(Device d, char *out, U size) { GPU(d); return text_out(out, size, g->name); }
R nvmlDeviceGetUUID(Device d, char *out, U size) {
  GPU(d);
  return text_out(out, size, IS_MIG(d) ? g->mig_uuid[MIG_NUMBER(d)] : g->uuid);
}

typedef struct { char legacy[16]; U domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
static void pci(Pci *out, const char *bus) { /* bus as 00000000:07:00.0; the legacy form has four digits */
  memset(out, 0, sizeof *out);
  snprintf(out->bus_id, sizeof out->bus_id, "%s", bus);
  snprintf(out->legacy, sizeof out->legacy, "%.12s", strlen(bus) > 4 ? bus + 4 : bus);
  sscanf(bus, "%x:%x:%x", &out->domain, &out->bus, &out->device);
  out->id = 0x20B210DE;
}
R nvmlDeviceGetPciInfo_v3(Device d, Pci *out) { GPU(d); pci(out, g->bus); return OK; }

#define MIB(n) ((n) << 20)
typedef struct { ULL total, free, used; } Memory1;
typedef struct { U version; ULL total, reserved, free, used; } Memory2;
R nvmlDeviceGetMemoryInfo(Device d, Memory1 *out) {
  GPU(d);
  out->total = MIB(IS_MIG(d) ? g->mig_mib[MIG_NUMBER(d)] : g->total_mib);
  out->used = IS_MIG(d) ? 0 : MIB(g->used_mib + g->reserved_mib);
  out->free = out->total - out->used;
  return OK;
}
R nvmlDeviceGetMemoryInfo_v2(Device d, Memory2 *out) {
  GPU(d);
  if (out->version != 0x02000028) return VERSION_MISMATCH;
  out->total = MIB(g->total_mib);
  out->reserved = MIB(g->reserved_mib);
  out->used = MIB(g->used_mib);
  out->free = out->total - out->reserved - out->used;
  return OK;
}

R nvmlDeviceGetTopologyCommonAncestor(Device a, Device b, int *out) {
  GPU(a);
  Gpu *other;
  int to;
  R bad = device(__func__, b, &other, &to);
  if (bad) return bad;
  if (M.path[at][to] < 0) return NOT_SUPPORTED;
  *out = M.path[at][to];
  return OK;
}
/* What hangs on a link: -1 nothing, -2 a switch, else the GPU. */
static int peer(int gpu, U link) {
  U before = 0;
  if (link < (U)M.gpu[gpu].fabric) return -2;
  before = (U)M.gpu[gpu].fabric;
  for (int j = 0; j < M.gpus; before += (U)M.links[gpu][j++]) if (link < before + (U)M.links[gpu][j]) return j;
  return -1;
}
static int any_link(int gpu) { return peer(gpu, 0) != -1; }
R nvmlDeviceGetNvLinkState(Device d, U link, U *out) {
  GPU(d);
  if (!any_link(at)) return NOT_SUPPORTED;
  if (link >= 18) return INVALID;
  *out = peer(at, link) != -1;
  return OK;
}
R nvmlDeviceGetNvLinkRemoteDeviceType(Device d, U link, int *out) {
  GPU(d);
  int found = peer(at, link);
  if (found == -1) return NOT_SUPPORTED;
  *out = found == -2 ? 2 : 0;
  return OK;
}
R nvmlDeviceGetNvLinkRemotePciInfo_v2(Device d, U link, Pci *out) {
  GPU(d);
  int found = peer(at, link);
  char bus[32];
  if (found == -1) return NOT_SUPPORTED;
  snprintf(bus, sizeof bus, "00000000:%02X:00.0", 1 + link / 2);
  pci(out, found == -2 ? bus : M.gpu[found].bus);
  return OK;
}
R nvmlDeviceGetCpuAffinityWithinScope(Device d, U words, ULL *out, U scope) {
  GPU(d);
  (void)scope;
  for (U i = 0; i < words; i++) out[i] = i < MAX_CPU_WORDS ? g->cpus[i] : 0;
  return OK;
}
R nvmlDeviceGetCpuAffinity(Device d, U words, ULL *out) { GPU(d); return nvmlDeviceGetCpuAffinityWithinScope(d, words, out, 0); }
R nvmlDeviceGetMemoryAffinity(Device d, U words, ULL *out, U scope) {
  GPU(d);
  (void)scope;
  memset(out, 0, words * sizeof *out);
  if (g->numa < 0) return NOT_SUPPORTED;
  out[g->numa / 64] = 1ULL << (g->numa % 64);
  return OK;
}

typedef struct { U gpu, memory; } Utilisation;
R nvmlDeviceGetUtilizationRates(Device d, Utilisation *out) { GPU(d); out->gpu = g->util; out->memory = g->mem_util; return OK; }
R nvmlDeviceGetPowerUsage(Device d, U *out) { GPU(d); *out = g->power_mw; return OK; }
R nvmlDeviceGetEnforcedPowerLimit(Device d, U *out) { GPU(d); *out = g->limit_mw; return OK; }
R nvmlDeviceGetPowerManagementLimit(Device d, U *out) { GPU(d); *out = g->limit_mw; return OK; }
R nvmlDeviceGetPowerManagementDefaultLimit(Device d, U *out) { GPU(d); *out = g->limit_default_mw; return OK; }
R nvmlDeviceGetPowerManagementLimitConstraints(Device d, U *low, U *high) {
  GPU(d);
  *low = g->limit_min_mw;
  *high = g->limit_max_mw;
  return OK;
}
R nvmlDeviceGetTotalEnergyConsumption(Device d, ULL *out) { GPU(d); *out = g->energy_mj; return OK; }
R nvmlDeviceGetTemperature(Device d, int sensor, U *out) { GPU(d); (void)sensor; *out = g->temp_c; return OK; }
R nvmlDeviceGetClockInfo(Device d, int kind, U *out) { GPU(d); *out = kind == 2 ? g->mem_mhz : g->sm_mhz; return OK; }
R nvmlDeviceGetMaxClockInfo(Device d, int kind, U *out) { GPU(d); *out = kind == 2 ? g->max_mem_mhz : g->max_sm_mhz; return OK; }
R nvmlDeviceGetApplicationsClock(Device d, int kind, U *out) { GPU(d); *out = kind == 2 ? g->app_mem_mhz : g->app_sm_mhz; return OK; }
R nvmlDeviceGetCurrentClocksEventReasons(Device d, ULL *out) { GPU(d); *out = g->reasons; return OK; }
R nvmlDeviceGetCurrentClocksThrottleReasons(Device d, ULL *out) { GPU(d); *out = g->reasons; return OK; }
R nvmlDeviceGetCudaComputeCapability(Device d, int *major, int *minor) { GPU(d); *major = g->major; *minor = g->minor; return OK; }
R nvmlDeviceGetPersistenceMode(Device d, int *out) { GPU(d); *out = g->persistence; return OK; }
R nvmlDeviceGetEccMode(Device d, int *now, int *pending) {
  GPU(d);
  if (g->ecc > 1) return NOT_SUPPORTED;
  *now = *pending = g->ecc;
  return OK;
}
R nvmlDeviceGetMigMode(Device d, U *now, U *pending) {
  GPU(d);
  if (g->mig > 1) return NOT_SUPPORTED;
  *now = *pending = (U)g->mig;
  return OK;
}
R nvmlDeviceGetMaxMigDeviceCount(Device d, U *out) { GPU(d); *out = g->mig == 1 ? MAX_MIG : 0; return OK; }
R nvmlDeviceGetMigDeviceHandleByIndex(Device d, U index, Device *out) {
  GPU(d);
  if (g->mig != 1 || index >= (U)g->migs) return NOT_FOUND;
  *out = (Device)(0x2000L + 16 * at + index);
  return OK;
}

typedef struct { U pid; ULL memory; U gpu_instance, compute_instance; } Process;
R nvmlDeviceGetComputeRunningProcesses_v3(Device d, U *count, Process *out) {
  GPU(d);
  U room = *count;
  *count = (U)g->procs;
  if (!g->procs) return OK;
  if (room < (U)g->procs || !out) return TOO_SMALL;
  for (int i = 0; i < g->procs; i++) out[i] = (Process){g->pid[i], MIB(g->pid_mib[i]), ~0u, ~0u};
  return OK;
}

typedef struct {
  U id, scope;
  long long time_us, latency_us;
  U type;
  R code;
  union { double real; U word; ULL wide; } value;
} Field;
R nvmlDeviceGetFieldValues(Device d, int count, Field *fields) {
  GPU(d);
  for (int i = 0; i < count; i++) {
    Field *f = &fields[i];
    f->type = 3; /* unsigned long long */
    f->code = g->field_error;
    switch (f->id) {
      case 138: f->value.wide = g->nvlink_tx_kib; if (!any_link(at)) f->code = NOT_SUPPORTED; break;
      case 139: f->value.wide = g->nvlink_rx_kib; if (!any_link(at)) f->code = NOT_SUPPORTED; break;
      case 197: f->value.wide = g->pcie_tx; break;
      case 198: f->value.wide = g->pcie_rx; break;
      default: f->code = NOT_SUPPORTED;
    }
  }
  return OK;
}

/* Which instruction sets this machine and its operating system can run. */
#include "types.h"

#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>

static unsigned leaf7(unsigned subleaf, int which) {
    unsigned r[4] = {0, 0, 0, 0};
    if (!__get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]))
        return 0;
    return r[which];
}

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int has_vnni(void) {
    return has_avx512() && (leaf7(0, 2) >> 11 & 1);
}

static int has_bf16(void) {
    return has_vnni() && (leaf7(1, 0) >> 5 & 1);
}

/* Tiles need the system's leave to use their state; asking again is harmless. */
static int has_amx(void) {
#if defined(__linux__)
    enum { REQUEST_STATE = 0x1023, TILE_DATA = 18 };
    unsigned needed = 1u << 24 | 1u << 25 | 1u << 22; /* tile, int8, bf16 */
    return has_bf16() && (leaf7(0, 3) & needed) == needed && !syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA);
#else
    return 0;
#endif
}
#endif

/* 1 if functions compiled for the named instruction set run here. */
PS_EXPORT int ps_can_run(const char *isa) {
    if (!strcmp(isa, "generic"))
        return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(isa, "avx2"))
        return has_avx2();
    if (!strcmp(isa, "avx512"))
        return has_avx512();
    if (!strcmp(isa, "avx512vnni"))
        return has_vnni();
    if (!strcmp(isa, "avx512bf16"))
        return has_bf16();
    if (!strcmp(isa, "amx"))
        return has_amx();
#endif
    return 0;
}

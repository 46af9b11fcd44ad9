/* The features of an x86-64 processor and its operating system, from cpuid: the compilers' `__builtin_cpu_supports`
 * needs a runtime library that not every compiler links. */
#ifndef PERMPRUNE_X86_H
#define PERMPRUNE_X86_H

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { LEAF_1_ECX, LEAF_7_EBX, LEAF_7_ECX, LEAF_7_EDX, LEAF_7_1_EAX };

/* Whether the bits of `wanted` are all set in a register of a leaf of cpuid. */
static inline int cpu_has(int leaf, unsigned wanted)
{
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(leaf == LEAF_1_ECX ? 1 : 7, leaf == LEAF_7_1_EAX, &eax, &ebx, &ecx, &edx))
        return 0;
    unsigned found = leaf == LEAF_7_EBX ? ebx : leaf == LEAF_7_EDX ? edx : leaf == LEAF_7_1_EAX ? eax : ecx;
    return (found & wanted) == wanted;
}

/* Whether the operating system saves the registers of `wanted`: 6 for AVX, 0xe6 for AVX-512, 0x60000 for tiles. */
static inline int system_saves(unsigned wanted)
{
    unsigned low, high;
    if (!cpu_has(LEAF_1_ECX, 1u << 27))
        return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & wanted) == wanted;
}

static inline int has_avx2(void)
{
    return system_saves(6) && cpu_has(LEAF_1_ECX, 1u << 12 | 1u << 23 | 1u << 29) && /* FMA, POPCNT, F16C */
           cpu_has(LEAF_7_EBX, 1u << 3 | 1u << 5 | 1u << 8);                         /* BMI, AVX2, BMI2 */
}

static inline int has_avx512(void)
{
    return has_avx2() && system_saves(0xe6) &&
           cpu_has(LEAF_7_EBX, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && /* F, DQ, BW, VL */
           cpu_has(LEAF_7_ECX, 1u << 1 | 1u << 6 | 1u << 11);                /* VBMI, VBMI2, VNNI */
}

static inline int has_avx512_bf16(void) { return has_avx512() && cpu_has(LEAF_7_1_EAX, 1u << 5); }

/* Whether there are matrix units for bf16, and the system lets this process use their registers, for which it has to be asked. */
static inline int has_amx_bf16(void)
{
#if defined(__linux__)
    enum { ASK_FOR_STATE = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM and XTILEDATA in the words of Linux */
    return has_avx512_bf16() && system_saves(0x60000) && cpu_has(LEAF_7_EDX, 1u << 22 | 1u << 24) && /* BF16, TILE */
           syscall(SYS_arch_prctl, ASK_FOR_STATE, TILES) == 0;
#else
    return 0;
#endif
}

#endif

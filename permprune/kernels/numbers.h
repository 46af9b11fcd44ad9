/* What all native code shares: how a structure is described to Python, target features, and conversions of numbers. */
#ifndef PERMPRUNE_NUMBERS_H
#define PERMPRUNE_NUMBERS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

/* Declares a structure that Python fills in, and `NAME_text`, from which library.py makes its twin: members are numbers
 * of 32 or 64 bits, pointers, other such structures, and arrays of them, all of one type in a line. */
#define STRUCTURE(NAME, ...)                                                                                           \
    struct NAME __VA_ARGS__;                                                                                           \
    static const char NAME##_text[] __attribute__((unused)) = #NAME " " #__VA_ARGS__;

/* The functions between BEGIN_TARGET and END_TARGET use instructions that not every processor has. */
#define STRING_(...) #__VA_ARGS__
#define PRAGMA(...) _Pragma(STRING_(__VA_ARGS__))
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
/* Before a loop with a constant count: sums in an array stay in registers only if the loop is unrolled early. */
#if defined(__clang__)
#define UNROLLED PRAGMA(clang loop unroll(full))
#define NOT_UNROLLED PRAGMA(clang loop unroll(disable))
#else
#define UNROLLED PRAGMA(GCC unroll 16)
#define NOT_UNROLLED PRAGMA(GCC unroll 1)
#endif

enum { LINE = 16 }; /* numbers that are worked on side by side where each processor is to find the same bits */

typedef float lanes __attribute__((vector_size(LINE * sizeof(float))));
typedef int32_t int_lanes __attribute__((vector_size(LINE * sizeof(int32_t))));

enum number { F32, BF16, F16, I8, NUMBERS };

static ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static ALWAYS_INLINE float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static ALWAYS_INLINE uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static ALWAYS_INLINE float bf16_to_f32(uint16_t value) { return from_bits((uint32_t)value << 16); }

static ALWAYS_INLINE uint16_t f32_to_bf16(float value)
{
    uint32_t bits = to_bits(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static ALWAYS_INLINE float f16_to_f32(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00)
        return from_bits(sign | 0x7f800000 | magnitude << 13);
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f)); /* exact for subnormals too */
}

static ALWAYS_INLINE uint16_t f32_to_f16(float value)
{
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000)
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: the float adder rounds to multiples of 2^-24 */
        return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
    return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

static ALWAYS_INLINE float read_number(const void *numbers, int64_t index, int32_t number)
{
    if (number == F32)
        return ((const float *)numbers)[index];
    uint16_t bits = ((const uint16_t *)numbers)[index];
    return number == BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

static ALWAYS_INLINE void write_number(void *numbers, int64_t index, int32_t number, float value)
{
    if (number == F32)
        ((float *)numbers)[index] = value;
    else
        ((uint16_t *)numbers)[index] = number == BF16 ? f32_to_bf16(value) : f32_to_f16(value);
}

#endif

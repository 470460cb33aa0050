/* What the row-wise operations of a training step share: float32 and bfloat16 in and out, float32 within.

   Loops run over short arrays of floats, one read and one written at a time, so that compilers turn them into vector
   instructions of whatever width a path has, and so that results may be written over what was read. */

#ifndef ROWS_H
#define ROWS_H

#include "blockwise.h"

/* Elements that are read, worked on and written before the next: they stay in the first cache. */
enum { STRIP = 512 };

/* Rounds to nearest even. Of what is NaN here no bit is lost that makes it one: the low ones are never all set. */
ALWAYS_INLINE uint16_t bfloat16_bits(float value)
{
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ALWAYS_INLINE float rounded(enum dtype dtype, float value)
{
    return dtype == FLOAT32 ? value : float_of((uint32_t)bfloat16_bits(value) << 16);
}

ALWAYS_INLINE void read_floats(enum dtype dtype, const uint8_t *from, int64_t n, float *restrict to)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = weight_at(dtype, from, i);
}

ALWAYS_INLINE void write_floats(enum dtype dtype, const float *restrict from, int64_t n, uint8_t *to)
{
    if (dtype == FLOAT32) {
        memcpy(to, from, (size_t)n * sizeof *from);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits = bfloat16_bits(from[i]);
        memcpy(to + 2 * i, &bits, sizeof bits);
    }
}

/* e^x for x up to 0, within 2 units of the last place; 0 below -88. NaN stays NaN. */
ALWAYS_INLINE float exponential(float x)
{
    const float to_integer = 0x1.8p23f;
    float clamped = x < -88.0f ? -88.0f : x;
    /* 2^n e^r with |r| <= ln(2) / 2; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
    float shifted = clamped * 0x1.715476p0f + to_integer, n = shifted - to_integer;
    /* ln(2) in two parts, the first so short that its product with n is exact. */
    float r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * (r * r) + r + 1.0f;
    return series * float_of((bits_of(shifted) + 127) << 23);
}

#if defined(__x86_64__)
#define TARGET(features) __attribute__((target(features)))
#else
/* Another processor is never asked for these paths. */
#define TARGET(features)
#endif
#if defined(__clang__)
#define AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl"
#else
/* GCC takes half the width if it is not asked. */
#define AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif

/* Calls body(dtype, task, first, stop), which is always inlined, with dtype as a constant. */
#define IN_ITS_DTYPE(body, task, first, stop)                                                                          \
    if (task->dtype == BFLOAT16)                                                                                       \
        body(BFLOAT16, task, first, stop);                                                                             \
    else                                                                                                               \
        body(FLOAT32, task, first, stop);

/* Exports a function that works on first to stop of a `struct name`, compiled from one body for every path. */
#define EXPORT_ON_EVERY_PATH(name, body)                                                                               \
    TARGET(AVX512_FEATURES) static void name##_avx512(const struct name *task, int64_t first, int64_t stop)            \
    {                                                                                                                  \
        IN_ITS_DTYPE(body, task, first, stop)                                                                          \
    }                                                                                                                  \
    TARGET("avx2") static void name##_avx2(const struct name *task, int64_t first, int64_t stop)                       \
    {                                                                                                                  \
        IN_ITS_DTYPE(body, task, first, stop)                                                                          \
    }                                                                                                                  \
    static void name##_portable(const struct name *task, int64_t first, int64_t stop)                                  \
    {                                                                                                                  \
        IN_ITS_DTYPE(body, task, first, stop)                                                                          \
    }                                                                                                                  \
    EXPORTED int32_t name(const struct name *task, int64_t first, int64_t stop)                                        \
    {                                                                                                                  \
        fenv_t callers;                                                                                                \
        enter_standard_arithmetic(&callers);                                                                           \
        switch (task->path) {                                                                                          \
        case AVX512: name##_avx512(task, first, stop); break;                                                          \
        case AVX2: name##_avx2(task, first, stop); break;                                                              \
        default: name##_portable(task, first, stop);                                                                   \
        }                                                                                                              \
        fesetenv(&callers);                                                                                            \
        return 1;                                                                                                      \
    }

#endif

/* What the C files share. The meaning is blockwise.py; docs/kernels.md says why each rule is what it is.

   No pointer that comes from Python need be aligned: a mapped file places its tensors where it likes. */

#ifndef BLOCKWISE_H
#define BLOCKWISE_H

#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "written for GCC and Clang"
#endif
#if defined(__FAST_MATH__) || (defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0)
#error "every float operation must round as IEEE 754 says, or the bits differ from the reference"
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    CUTS = 15,
    LEVELS = 16,
    /* Weights that a vector path encodes at once. */
    STEP = 64,
    /* Weights whose maxima are found and used before the next are looked at, so that they are still in the first
       cache; and the weights of one piece of a sum. No block that can be quantized is larger. */
    PIECE = 4096,
    /* Running sums of squares, whatever the vectors' width, so that every path adds in the same order. */
    LANES = 16,
};

enum dtype { FLOAT32, FLOAT16, BFLOAT16 };

/* Calls a function that is always inlined with dtype as a constant. */
#define SPECIALISED(function, dtype, ...)                                                                              \
    switch (dtype) {                                                                                                   \
    case FLOAT32: function(FLOAT32, __VA_ARGS__); break;                                                               \
    case FLOAT16: function(FLOAT16, __VA_ARGS__); break;                                                               \
    case BFLOAT16: function(BFLOAT16, __VA_ARGS__); break;                                                             \
    }

/* The cuts between the 16 sorted levels, ascending, and the code of each interval. */
struct intervals {
    float cuts[CUTS];
    uint8_t codes[LEVELS];
};

/* What each instruction set does its own way. Blocks are whole; a vector path takes block sizes of 32 and more. */
struct path {
    /* The largest magnitude of each block: NaN or infinity if the block holds one. */
    void (*find_maxima)(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, float *absmax);
    /* Packed codes of the weights times their block's factor. A vector path takes multiples of STEP weights. */
    void (*encode)(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, const float *factors,
                   const struct intervals *intervals, uint8_t *codes);
    /* level * scale, rounded to dtype. */
    void (*decode)(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks, const float *scales,
                   const float *levels, uint8_t *out);
    /* Adds (weight - approximation)^2 and weight^2 of weight i to lane i % LANES of errors and of sizes; n is a multiple
       of LANES. */
    void (*add_squares)(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n, double *errors,
                        double *sizes);
};

extern const struct path portable_path;
#if defined(__x86_64__)
extern const struct path avx2_path;
extern const struct path avx512_path;
#endif

/* Of the portable path, for what the others leave: the n weights of a last, partial block. */
void portable_encode_rest(enum dtype dtype, const uint8_t *weight, int64_t n, float absmax,
                          const struct intervals *intervals, uint8_t *codes);
void portable_decode_rest(enum dtype dtype, const uint8_t *codes, int64_t n, float scale, const float *levels,
                          uint8_t *out);

ALWAYS_INLINE int64_t bytes_of(enum dtype dtype)
{
    return dtype == FLOAT32 ? 4 : 2;
}

ALWAYS_INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ALWAYS_INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ALWAYS_INLINE float float_at(const void *floats, int64_t index)
{
    float value;
    memcpy(&value, (const uint8_t *)floats + 4 * index, sizeof value);
    return value;
}

ALWAYS_INLINE float float_of_half(uint16_t half)
{
    /* The product moves the exponent: exact, and right for subnormal numbers as well. */
    float magnitude = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return float_of(bits_of(magnitude) | special | (uint32_t)(half & 0x8000) << 16);
}

ALWAYS_INLINE float weight_at(enum dtype dtype, const uint8_t *weight, int64_t index)
{
    if (dtype == FLOAT32)
        return float_at(weight, index);
    uint16_t half;
    memcpy(&half, weight + 2 * index, sizeof half);
    return dtype == FLOAT16 ? float_of_half(half) : float_of((uint32_t)half << 16);
}

#endif

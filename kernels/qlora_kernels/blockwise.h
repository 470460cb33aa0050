/* What the C files share. The meaning is blockwise.py; docs/kernels.md says why each rule is what it is.

   No pointer that comes from Python need be aligned: a mapped file places its tensors where it likes. */

#ifndef BLOCKWISE_H
#define BLOCKWISE_H

#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "written for GCC and Clang"
#endif
#if defined(__FAST_MATH__) || (defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0)
#error "every float operation must round as IEEE 754 says, or the bits differ from the reference"
#endif

#define EXPORTED __attribute__((visibility("default")))
#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    CUTS = 15,
    LEVELS = 16,
    /* Weights whose maxima are found and used before the next are looked at, so that they are still in the first
       cache; and the weights of one piece of a sum. No block that can be quantized is larger. */
    PIECE = 4096,
    /* Running sums, whatever the vectors' width, so that every path adds in the same order. */
    LANES = 16,
    /* Weights of a row that meet vectors at once: their byte pairs fill the lanes twice. */
    CHUNK = 2 * LANES,
    /* Rows that are multiplied together, so that what is read of the vectors serves all of them. */
    ROWS_AT_ONCE = 4,
    /* Vectors that a call may bring, and those whose sums are kept in registers together. */
    MOST_VECTORS = 16,
    VECTORS_AT_ONCE = 8,
};

enum dtype { FLOAT32, FLOAT16, BFLOAT16 };

enum { PORTABLE, AVX2, AVX512 };

/* Calls a function that is always inlined with dtype as a constant. */
#define SPECIALISED(function, dtype, ...)                                                                              \
    switch (dtype) {                                                                                                   \
    case FLOAT32: function(FLOAT32, __VA_ARGS__); break;                                                               \
    case FLOAT16: function(FLOAT16, __VA_ARGS__); break;                                                               \
    case BFLOAT16: function(BFLOAT16, __VA_ARGS__); break;                                                             \
    }

/* Which code a scaled weight gets: that of its interval between the cuts. */
struct intervals {
    /* Ascending. */
    float cuts[CUTS];
    uint8_t codes[LEVELS];
    /* The same by cells of 1 / cells_per_unit from -1 on: the cut in each, and the codes on its two sides. */
    float cells_per_unit;
    const float *cut_of_cell;
    const uint8_t *code_of_side;
};

/* So wide that 32 cells hold the scaled weights, which lie from -1 to 1 or are rounded to slightly more. */
#define WIDE_CELLS_PER_UNIT 15.875
enum { WIDE_CELLS = 32 };

/* The intervals, and the same once more by cells that fit into registers: cell c reaches from just above
   (c - 1) / WIDE_CELLS_PER_UNIT to c / WIDE_CELLS_PER_UNIT, and its entry is that of its last five bits. */
struct lookups {
    struct intervals intervals;
    /* FP4's cut at zero is not among them: it is the upper edge of its cell, and no weight of the cell exceeds it. */
    float cut_of_wide_cell[WIDE_CELLS];
    /* The code above the cut, 8 bits to the left of the code below it. */
    uint32_t codes_of_wide_cell[WIDE_CELLS];
};

struct dequantization {
    const uint8_t *codes;
    const uint8_t *absmax;
    const uint8_t *levels;
    /* All three NULL where absmax holds the scales themselves. */
    const uint8_t *nested_absmax;
    const uint8_t *nested_levels;
    const uint8_t *offset;
    int64_t n_weights;
    int64_t block_size;
    int64_t nested_block_size;
    uint8_t *out;
    int32_t dtype;
    int32_t path;
};

/* ROWS_AT_ONCE rows or fewer of packed weights, one after another, and the vectors that they meet. The length and the
   steps, of which each has a scale, are multiples of CHUNK. */
struct rows {
    const uint8_t *codes;
    const float *levels;
    const float *scales;
    int64_t n;
    int64_t length;
    int64_t step;
    /* CHUNK elements of each vector, then the next of each. Of a chunk first the weights' partners at even places, then
       those at odd ones, as a byte's first code is got by a shift and its second without. */
    const float *vectors;
    int64_t n_vectors;
};

/* What each instruction set does its own way. Blocks are whole; a vector path takes multiples of 32 as
   block sizes. */
struct path {
    /* The largest magnitude of each block: NaN or infinity if the block holds one. */
    void (*find_maxima)(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, float *absmax);
    /* Packed codes of the weights times their block's factor. */
    void (*encode)(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, const float *factors,
                   const struct lookups *lookups, uint8_t *codes);
    /* level * scale, rounded to dtype; no NaN among them carries a payload. If streamed, out is a multiple of 64 and is
       written past the caches; portable takes no notice. */
    void (*decode)(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks, const float *scales,
                   const float *levels, uint8_t *out, int streamed);
    /* Adds (weight - approximation)^2 and weight^2 of weight i to lane i % LANES of errors and of sizes; n is a
       multiple of LANES. */
    void (*add_squares)(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n, double *errors,
                        double *sizes);
    /* Products of rows and vectors in LANES running sums each, by fused multiply-add: sums [row][vector]. NULL for the
       portable path, which is not so picky about the rows. */
    void (*multiply)(const struct rows *rows, float *sums);
    /* As the function of that name below, but for which NaN a NaN becomes. */
    void (*find_scales)(const struct dequantization *q, int64_t first, int64_t stop, float *scales);
};

extern const struct path portable_path;
#if defined(__x86_64__)
extern const struct path avx2_path;
extern const struct path avx512_path;
void avx2_multiply(const struct rows *rows, float *sums);
void avx512_multiply(const struct rows *rows, float *sums);
void avx512_find_scales(const struct dequantization *q, int64_t first, int64_t stop, float *scales);
#endif

/* That of a number that `runs_path` has agreed to. */
const struct path *path_of(int32_t number);

/* To be undone by fesetenv: the caller may have its thread flush subnormal numbers to zero, or round otherwise. */
void enter_standard_arithmetic(fenv_t *callers);

/* Of the portable path, for what the others leave: the n weights of a last, partial block. */
void portable_encode_rest(enum dtype dtype, const uint8_t *weight, int64_t n, float absmax,
                          const struct intervals *intervals, uint8_t *codes);
void portable_decode_rest(enum dtype dtype, const uint8_t *codes, int64_t n, float scale, const float *levels,
                          uint8_t *out);
/* Element `index` of out; a NaN carries no payload. */
void portable_store(enum dtype dtype, float value, uint8_t *out, int64_t index);

/* The scales of blocks first to stop, and the levels; no NaN among them carries a payload. */
void find_scales(const struct dequantization *q, int64_t first, int64_t stop, float *scales);
void find_levels(const struct dequantization *q, float *levels);

ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* A NaN without the payload, which rounding to 16 bits could carry over into a number. */
ALWAYS_INLINE float plain(float value)
{
    return value == value ? value : NAN;
}

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

ALWAYS_INLINE uint16_t half_at(const void *halves, int64_t index)
{
    uint16_t half;
    memcpy(&half, (const uint8_t *)halves + 2 * index, sizeof half);
    return half;
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
    uint16_t half = half_at(weight, index);
    return dtype == FLOAT16 ? float_of_half(half) : float_of((uint32_t)half << 16);
}

/* With every 32 weights that are encoded: while a piece is, memory would stand idle. Beyond the end it does nothing. */
ALWAYS_INLINE void fetch_next_piece(enum dtype dtype, const uint8_t *weight)
{
    uintptr_t next = (uintptr_t)weight + (uintptr_t)(PIECE * bytes_of(dtype));
    for (int64_t line = 0; line < 32 * bytes_of(dtype); line += 64)
        __builtin_prefetch((const void *)(next + (uintptr_t)line));
}

#endif

/* The path for any processor, and for what the vector paths leave. */

#include "blockwise.h"

#include <stddef.h>

static uint16_t half_of(float value)
{
    uint32_t sign = bits_of(value) >> 16 & 0x8000, bits = bits_of(value) & 0x7fffffff;
    if (bits > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x47800000)
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000)
        /* A subnormal half counts units of 2^-24, which is the last place of 0.5: the sum rounds to it. */
        return (uint16_t)(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

static uint16_t bfloat16_of(float value)
{
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Magnitudes compared as integers have the order of the numbers, with NaN above infinity. */
ALWAYS_INLINE float largest_magnitude(enum dtype dtype, const uint8_t *weight, int64_t n)
{
    if (dtype == FLOAT32) {
        int32_t largest = 0;
        for (int64_t i = 0; i < n; i++) {
            int32_t magnitude = (int32_t)(bits_of(float_at(weight, i)) & 0x7fffffff);
            largest = magnitude > largest ? magnitude : largest;
        }
        return float_of((uint32_t)largest);
    }
    int16_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        int16_t magnitude = (int16_t)(half_at(weight, i) & 0x7fff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return dtype == FLOAT16 ? float_of_half((uint16_t)largest) : float_of((uint32_t)largest << 16);
}

ALWAYS_INLINE void maxima(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, float *absmax)
{
    for (int64_t block = 0; block < blocks; block++)
        absmax[block] = largest_magnitude(dtype, weight + block * block_size * bytes_of(dtype), block_size);
}

static void find_maxima(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, float *absmax)
{
    SPECIALISED(maxima, dtype, weight, block_size, blocks, absmax);
}

/* A cell holds one cut at most, and a larger weight never has a lower cell: one comparison tells the code, exactly. */
ALWAYS_INLINE uint8_t code_in(int32_t cell, float scaled, const struct intervals *intervals)
{
    return intervals->code_of_side[2 * cell + (scaled > intervals->cut_of_cell[cell])];
}

ALWAYS_INLINE int32_t cell_of(float scaled, const struct intervals *intervals)
{
    return (int32_t)((scaled + 1.0f) * intervals->cells_per_unit);
}

ALWAYS_INLINE void encode_blocks(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                                 const float *factors, const struct intervals *intervals, uint8_t *codes)
{
    const struct intervals table = *intervals;
    for (int64_t block = 0; block < blocks; block++) {
        float factor = factors[block], scaled[LANES];
        int32_t cells[LANES];
        for (int64_t start = block * block_size; start < (block + 1) * block_size; start += LANES) {
            /* A loop that compilers turn into vector instructions, and one that looks up. */
            for (int lane = 0; lane < LANES; lane++) {
                scaled[lane] = weight_at(dtype, weight, start + lane) * factor;
                cells[lane] = cell_of(scaled[lane], &table);
            }
            for (int lane = 0; lane < LANES; lane += 2) {
                uint8_t first = code_in(cells[lane], scaled[lane], &table);
                uint8_t second = code_in(cells[lane + 1], scaled[lane + 1], &table);
                codes[(start + lane) / 2] = (uint8_t)(first << 4 | second);
            }
        }
    }
}

static void encode(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, const float *factors,
                   const struct lookups *lookups, uint8_t *codes)
{
    SPECIALISED(encode_blocks, dtype, weight, block_size, blocks, factors, &lookups->intervals, codes);
}

void portable_encode_rest(enum dtype dtype, const uint8_t *weight, int64_t n, float absmax,
                          const struct intervals *intervals, uint8_t *codes)
{
    for (int64_t i = 0; i < n; i += 2) {
        /* An odd last weight is joined by the code of zero. */
        float first = weight_at(dtype, weight, i) / absmax;
        float second = i + 1 < n ? weight_at(dtype, weight, i + 1) / absmax : 0.0f;
        codes[i / 2] = (uint8_t)(code_in(cell_of(first, intervals), first, intervals) << 4 |
                                 code_in(cell_of(second, intervals), second, intervals));
    }
}

ALWAYS_INLINE void decode_block(enum dtype dtype, const uint8_t *codes, int64_t n, float scale, const float *levels,
                                uint8_t *out)
{
    /* One scale serves the block: scale and round the levels, once, and look the weights up. */
    float exact[LEVELS];
    uint16_t rounded[LEVELS];
    for (int code = 0; code < LEVELS; code++)
        exact[code] = levels[code] * scale;
    for (int code = 0; code < LEVELS && dtype != FLOAT32; code++)
        rounded[code] = dtype == FLOAT16 ? half_of(exact[code]) : bfloat16_of(exact[code]);
    const uint8_t *table = dtype == FLOAT32 ? (const uint8_t *)exact : (const uint8_t *)rounded;
    int64_t size = bytes_of(dtype);
    for (int64_t i = 0; i < n / 2; i++) {
        memcpy(out + 2 * i * size, table + (codes[i] >> 4) * size, (size_t)size);
        memcpy(out + (2 * i + 1) * size, table + (codes[i] & 15) * size, (size_t)size);
    }
    if (n % 2)
        memcpy(out + (n - 1) * size, table + (codes[n / 2] >> 4) * size, (size_t)size);
}

void portable_decode_rest(enum dtype dtype, const uint8_t *codes, int64_t n, float scale, const float *levels,
                          uint8_t *out)
{
    SPECIALISED(decode_block, dtype, codes, n, scale, levels, out);
}

void portable_store(enum dtype dtype, float value, uint8_t *out, int64_t index)
{
    float number = plain(value);
    uint16_t half = dtype == FLOAT16 ? half_of(number) : bfloat16_of(number);
    memcpy(out + index * bytes_of(dtype), dtype == FLOAT32 ? (const void *)&number : (const void *)&half,
           (size_t)bytes_of(dtype));
}

static void decode(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks, const float *scales,
                   const float *levels, uint8_t *out, int streamed)
{
    (void)streamed;
    for (int64_t block = 0; block < blocks; block++)
        portable_decode_rest(dtype, codes + block * block_size / 2, block_size, scales[block], levels,
                             out + block * block_size * bytes_of(dtype));
}

ALWAYS_INLINE void squares(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n,
                           double *errors, double *sizes)
{
    for (int64_t start = 0; start < n; start += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double exact = (double)weight_at(dtype, weight, start + lane);
            double error = exact - (double)approximation[start + lane];
            errors[lane] += error * error;
            sizes[lane] += exact * exact;
        }
}

static void add_squares(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n, double *errors,
                        double *sizes)
{
    SPECIALISED(squares, dtype, weight, approximation, n, errors, sizes);
}

const struct path portable_path = {find_maxima, encode, decode, add_squares, NULL, find_scales};

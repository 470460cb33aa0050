/* The path for any processor, and for what the vector paths leave. */

#include "blockwise.h"

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
    if ((bits & 0x7fffffff) > 0x7f800000)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ALWAYS_INLINE void maxima(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, float *absmax)
{
    for (int64_t block = 0; block < blocks; block++) {
        /* Magnitudes compared as integers have the order of the numbers, with NaN above infinity. */
        uint32_t largest = 0;
        for (int64_t i = block * block_size; i < (block + 1) * block_size; i++) {
            uint32_t magnitude = bits_of(weight_at(dtype, weight, i)) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        absmax[block] = float_of(largest);
    }
}

static void find_maxima(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, float *absmax)
{
    SPECIALISED(maxima, dtype, weight, block_size, blocks, absmax);
}

/* n packed codes of LANES scaled weights; an odd last one is joined by the code of the weight after it. */
ALWAYS_INLINE void encode_lanes(const float *scaled, int64_t n, const struct intervals *intervals, uint8_t *codes)
{
    int32_t interval[LANES] = {0};
    for (int cut = 0; cut < CUTS; cut++)
        for (int lane = 0; lane < LANES; lane++)
            interval[lane] += scaled[lane] > intervals->cuts[cut];
    for (int64_t i = 0; i < n; i += 2)
        codes[i / 2] = (uint8_t)(intervals->codes[interval[i]] << 4 | intervals->codes[interval[i + 1]]);
}

ALWAYS_INLINE void encode_blocks(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                                 const float *factors, const struct intervals *intervals, uint8_t *codes)
{
    for (int64_t start = 0; start < blocks * block_size; start += LANES) {
        float factor = factors[start / block_size], scaled[LANES];
        for (int lane = 0; lane < LANES; lane++)
            scaled[lane] = weight_at(dtype, weight, start + lane) * factor;
        encode_lanes(scaled, LANES, intervals, codes + start / 2);
    }
}

static void encode(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, const float *factors,
                   const struct intervals *intervals, uint8_t *codes)
{
    SPECIALISED(encode_blocks, dtype, weight, block_size, blocks, factors, intervals, codes);
}

void portable_encode_rest(enum dtype dtype, const uint8_t *weight, int64_t n, float absmax,
                          const struct intervals *intervals, uint8_t *codes)
{
    for (int64_t start = 0; start < n; start += LANES) {
        int64_t left = n - start < LANES ? n - start : LANES;
        /* Zeros behind the last weight: an odd one is joined by the code of zero. */
        float scaled[LANES] = {0};
        for (int64_t lane = 0; lane < left; lane++)
            scaled[lane] = weight_at(dtype, weight, start + lane) / absmax;
        encode_lanes(scaled, left, intervals, codes + start / 2);
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

static void decode(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks, const float *scales,
                   const float *levels, uint8_t *out)
{
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

const struct path portable_path = {find_maxima, encode, decode, add_squares};

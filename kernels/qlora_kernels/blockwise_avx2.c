/* The path for processors with AVX2 and F16C. */

#include "blockwise.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define INLINE ALWAYS_INLINE TARGET

INLINE __m256 load_weights(enum dtype dtype, const uint8_t *from)
{
    if (dtype == FLOAT32)
        return _mm256_loadu_ps((const float *)from);
    __m128i halves = _mm_loadu_si128((const __m128i *)from);
    if (dtype == FLOAT16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE __m256i load_bits(const uint8_t *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

INLINE float largest_magnitude(enum dtype dtype, const uint8_t *weight, int64_t n)
{
    __m256i largest = _mm256_setzero_si256();
    if (dtype == FLOAT32) {
        for (int64_t i = 0; i < n; i += 8) {
            __m256i bits = _mm256_and_si256(load_bits(weight + 4 * i), _mm256_set1_epi32(0x7fffffff));
            largest = _mm256_max_epu32(largest, bits);
        }
        __m128i of_4 = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        __m128i of_2 = _mm_max_epu32(of_4, _mm_shuffle_epi32(of_4, _MM_SHUFFLE(1, 0, 3, 2)));
        __m128i of_1 = _mm_max_epu32(of_2, _mm_shuffle_epi32(of_2, _MM_SHUFFLE(2, 3, 0, 1)));
        return float_of((uint32_t)_mm_cvtsi128_si32(of_1));
    }
    for (int64_t i = 0; i < n; i += 16) {
        __m256i bits = _mm256_and_si256(load_bits(weight + 2 * i), _mm256_set1_epi16(0x7fff));
        largest = _mm256_max_epu16(largest, bits);
    }
    __m128i of_8 = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    /* There is an instruction for the smallest of eight: the smallest complement. */
    __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(of_8, _mm_set1_epi16(-1)));
    uint16_t half = (uint16_t)~_mm_cvtsi128_si32(smallest);
    return dtype == FLOAT16 ? float_of_half(half) : float_of((uint32_t)half << 16);
}

INLINE void maxima(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks, float *absmax)
{
    for (int64_t block = 0; block < blocks; block++)
        absmax[block] = largest_magnitude(dtype, weight + block * block_size * bytes_of(dtype), block_size);
}

TARGET static void find_maxima(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                               float *absmax)
{
    SPECIALISED(maxima, dtype, weight, block_size, blocks, absmax);
}

/* The cuts as a tree: those that halve what is left after 0, 1, 2 and 3 comparisons. */
struct tables {
    __m256 halves, quarters, eighths, sixteenths;
    __m256i codes;
};

/* Twice the interval so far, plus whether the weight lies above the cut. */
INLINE __m256i descend(__m256i interval, __m256 scaled, __m256 cut)
{
    __m256i above = _mm256_castps_si256(_mm256_cmp_ps(scaled, cut, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(interval, interval), above);
}

INLINE __m256i interval_of(__m256 scaled, const struct tables *tables)
{
    __m256i interval = descend(_mm256_setzero_si256(), scaled, tables->halves);
    interval = descend(interval, scaled, _mm256_permutevar8x32_ps(tables->quarters, interval));
    interval = descend(interval, scaled, _mm256_permutevar8x32_ps(tables->eighths, interval));
    return descend(interval, scaled, _mm256_permutevar8x32_ps(tables->sixteenths, interval));
}

/* 32 weights of one block: 16 bytes. */
INLINE void encode_32(enum dtype dtype, const uint8_t *weight, __m256 factor, const struct tables *tables,
                             uint8_t *codes)
{
    __m256i part[4];
    for (int i = 0; i < 4; i++)
        part[i] = interval_of(_mm256_mul_ps(load_weights(dtype, weight + 8 * i * bytes_of(dtype)), factor), tables);
    /* Each 128 bits then hold four bytes of each part. */
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    bytes = _mm256_shuffle_epi8(tables->codes, bytes);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    /* 16 * first + second, as words. */
    __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i *)codes, packed);
}

INLINE void encode_blocks(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                          const float *factors, const struct lookups *lookups, uint8_t *codes)
{
    const float *cut = lookups->intervals.cuts;
    struct tables tables = {
        _mm256_set1_ps(cut[7]),
        _mm256_setr_ps(cut[3], cut[11], 0, 0, 0, 0, 0, 0),
        _mm256_setr_ps(cut[1], cut[5], cut[9], cut[13], 0, 0, 0, 0),
        _mm256_setr_ps(cut[0], cut[2], cut[4], cut[6], cut[8], cut[10], cut[12], cut[14]),
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)lookups->intervals.codes)),
    };
    for (int64_t block = 0; block < blocks; block++) {
        __m256 factor = _mm256_set1_ps(factors[block]);
        for (int64_t i = block * block_size; i < (block + 1) * block_size; i += 32) {
            fetch_next_piece(dtype, weight + i * bytes_of(dtype));
            encode_32(dtype, weight + i * bytes_of(dtype), factor, &tables, codes + i / 2);
        }
    }
}

TARGET static void encode(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                          const float *factors, const struct lookups *lookups, uint8_t *codes)
{
    SPECIALISED(encode_blocks, dtype, weight, block_size, blocks, factors, lookups, codes);
}

INLINE void store(uint8_t *out, __m256i values, int streamed)
{
    if (streamed)
        _mm256_stream_si256((__m256i *)out, values);
    else
        _mm256_storeu_si256((__m256i *)out, values);
}

INLINE void decode_float32(const uint8_t *codes, int64_t n, __m256 low, __m256 high, uint8_t *out, int streamed)
{
    for (int64_t i = 0; i < n; i += 8) {
        int32_t four;
        memcpy(&four, codes + i / 2, sizeof four);
        /* A byte becomes two indices of 32 bits, of which a lookup heeds the low three and the blend the fourth. */
        __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
        __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        __m256 of_low = _mm256_permutevar8x32_ps(low, index), of_high = _mm256_permutevar8x32_ps(high, index);
        store(out + 4 * i, _mm256_castps_si256(_mm256_blendv_ps(of_low, of_high, is_high)), streamed);
    }
}

/* The 16 values, rounded to 16 bits, lie in two registers of eight. */
INLINE void decode_16_bits(const uint8_t *codes, int64_t n, __m128i first, __m128i last, uint8_t *out, int streamed)
{
    /* Lookups are of bytes: one table of the values' low bytes, one of the high ones. */
    __m128i byte = _mm_set1_epi16(0xff);
    __m128i lows = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte));
    __m128i highs = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8));
    __m256i low_table = _mm256_broadcastsi128_si256(lows), high_table = _mm256_broadcastsi128_si256(highs);
    for (int64_t i = 0; i < n; i += 32) {
        /* Two indices from each byte, in halves whose bytes interleave to 16 weights each. */
        __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m256i index = _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(bytes, 4), _mm256_slli_epi16(bytes, 8)),
                                         _mm256_set1_epi8(15));
        __m256i low = _mm256_shuffle_epi8(low_table, index), high = _mm256_shuffle_epi8(high_table, index);
        __m256i left = _mm256_unpacklo_epi8(low, high), right = _mm256_unpackhi_epi8(low, high);
        store(out + 2 * i, _mm256_permute2x128_si256(left, right, 0x20), streamed);
        store(out + 2 * i + 32, _mm256_permute2x128_si256(left, right, 0x31), streamed);
    }
}

/* Eight rounded values as 32-bit integers below 2^16. */
INLINE __m256i bfloat16_of(__m256 values)
{
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

INLINE void decode_blocks(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks,
                          const float *scales, const float *levels, uint8_t *out, int streamed)
{
    for (int64_t block = 0; block < blocks; block++) {
        __m256 scale = _mm256_set1_ps(scales[block]);
        __m256 low = _mm256_mul_ps(_mm256_loadu_ps(levels), scale);
        __m256 high = _mm256_mul_ps(_mm256_loadu_ps(levels + 8), scale);
        const uint8_t *from = codes + block * block_size / 2;
        uint8_t *to = out + block * block_size * bytes_of(dtype);
        if (dtype == FLOAT32) {
            decode_float32(from, block_size, low, high, to, streamed);
        } else if (dtype == FLOAT16) {
            decode_16_bits(from, block_size, _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), to, streamed);
        } else {
            __m256i rounded = _mm256_packus_epi32(bfloat16_of(low), bfloat16_of(high));
            rounded = _mm256_permute4x64_epi64(rounded, _MM_SHUFFLE(3, 1, 2, 0));
            decode_16_bits(from, block_size, _mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1), to,
                           streamed);
        }
    }
}

TARGET static void decode(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks,
                          const float *scales, const float *levels, uint8_t *out, int streamed)
{
    if (!streamed) {
        SPECIALISED(decode_blocks, dtype, codes, block_size, blocks, scales, levels, out, 0);
    } else {
        SPECIALISED(decode_blocks, dtype, codes, block_size, blocks, scales, levels, out, 1);
        /* Streamed stores come to be seen in order only from here on. */
        _mm_sfence();
    }
}

INLINE void squares(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n, double *errors,
                    double *sizes)
{
    __m256d error_sums[4], size_sums[4];
    for (int part = 0; part < 4; part++) {
        error_sums[part] = _mm256_loadu_pd(errors + 4 * part);
        size_sums[part] = _mm256_loadu_pd(sizes + 4 * part);
    }
    for (int64_t i = 0; i < n; i += LANES) {
        __m256 exact[2] = {load_weights(dtype, weight + i * bytes_of(dtype)),
                           load_weights(dtype, weight + (i + 8) * bytes_of(dtype))};
        for (int part = 0; part < 4; part++) {
            __m256 eight = exact[part / 2];
            __m128 four = part % 2 ? _mm256_extractf128_ps(eight, 1) : _mm256_castps256_ps128(eight);
            __m256d wide = _mm256_cvtps_pd(four);
            __m256d error = _mm256_sub_pd(wide, _mm256_cvtps_pd(_mm_loadu_ps(approximation + i + 4 * part)));
            error_sums[part] = _mm256_add_pd(error_sums[part], _mm256_mul_pd(error, error));
            size_sums[part] = _mm256_add_pd(size_sums[part], _mm256_mul_pd(wide, wide));
        }
    }
    for (int part = 0; part < 4; part++) {
        _mm256_storeu_pd(errors + 4 * part, error_sums[part]);
        _mm256_storeu_pd(sizes + 4 * part, size_sums[part]);
    }
}

TARGET static void add_squares(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n,
                               double *errors, double *sizes)
{
    SPECIALISED(squares, dtype, weight, approximation, n, errors, sizes);
}

const struct path avx2_path = {find_maxima, encode, decode, add_squares, avx2_multiply, find_scales};

#endif

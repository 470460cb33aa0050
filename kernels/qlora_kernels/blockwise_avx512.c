/* The path for processors with AVX-512 F, BW, DQ and VL. */

#include "blockwise.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE ALWAYS_INLINE TARGET

INLINE __m512 load_weights(enum dtype dtype, const uint8_t *from)
{
    if (dtype == FLOAT32)
        return _mm512_loadu_ps(from);
    __m256i halves = _mm256_loadu_si256((const __m256i *)from);
    if (dtype == FLOAT16)
        return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE uint16_t largest_of_words(__m512i words)
{
    __m256i of_16 = _mm256_max_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
    __m128i of_8 = _mm_max_epu16(_mm256_castsi256_si128(of_16), _mm256_extracti128_si256(of_16, 1));
    /* There is an instruction for the smallest of eight: the smallest complement. */
    return (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(of_8, _mm_set1_epi16(-1))));
}

INLINE float largest_magnitude(enum dtype dtype, const uint8_t *weight, int64_t n)
{
    __m512i largest = _mm512_setzero_si512();
    if (dtype == FLOAT32) {
        for (int64_t i = 0; i < n; i += 16) {
            __m512i bits = _mm512_and_si512(_mm512_loadu_si512(weight + 4 * i), _mm512_set1_epi32(0x7fffffff));
            largest = _mm512_max_epu32(largest, bits);
        }
        return float_of(_mm512_reduce_max_epu32(largest));
    }
    for (int64_t i = 0; i < n; i += 32) {
        __m512i bits = _mm512_and_si512(_mm512_loadu_si512(weight + 2 * i), _mm512_set1_epi16(0x7fff));
        largest = _mm512_max_epu16(largest, bits);
    }
    uint16_t half = largest_of_words(largest);
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

struct tables {
    __m512 cuts[2];
    /* Of the first weight of a byte, in its high nibble, and of the second. */
    __m512i first_codes[2], second_codes[2];
};

/* The code of each scaled weight in the low byte of its 32 bits, below bits of no meaning. */
INLINE __m512i codes_of(__m512 scaled, const __m512 *cuts, const __m512i *codes)
{
    /* The last place of this sum is 1/16: rounded up, it leaves the cell in the last bits. */
    const __m512 large = _mm512_set1_ps(0x1.8p19f), cells = _mm512_set1_ps(WIDE_CELLS_PER_UNIT / 16.0f);
    __m512i cell = _mm512_castps_si512(
        _mm512_fmadd_round_ps(scaled, cells, large, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
    __m512 cut = _mm512_permutex2var_ps(cuts[0], cell, cuts[1]);
    __m512i code = _mm512_permutex2var_epi32(codes[0], cell, codes[1]);
    return _mm512_mask_srli_epi32(code, _mm512_cmp_ps_mask(scaled, cut, _CMP_GT_OQ), code, 8);
}

/* 32 weights: the 1st, 3rd, 5th ... and the 2nd, 4th, 6th ... */
INLINE void load_apart(enum dtype dtype, const uint8_t *from, __m512 *firsts, __m512 *seconds)
{
    if (dtype == BFLOAT16) {
        __m512i pairs = _mm512_loadu_si512(from);
        *firsts = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        *seconds = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
        return;
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512 low = load_weights(dtype, from), high = load_weights(dtype, from + 16 * bytes_of(dtype));
    *firsts = _mm512_permutex2var_ps(low, even, high);
    *seconds = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

INLINE void encode_blocks(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                          const float *factors, const struct lookups *lookups, uint8_t *codes)
{
    struct tables tables;
    for (int half = 0; half < 2; half++) {
        tables.cuts[half] = _mm512_loadu_ps(lookups->cut_of_wide_cell + 16 * half);
        tables.second_codes[half] = _mm512_loadu_si512(lookups->codes_of_wide_cell + 16 * half);
        tables.first_codes[half] = _mm512_slli_epi32(tables.second_codes[half], 4);
    }
    for (int64_t block = 0; block < blocks; block++) {
        __m512 factor = _mm512_set1_ps(factors[block]), firsts, seconds;
        for (int64_t i = block * block_size; i < (block + 1) * block_size; i += 32) {
            fetch_next_piece(dtype, weight + i * bytes_of(dtype));
            load_apart(dtype, weight + i * bytes_of(dtype), &firsts, &seconds);
            __m512i high = codes_of(_mm512_mul_ps(firsts, factor), tables.cuts, tables.first_codes);
            __m512i low = codes_of(_mm512_mul_ps(seconds, factor), tables.cuts, tables.second_codes);
            _mm_storeu_si128((__m128i *)(codes + i / 2), _mm512_cvtepi32_epi8(_mm512_or_si512(high, low)));
        }
    }
}

TARGET static void encode(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                          const float *factors, const struct lookups *lookups, uint8_t *codes)
{
    SPECIALISED(encode_blocks, dtype, weight, block_size, blocks, factors, lookups, codes);
}

INLINE void store(uint8_t *out, __m512i values, int streamed)
{
    if (streamed)
        _mm512_stream_si512((void *)out, values);
    else
        _mm512_storeu_si512(out, values);
}

INLINE void decode_float32(const uint8_t *codes, int64_t n, __m512 values, uint8_t *out, int streamed)
{
    for (int64_t i = 0; i < n; i += 16) {
        /* A byte becomes two indices of 32 bits, of which the lookup heeds the low four. */
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        store(out + 4 * i, _mm512_castps_si512(_mm512_permutexvar_ps(index, values)), streamed);
    }
}

/* The values of two blocks, rounded: words 0, 2, 4 ... are the first's. */
INLINE __m512i rounded_pairs(enum dtype dtype, __m512 first, __m512 second)
{
    if (dtype == FLOAT16) {
        __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
        __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    __m512i bits[2] = {_mm512_castps_si512(first), _mm512_castps_si512(second)};
    for (int block = 0; block < 2; block++) {
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits[block], 16), _mm512_set1_epi32(1));
        bits[block] = _mm512_add_epi32(bits[block], _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    }
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(bits[0], 16), 0xaaaaaaaa, bits[1]);
}

INLINE void decode_16_bits(const uint8_t *codes, int64_t n, __m512i pairs, int is_second, uint8_t *out, int streamed)
{
    const __m512i code_bits = _mm512_set1_epi16(0x1e), ones = _mm512_set1_epi16(1);
    for (int64_t i = 0; i < n; i += 32) {
        /* A byte becomes two indices of 16 bits, of which the lookup heeds the low five: a code and which block. */
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 3), _mm512_slli_epi32(bytes, 17));
        index = is_second ? _mm512_or_si512(index, ones) : _mm512_and_si512(index, code_bits);
        store(out + 2 * i, _mm512_permutexvar_epi16(index, pairs), streamed);
    }
}

INLINE void decode_blocks(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks,
                          const float *scales, const float *levels, uint8_t *out, int streamed)
{
    __m512 exact = _mm512_loadu_ps(levels);
    int64_t bytes_in = block_size / 2, bytes_out = block_size * bytes_of(dtype);
    for (int64_t block = 0; block < blocks; block += 2) {
        int64_t next = block + 1 < blocks ? block + 1 : block;
        __m512 first = _mm512_mul_ps(exact, _mm512_set1_ps(scales[block]));
        __m512 second = _mm512_mul_ps(exact, _mm512_set1_ps(scales[next]));
        if (dtype == FLOAT32) {
            decode_float32(codes + block * bytes_in, block_size, first, out + block * bytes_out, streamed);
            decode_float32(codes + next * bytes_in, block_size, second, out + next * bytes_out, streamed);
        } else {
            __m512i pairs = rounded_pairs(dtype, first, second);
            decode_16_bits(codes + block * bytes_in, block_size, pairs, 0, out + block * bytes_out, streamed);
            decode_16_bits(codes + next * bytes_in, block_size, pairs, 1, out + next * bytes_out, streamed);
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
    __m512d error_sums[2] = {_mm512_loadu_pd(errors), _mm512_loadu_pd(errors + 8)};
    __m512d size_sums[2] = {_mm512_loadu_pd(sizes), _mm512_loadu_pd(sizes + 8)};
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 exact = load_weights(dtype, weight + i * bytes_of(dtype));
        __m256 halves[2] = {_mm512_castps512_ps256(exact), _mm512_extractf32x8_ps(exact, 1)};
        for (int half = 0; half < 2; half++) {
            __m512d wide = _mm512_cvtps_pd(halves[half]);
            __m512d approximate = _mm512_cvtps_pd(_mm256_loadu_ps(approximation + i + 8 * half));
            __m512d error = _mm512_sub_pd(wide, approximate);
            error_sums[half] = _mm512_add_pd(error_sums[half], _mm512_mul_pd(error, error));
            size_sums[half] = _mm512_add_pd(size_sums[half], _mm512_mul_pd(wide, wide));
        }
    }
    for (int half = 0; half < 2; half++) {
        _mm512_storeu_pd(errors + 8 * half, error_sums[half]);
        _mm512_storeu_pd(sizes + 8 * half, size_sums[half]);
    }
}

TARGET static void add_squares(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n,
                               double *errors, double *sizes)
{
    SPECIALISED(squares, dtype, weight, approximation, n, errors, sizes);
}

const struct path avx512_path = {find_maxima, encode, decode, add_squares, avx512_multiply, avx512_find_scales};

#endif

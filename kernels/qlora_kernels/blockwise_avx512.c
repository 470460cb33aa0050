/* The path for processors with AVX-512 F, BW, DQ and VL. */

#include "blockwise.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE ALWAYS_INLINE TARGET

/* Cells that the scaled weights are sorted into, and how many of them one unit spans: -1 to 1 gives -15 to 16, with
   room for a weight that rounds to slightly above 1. */
enum { CELLS = 32 };
static const float CELLS_PER_UNIT = 15.875f;

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

/* A cell reaches from just above its lower edge to its upper one, and holds at most one cut that a weight of the cell
   can exceed: one comparison tells the interval, exactly, as the cell never falls when the weight rises. FP4's cut at
   zero is an upper edge. */
struct cells {
    float cut[CELLS];
    int32_t intervals_below[CELLS];
};

static int cell_of(float scaled)
{
    return (int)ceilf(scaled * CELLS_PER_UNIT);
}

static struct cells sort_into_cells(const struct intervals *intervals)
{
    struct cells cells;
    for (int cell = -CELLS / 2; cell < CELLS / 2; cell++) {
        /* Cell 16 wraps around to -16: five bits are looked up. */
        int number = cell == -CELLS / 2 ? CELLS / 2 : cell, below = 0;
        while (below < CUTS && cell_of(intervals->cuts[below]) < number)
            below++;
        int here = below < CUTS && cell_of(intervals->cuts[below]) == number;
        cells.intervals_below[cell & (CELLS - 1)] = below;
        cells.cut[cell & (CELLS - 1)] = here ? intervals->cuts[below] : INFINITY;
    }
    return cells;
}

struct tables {
    __m512 cut_low, cut_high;
    __m512i below_low, below_high, codes;
};

INLINE __m512i interval_of(__m512 scaled, const struct tables *tables)
{
    __m512i cell = _mm512_cvt_roundps_epi32(_mm512_mul_ps(scaled, _mm512_set1_ps(CELLS_PER_UNIT)),
                                            _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    __m512 cut = _mm512_permutex2var_ps(tables->cut_low, cell, tables->cut_high);
    __m512i below = _mm512_permutex2var_epi32(tables->below_low, cell, tables->below_high);
    __mmask16 above = _mm512_cmp_ps_mask(scaled, cut, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
}

INLINE void encode_step(enum dtype dtype, const uint8_t *weight, __m512 factor, __m512 factor_of_second_half,
                        const struct tables *tables, uint8_t *codes)
{
    int64_t quarter = 16 * bytes_of(dtype);
    __m512i a = interval_of(_mm512_mul_ps(load_weights(dtype, weight), factor), tables);
    __m512i b = interval_of(_mm512_mul_ps(load_weights(dtype, weight + quarter), factor), tables);
    __m512i c = interval_of(_mm512_mul_ps(load_weights(dtype, weight + 2 * quarter), factor_of_second_half), tables);
    __m512i d = interval_of(_mm512_mul_ps(load_weights(dtype, weight + 3 * quarter), factor_of_second_half), tables);
    /* Each 128 bits then hold four bytes of a, of b, of c and of d. */
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    bytes = _mm512_shuffle_epi8(tables->codes, bytes);
    /* 16 * first + second, as words. */
    __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));
    pairs = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), pairs);
    _mm256_storeu_si256((__m256i *)codes, _mm512_cvtepi16_epi8(pairs));
}

INLINE void encode_blocks(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                          const float *factors, const struct intervals *intervals, uint8_t *codes)
{
    struct cells cells = sort_into_cells(intervals);
    struct tables tables = {
        _mm512_loadu_ps(cells.cut),
        _mm512_loadu_ps(cells.cut + 16),
        _mm512_loadu_si512(cells.intervals_below),
        _mm512_loadu_si512(cells.intervals_below + 16),
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)intervals->codes)),
    };
    for (int64_t start = 0; start < blocks * block_size; start += STEP) {
        __m512 factor = _mm512_set1_ps(factors[start / block_size]);
        __m512 second = _mm512_set1_ps(factors[(start + STEP / 2) / block_size]);
        encode_step(dtype, weight + start * bytes_of(dtype), factor, second, &tables, codes + start / 2);
    }
}

TARGET static void encode(enum dtype dtype, const uint8_t *weight, int64_t block_size, int64_t blocks,
                          const float *factors, const struct intervals *intervals, uint8_t *codes)
{
    SPECIALISED(encode_blocks, dtype, weight, block_size, blocks, factors, intervals, codes);
}

INLINE __m256i bfloat16_of(__m512 values)
{
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE void decode_block(enum dtype dtype, const uint8_t *codes, int64_t n, __m512 values, uint8_t *out)
{
    if (dtype == FLOAT32) {
        for (int64_t i = 0; i < n; i += 16) {
            /* A byte becomes two indices of 32 bits, of which the lookup heeds the low four. */
            __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
            _mm512_storeu_ps(out + 4 * i, _mm512_permutexvar_ps(index, values));
        }
        return;
    }
    __m256i rounded = dtype == FLOAT16 ? _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT) : bfloat16_of(values);
    /* Twice, as the lookup heeds five bits and the fifth is not ours. */
    __m512i table = _mm512_broadcast_i64x4(rounded);
    for (int64_t i = 0; i < n; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(index, table));
    }
}

INLINE void decode_blocks(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks,
                          const float *scales, const float *levels, uint8_t *out)
{
    __m512 exact = _mm512_loadu_ps(levels);
    for (int64_t block = 0; block < blocks; block++)
        decode_block(dtype, codes + block * block_size / 2, block_size,
                     _mm512_mul_ps(exact, _mm512_set1_ps(scales[block])), out + block * block_size * bytes_of(dtype));
}

TARGET static void decode(enum dtype dtype, const uint8_t *codes, int64_t block_size, int64_t blocks,
                          const float *scales, const float *levels, uint8_t *out)
{
    SPECIALISED(decode_blocks, dtype, codes, block_size, blocks, scales, levels, out);
}

INLINE void squares(enum dtype dtype, const uint8_t *weight, const float *approximation, int64_t n, double *errors,
                    double *sizes)
{
    __m512d error_sums[2] = {_mm512_loadu_pd(errors), _mm512_loadu_pd(errors + 8)};
    __m512d size_sums[2] = {_mm512_loadu_pd(sizes), _mm512_loadu_pd(sizes + 8)};
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 exact = load_weights(dtype, weight + i * bytes_of(dtype)), about = _mm512_loadu_ps(approximation + i);
        __m256 exact_halves[2] = {_mm512_castps512_ps256(exact), _mm512_extractf32x8_ps(exact, 1)};
        __m256 about_halves[2] = {_mm512_castps512_ps256(about), _mm512_extractf32x8_ps(about, 1)};
        for (int half = 0; half < 2; half++) {
            __m512d wide = _mm512_cvtps_pd(exact_halves[half]);
            __m512d error = _mm512_sub_pd(wide, _mm512_cvtps_pd(about_halves[half]));
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

const struct path avx512_path = {find_maxima, encode, decode, add_squares};

#endif

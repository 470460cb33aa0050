/* Products of packed rows with vectors, by AVX-512. */

#include "blockwise.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE ALWAYS_INLINE TARGET

/* Sixteen scales by one look-up in memory. */
TARGET void avx512_find_scales(const struct dequantization *q, int64_t first, int64_t stop, float *scales)
{
    if (q->nested_absmax == NULL) {
        find_scales(q, first, stop, scales);
        return;
    }
    const __m512 offset = _mm512_set1_ps(float_at(q->offset, 0));
    for (int64_t block = first; block < stop;) {
        int64_t group = block / q->nested_block_size, end = smaller((group + 1) * q->nested_block_size, stop);
        __m512 nested = _mm512_set1_ps(float_at(q->nested_absmax, group));
        for (; block < end; block = smaller(block + 16, end)) {
            __mmask16 here = (__mmask16)(0xffff >> (16 - smaller(16, end - block)));
            __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, q->absmax + block));
            __m512 levels = _mm512_i32gather_ps(codes, q->nested_levels, 4);
            _mm512_mask_storeu_ps(scales + (block - first), here, _mm512_add_ps(_mm512_mul_ps(levels, nested), offset));
        }
    }
}

/* By halves, as everywhere. */
INLINE float total_of(__m512 lanes)
{
    __m256 of_8 = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    __m128 of_4 = _mm_add_ps(_mm256_castps256_ps128(of_8), _mm256_extractf128_ps(of_8, 1));
    __m128 of_2 = _mm_add_ps(of_4, _mm_movehl_ps(of_4, of_4));
    return _mm_cvtss_f32(_mm_add_ss(of_2, _mm_movehdup_ps(of_2)));
}

/* R rows from `row` on with V vectors from `vector` on, each pair with a register of its own. */
INLINE void multiply_tile(int R, int V, const struct rows *rows, int64_t row, int64_t vector, float *sums)
{
    const int64_t bytes = rows->length / 2, steps = rows->length / rows->step;
    const uint8_t *codes = rows->codes + row * bytes;
    const float *scales = rows->scales + row * steps, *vectors = rows->vectors + vector * CHUNK;
    const __m512 levels = _mm512_loadu_ps(rows->levels);
    __m512 lanes[ROWS_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            lanes[r][v] = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++) {
        /* One scale serves the step: scale the levels, once, and look the weights up. */
        __m512 values[ROWS_AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            values[r] = _mm512_mul_ps(levels, _mm512_set1_ps(scales[r * steps + step]));
        for (int64_t i = step * rows->step; i < (step + 1) * rows->step; i += CHUNK) {
            __m512 firsts[ROWS_AT_ONCE], seconds[ROWS_AT_ONCE];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                /* A byte becomes 32 bits, of which a look-up heeds the low four. */
                /* The next rows' codes: each row is too short for the processor to see them coming. */
                __builtin_prefetch(codes + (r + R) * bytes + i / 2);
                __m512i pairs =
                    _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + r * bytes + i / 2)));
                firsts[r] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), values[r]);
                seconds[r] = _mm512_permutexvar_ps(pairs, values[r]);
            }
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                const float *x = vectors + i * rows->n_vectors + v * CHUNK;
                __m512 even = _mm512_loadu_ps(x), odd = _mm512_loadu_ps(x + LANES);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    lanes[r][v] = _mm512_fmadd_ps(seconds[r], odd, _mm512_fmadd_ps(firsts[r], even, lanes[r][v]));
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            sums[(row + r) * rows->n_vectors + vector + v] = total_of(lanes[r][v]);
}

/* With V vectors, R rows at a time: a row's sums come in the same order whatever the tile. */
INLINE void multiply_tiles(int R, int V, const struct rows *rows, int64_t vector, float *sums)
{
    int64_t row = 0;
    for (; row + R <= rows->n; row += R)
        multiply_tile(R, V, rows, row, vector, sums);
    for (; row < rows->n; row++)
        multiply_tile(1, V, rows, row, vector, sums);
}

/* R * V sums, and two values of each row, must find room in 32 registers. */
TARGET void avx512_multiply(const struct rows *rows, float *sums)
{
    for (int64_t vector = 0; vector < rows->n_vectors; vector += VECTORS_AT_ONCE)
        switch (smaller(VECTORS_AT_ONCE, rows->n_vectors - vector)) {
        case 1: multiply_tiles(4, 1, rows, vector, sums); break;
        case 2: multiply_tiles(4, 2, rows, vector, sums); break;
        case 3: multiply_tiles(4, 3, rows, vector, sums); break;
        case 4: multiply_tiles(4, 4, rows, vector, sums); break;
        case 5: multiply_tiles(2, 5, rows, vector, sums); break;
        case 6: multiply_tiles(2, 6, rows, vector, sums); break;
        case 7: multiply_tiles(2, 7, rows, vector, sums); break;
        case 8: multiply_tiles(2, 8, rows, vector, sums); break;
        }
}

#endif

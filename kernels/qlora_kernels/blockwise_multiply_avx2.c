/* Products of packed rows with vectors, by AVX2. The sums come in the order of AVX-512, to the same bits. */

#include "blockwise.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE ALWAYS_INLINE TARGET

/* Vectors whose sums find room in 16 registers, two each, beside one row's levels and values. */
enum { IN_REGISTERS = 4 };

/* The level of each code; of its 32 bits the two look-ups heed the low three, the choice between them the sign. */
INLINE __m256 look_up(__m256 low, __m256 high, __m256i code, __m256i code_at_sign)
{
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                            _mm256_castsi256_ps(code_at_sign));
}

/* By halves, as everywhere. */
INLINE float total_of(const __m256 *lanes)
{
    __m256 of_8 = _mm256_add_ps(lanes[0], lanes[1]);
    __m128 of_4 = _mm_add_ps(_mm256_castps256_ps128(of_8), _mm256_extractf128_ps(of_8, 1));
    __m128 of_2 = _mm_add_ps(of_4, _mm_movehl_ps(of_4, of_4));
    return _mm_cvtss_f32(_mm_add_ss(of_2, _mm_movehdup_ps(of_2)));
}

/* R rows from `row` on with V vectors from `vector` on, each pair with two registers of its own. */
INLINE void multiply_tile(int R, int V, const struct rows *rows, int64_t row, int64_t vector, float *sums)
{
    const int64_t bytes = rows->length / 2, steps = rows->length / rows->step;
    const uint8_t *codes = rows->codes + row * bytes;
    const float *scales = rows->scales + row * steps, *vectors = rows->vectors + vector * CHUNK;
    __m256 lanes[2][IN_REGISTERS][2];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            lanes[r][v][0] = lanes[r][v][1] = _mm256_setzero_ps();
    for (int64_t step = 0; step < steps; step++) {
        /* One scale serves the step: scale the levels, once, and look the weights up. */
        __m256 low[2], high[2];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            __m256 scale = _mm256_set1_ps(scales[r * steps + step]);
            low[r] = _mm256_mul_ps(_mm256_loadu_ps(rows->levels), scale);
            high[r] = _mm256_mul_ps(_mm256_loadu_ps(rows->levels + 8), scale);
        }
        for (int64_t i = step * rows->step; i < (step + 1) * rows->step; i += CHUNK)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                __m256 firsts[2], seconds[2];
#pragma GCC unroll 2
                for (int r = 0; r < R; r++) {
                    const uint8_t *here = codes + r * bytes + i / 2 + 8 * half;
                    __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)here));
                    firsts[r] = look_up(low[r], high[r], _mm256_srli_epi32(pairs, 4), _mm256_slli_epi32(pairs, 24));
                    seconds[r] = look_up(low[r], high[r], pairs, _mm256_slli_epi32(pairs, 28));
                }
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) {
                    const float *x = vectors + i * rows->n_vectors + v * CHUNK + 8 * half;
                    __m256 even = _mm256_loadu_ps(x), odd = _mm256_loadu_ps(x + LANES);
#pragma GCC unroll 2
                    for (int r = 0; r < R; r++) {
                        lanes[r][v][half] = _mm256_fmadd_ps(firsts[r], even, lanes[r][v][half]);
                        lanes[r][v][half] = _mm256_fmadd_ps(seconds[r], odd, lanes[r][v][half]);
                    }
                }
            }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
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

TARGET void avx2_multiply(const struct rows *rows, float *sums)
{
    for (int64_t vector = 0; vector < rows->n_vectors; vector += IN_REGISTERS)
        switch (smaller(IN_REGISTERS, rows->n_vectors - vector)) {
        case 1: multiply_tiles(2, 1, rows, vector, sums); break;
        case 2: multiply_tiles(1, 2, rows, vector, sums); break;
        case 3: multiply_tiles(1, 3, rows, vector, sums); break;
        case 4: multiply_tiles(1, 4, rows, vector, sums); break;
        }
}

#endif

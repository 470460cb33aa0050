/* Quantize ranges of blocks, and then their scales. */

#include "blockwise.h"
#include "torchs_sum.h"

#include <math.h>

/* Scales that share a nested scale. */
enum { GROUP = 256 };
/* Steps of the fixed-point position through which the 8-bit codes are looked up. */
static const float POSITIONS = 65535.0f;
/* The scale of a block of zeros, so that its reciprocal is finite. */
static const float SMALLEST_SCALE = 1e-38f;

struct quantization {
    const uint8_t *weight;
    int64_t n_weights;
    int64_t block_size;
    uint8_t *codes;
    float *absmax;
    int32_t dtype;
    int32_t path;
    struct intervals intervals;
};

struct nested_quantization {
    const uint8_t *absmax;
    int64_t n_blocks;
    const uint8_t *code_of_position;
    uint8_t *codes;
    float *nested_absmax;
    float offset;
};

static struct lookups lookups_of(const struct intervals *intervals)
{
    struct lookups lookups = {.intervals = *intervals};
    const float *cuts = intervals->cuts;
    int below = 0;
    for (int cell = 1 - WIDE_CELLS / 2; cell <= WIDE_CELLS / 2; cell++) {
        while (below < CUTS && ceil((double)cuts[below] * WIDE_CELLS_PER_UNIT) < cell)
            below++;
        int is_here = below < CUTS && ceil((double)cuts[below] * WIDE_CELLS_PER_UNIT) == cell;
        int entry = cell & (WIDE_CELLS - 1);
        lookups.cut_of_wide_cell[entry] = is_here ? cuts[below] : INFINITY;
        lookups.codes_of_wide_cell[entry] =
            (uint32_t)intervals->codes[is_here ? below + 1 : below] << 8 | intervals->codes[below];
    }
    return lookups;
}

/* The whole blocks of one PIECE; returns whether all weights are finite. */
static int quantize_piece(const struct quantization *q, const struct lookups *lookups, int64_t first, int64_t stop)
{
    const struct path *path = path_of(q->path);
    enum dtype dtype = (enum dtype)q->dtype;
    const uint8_t *weight = q->weight + first * q->block_size * bytes_of(dtype);
    float absmax[PIECE / 32], factors[PIECE / 32];
    int64_t blocks = stop - first;
    path->find_maxima(dtype, weight, q->block_size, blocks, absmax);
    int finite = 1;
    for (int64_t block = 0; block < blocks; block++) {
        finite &= absmax[block] < INFINITY;
        factors[block] = 1.0f / (absmax[block] < SMALLEST_SCALE ? SMALLEST_SCALE : absmax[block]);
    }
    if (!finite)
        return 0;
    memcpy(q->absmax + first, absmax, (size_t)blocks * sizeof *absmax);
    path->encode(dtype, weight, q->block_size, blocks, factors, lookups, q->codes + first * q->block_size / 2);
    return 1;
}

static int quantize_rest(const struct quantization *q, const struct lookups *lookups, int64_t block)
{
    enum dtype dtype = (enum dtype)q->dtype;
    int64_t start = block * q->block_size, n = q->n_weights - start;
    const uint8_t *weight = q->weight + start * bytes_of(dtype);
    float absmax;
    portable_path.find_maxima(dtype, weight, n, 1, &absmax);
    if (!(absmax < INFINITY))
        return 0;
    absmax = absmax < SMALLEST_SCALE ? SMALLEST_SCALE : absmax;
    q->absmax[block] = absmax;
    portable_encode_rest(dtype, weight, n, absmax, &lookups->intervals, q->codes + start / 2);
    return 1;
}

/* Blocks first to stop; returns whether their weights are finite. If not, what was written is of no use. */
EXPORTED int32_t quantize_blocks(const struct quantization *q, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    int64_t whole = smaller(stop, q->n_weights / q->block_size), at_once = PIECE / q->block_size;
    struct lookups lookups = lookups_of(&q->intervals);
    int finite = 1;
    for (int64_t block = first; block < whole && finite; block += at_once)
        finite = quantize_piece(q, &lookups, block, smaller(block + at_once, whole));
    if (whole < stop && finite)
        finite = quantize_rest(q, &lookups, whole);
    fesetenv(&callers);
    return finite;
}

/* The sum of n values in torch's order. */
EXPORTED float sum_in_torchs_order(const void *values, int64_t n)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    float total = torchs_sum(values, n);
    fesetenv(&callers);
    return total;
}

/* The scales of one group, to 8 bits: see blockwise.py for the position rule. */
static void quantize_group(const struct nested_quantization *q, int64_t group)
{
    int64_t first = group * GROUP, n = smaller(GROUP, q->n_blocks - first);
    float values[GROUP];
    int32_t positions[GROUP], largest = 0;
    for (int64_t i = 0; i < n; i++) {
        values[i] = float_at(q->absmax, first + i) - q->offset;
        int32_t magnitude = (int32_t)(bits_of(values[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    float absmax = float_of((uint32_t)largest), factor = 1.0f / absmax;
    for (int64_t i = 0; i < n; i++) {
        float scaled = values[i] * factor;
        /* Zero times infinity has no place in the order and goes to the lower end, too. */
        scaled = scaled > -1.0f ? scaled : -1.0f;
        scaled = scaled < 1.0f ? scaled : 1.0f;
        positions[i] = (int32_t)((scaled + 1.0f) * 0.5f * POSITIONS + 0.5f);
    }
    for (int64_t i = 0; i < n; i++)
        q->codes[first + i] = q->code_of_position[positions[i]];
    q->nested_absmax[group] = absmax;
}

/* Groups first to stop. */
EXPORTED int32_t quantize_scales(const struct nested_quantization *q, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    for (int64_t group = first; group < stop; group++)
        quantize_group(q, group);
    fesetenv(&callers);
    return 1;
}

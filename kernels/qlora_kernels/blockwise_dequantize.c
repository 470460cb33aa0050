/* Dequantize ranges of blocks, and compare them with the weights that they came from. */

#include "blockwise.h"

/* Blocks whose scales are worked out before the weights that they scale. */
enum { SCALES_AT_ONCE = 256 };
/* A result from here on is written past the caches, which could not hold it: a store need not first read the line. */
enum { STREAMED_BYTES = 8 << 20 };

struct comparison {
    struct dequantization approximation;
    const uint8_t *weight;
    double *errors;
    double *sizes;
    int32_t dtype;
};

void find_scales(const struct dequantization *q, int64_t first, int64_t stop, float *scales)
{
    if (q->nested_absmax == NULL) {
        for (int64_t block = first; block < stop; block++)
            scales[block - first] = plain(float_at(q->absmax, block));
        return;
    }
    float offset = float_at(q->offset, 0);
    for (int64_t block = first; block < stop;) {
        int64_t group = block / q->nested_block_size, end = smaller((group + 1) * q->nested_block_size, stop);
        float nested = float_at(q->nested_absmax, group);
        for (; block < end; block++)
            scales[block - first] = plain(float_at(q->nested_levels, q->absmax[block]) * nested + offset);
    }
}

void find_levels(const struct dequantization *q, float *levels)
{
    for (int code = 0; code < LEVELS; code++)
        levels[code] = plain(float_at(q->levels, code));
}

static void dequantize_range(const struct dequantization *q, int64_t first, int64_t stop, uint8_t *out, int streamed)
{
    enum dtype dtype = (enum dtype)q->dtype;
    const struct path *path = q->block_size % 32 != 0 ? &portable_path : path_of(q->path);
    int64_t whole = q->n_weights / q->block_size;
    float levels[LEVELS], scales[SCALES_AT_ONCE];
    find_levels(q, levels);
    for (int64_t block = first; block < stop; block += SCALES_AT_ONCE) {
        int64_t end = smaller(block + SCALES_AT_ONCE, stop), start = block * q->block_size;
        uint8_t *here = out + (block - first) * q->block_size * bytes_of(dtype);
        find_scales(q, block, end, scales);
        path->decode(dtype, q->codes + start / 2, q->block_size, smaller(end, whole) - block, scales, levels, here,
                     streamed);
        if (end > whole)
            portable_decode_rest(dtype, q->codes + whole * q->block_size / 2, q->n_weights - whole * q->block_size,
                                 scales[whole - block], levels,
                                 here + (whole - block) * q->block_size * bytes_of(dtype));
    }
}

/* Blocks first to stop. */
EXPORTED int32_t dequantize_blocks(const struct dequantization *q, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    int64_t size = bytes_of((enum dtype)q->dtype);
    int streamed = q->n_weights * size >= STREAMED_BYTES && (uintptr_t)q->out % 64 == 0;
    dequantize_range(q, first, stop, q->out + first * q->block_size * size, streamed);
    fesetenv(&callers);
    return 1;
}

static double total(const double *lanes)
{
    double sums[LANES];
    memcpy(sums, lanes, sizeof sums);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    return sums[0];
}

/* Pieces first to stop of PIECE weights: of each the sums of (weight - approximation)^2 and of weight^2. */
EXPORTED int32_t compare_pieces(const struct comparison *c, int64_t first, int64_t stop)
{
    const struct dequantization *q = &c->approximation;
    enum dtype dtype = (enum dtype)c->dtype;
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    for (int64_t piece = first; piece < stop; piece++) {
        int64_t start = piece * PIECE, n = smaller(PIECE, q->n_weights - start);
        float approximation[PIECE];
        double errors[LANES] = {0}, sizes[LANES] = {0};
        dequantize_range(q, start / q->block_size, (start + n + q->block_size - 1) / q->block_size,
                         (uint8_t *)approximation, 0);
        const uint8_t *weight = c->weight + start * bytes_of(dtype);
        int64_t in_lanes = n - n % LANES;
        path_of(q->path)->add_squares(dtype, weight, approximation, in_lanes, errors, sizes);
        for (int64_t i = in_lanes; i < n; i++) {
            double exact = (double)weight_at(dtype, weight, i), error = exact - (double)approximation[i];
            errors[i - in_lanes] += error * error;
            sizes[i - in_lanes] += exact * exact;
        }
        c->errors[piece] = total(errors);
        c->sizes[piece] = total(sizes);
    }
    fesetenv(&callers);
    return 1;
}

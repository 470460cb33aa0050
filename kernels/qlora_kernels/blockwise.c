/* Quantize and dequantize ranges of blocks, by the path of one instruction set: what ctypes calls. */

#include "blockwise.h"

#include <fenv.h>
#include <math.h>

#define EXPORTED __attribute__((visibility("default")))

enum { PORTABLE, AVX2, AVX512 };

/* Blocks whose scales are worked out before the weights that they scale. */
enum { SCALES_AT_ONCE = 256 };
/* Steps of the fixed-point position through which the 8-bit codes are looked up. */
static const float POSITIONS = 65535.0f;
/* The scale of a block of zeros, so that its reciprocal is finite. */
static const float SMALLEST_SCALE = 1e-38f;

/* To be raised with every change to the structures and functions that Python knows. */
EXPORTED const int32_t interface = 1;

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
    int64_t group_size;
    const uint8_t *code_of_position;
    uint8_t *codes;
    float *nested_absmax;
    float offset;
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

struct comparison {
    struct dequantization approximation;
    const uint8_t *weight;
    double *errors;
    double *sizes;
    int32_t dtype;
};

static const struct path *path_of(int32_t path)
{
#if defined(__x86_64__)
    if (path == AVX2)
        return &avx2_path;
    if (path == AVX512)
        return &avx512_path;
#endif
    (void)path;
    return &portable_path;
}

/* Whether this processor runs a path. */
EXPORTED int32_t runs_path(int32_t path)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (path == AVX2)
        /* Every processor with AVX2 has F16C, which not every compiler can be asked for. */
        return __builtin_cpu_supports("avx2") != 0;
    if (path == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return path == PORTABLE;
}

/* The caller may have asked its thread to flush subnormal numbers to zero, or to round otherwise. */
static void enter_standard_arithmetic(fenv_t *callers)
{
    feholdexcept(callers);
    fesetenv(FE_DFL_ENV);
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The whole blocks of one PIECE; returns whether all weights are finite. */
static int quantize_piece(const struct quantization *q, int64_t first, int64_t stop)
{
    const struct path *path = path_of(q->path);
    enum dtype dtype = (enum dtype)q->dtype;
    const uint8_t *weight = q->weight + first * q->block_size * bytes_of(dtype);
    uint8_t *codes = q->codes + first * q->block_size / 2;
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
    int64_t in_steps = blocks - blocks * q->block_size % STEP / q->block_size;
    path->encode(dtype, weight, q->block_size, in_steps, factors, &q->intervals, codes);
    portable_path.encode(dtype, weight + in_steps * q->block_size * bytes_of(dtype), q->block_size, blocks - in_steps,
                         factors + in_steps, &q->intervals, codes + in_steps * q->block_size / 2);
    return 1;
}

static int quantize_rest(const struct quantization *q, int64_t block)
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
    portable_encode_rest(dtype, weight, n, absmax, &q->intervals, q->codes + start / 2);
    return 1;
}

/* Blocks first to stop; returns whether their weights are finite. If not, what was written is of no use. */
EXPORTED int32_t quantize_blocks(const struct quantization *q, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    int64_t whole = smaller(stop, q->n_weights / q->block_size), at_once = PIECE / q->block_size;
    int finite = 1;
    for (int64_t block = first; block < whole && finite; block += at_once)
        finite = quantize_piece(q, block, smaller(block + at_once, whole));
    if (whole < stop && finite)
        finite = quantize_rest(q, whole);
    fesetenv(&callers);
    return finite;
}

/* Groups first to stop of scales, to 8 bits: see blockwise.py for the position rule. */
EXPORTED int32_t quantize_scales(const struct nested_quantization *q, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    for (int64_t group = first; group < stop; group++) {
        int64_t begin = group * q->group_size, end = smaller(begin + q->group_size, q->n_blocks);
        float largest = 0.0f;
        for (int64_t i = begin; i < end; i++)
            {
            float magnitude = fabsf(float_at(q->absmax, i) - q->offset);
            largest = magnitude > largest ? magnitude : largest;
        }
        q->nested_absmax[group] = largest;
        float factor = 1.0f / largest;
        for (int64_t i = begin; i < end; i++) {
            float scaled = (float_at(q->absmax, i) - q->offset) * factor;
            /* Also where zero times infinity is no number. */
            if (!(scaled >= -1.0f))
                scaled = -1.0f;
            if (scaled > 1.0f)
                scaled = 1.0f;
            q->codes[i] = q->code_of_position[(int32_t)((scaled + 1.0f) * 0.5f * POSITIONS + 0.5f)];
        }
    }
    fesetenv(&callers);
    return 1;
}

static void find_scales(const struct dequantization *q, int64_t first, int64_t stop, float *scales)
{
    if (q->nested_absmax == NULL) {
        memcpy(scales, q->absmax + 4 * first, (size_t)(stop - first) * sizeof *scales);
        return;
    }
    float offset = float_at(q->offset, 0);
    for (int64_t block = first; block < stop;) {
        int64_t group = block / q->nested_block_size, end = smaller((group + 1) * q->nested_block_size, stop);
        float nested = float_at(q->nested_absmax, group);
        for (; block < end; block++)
            scales[block - first] = float_at(q->nested_levels, q->absmax[block]) * nested + offset;
    }
}

static void dequantize_range(const struct dequantization *q, int64_t first, int64_t stop, uint8_t *out)
{
    enum dtype dtype = (enum dtype)q->dtype;
    const struct path *path = q->block_size < 32 ? &portable_path : path_of(q->path);
    int64_t whole = q->n_weights / q->block_size;
    float levels[LEVELS], scales[SCALES_AT_ONCE];
    memcpy(levels, q->levels, sizeof levels);
    for (int64_t block = first; block < stop; block += SCALES_AT_ONCE) {
        int64_t end = smaller(block + SCALES_AT_ONCE, stop), start = block * q->block_size;
        uint8_t *here = out + (block - first) * q->block_size * bytes_of(dtype);
        find_scales(q, block, end, scales);
        path->decode(dtype, q->codes + start / 2, q->block_size, smaller(end, whole) - block, scales, levels, here);
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
    dequantize_range(q, first, stop, q->out + first * q->block_size * bytes_of((enum dtype)q->dtype));
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
                         (uint8_t *)approximation);
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

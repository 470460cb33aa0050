/* Quantize and dequantize ranges of blocks, by the path of one instruction set: what ctypes calls. */

#include "blockwise.h"

#include <fenv.h>
#include <math.h>

#define EXPORTED __attribute__((visibility("default")))

enum { PORTABLE, AVX2, AVX512 };

/* Scales that share a nested scale when they are quantized. */
enum { GROUP = 256 };
/* Blocks whose scales are worked out before the weights that they scale. */
enum { SCALES_AT_ONCE = 256 };
/* A result from here on is written past the caches, which could not hold it: a store need not first read the line. */
enum { STREAMED_BYTES = 8 << 20 };
/* Steps of the fixed-point position through which the 8-bit codes are looked up. */
static const float POSITIONS = 65535.0f;
/* The scale of a block of zeros, so that its reciprocal is finite. */
static const float SMALLEST_SCALE = 1e-38f;

/* To be raised with every change to the structures and functions that Python knows. */
EXPORTED const int32_t interface = 3;

struct quantization {
    const uint8_t *weight;
    int64_t n_weights;
    int64_t block_size;
    uint8_t *codes;
    float *absmax;
    int32_t dtype;
    int32_t path;
    float cuts[CUTS];
    uint8_t code_of_interval[LEVELS];
    float cells_per_unit;
    const float *cut_of_cell;
    const uint8_t *code_of_side;
};

struct nested_quantization {
    const uint8_t *absmax;
    int64_t n_blocks;
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

static struct intervals intervals_of(const struct quantization *q)
{
    struct intervals intervals = {
        .cells_per_unit = q->cells_per_unit,
        .cut_of_cell = q->cut_of_cell,
        .code_of_side = q->code_of_side,
    };
    memcpy(intervals.cuts, q->cuts, sizeof q->cuts);
    memcpy(intervals.codes, q->code_of_interval, sizeof q->code_of_interval);
    int below = 0;
    for (int cell = 1 - WIDE_CELLS / 2; cell <= WIDE_CELLS / 2; cell++) {
        while (below < CUTS && ceil((double)q->cuts[below] * WIDE_CELLS_PER_UNIT) < cell)
            below++;
        int is_here = below < CUTS && ceil((double)q->cuts[below] * WIDE_CELLS_PER_UNIT) == cell;
        int entry = cell & (WIDE_CELLS - 1);
        intervals.cut_of_wide_cell[entry] = is_here ? q->cuts[below] : INFINITY;
        intervals.codes_of_wide_cell[entry] =
            (uint32_t)intervals.codes[is_here ? below + 1 : below] << 8 | intervals.codes[below];
    }
    return intervals;
}

/* The whole blocks of one PIECE; returns whether all weights are finite. */
static int quantize_piece(const struct quantization *q, const struct intervals *intervals, int64_t first, int64_t stop)
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
    path->encode(dtype, weight, q->block_size, blocks, factors, intervals, q->codes + first * q->block_size / 2);
    return 1;
}

static int quantize_rest(const struct quantization *q, const struct intervals *intervals, int64_t block)
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
    portable_encode_rest(dtype, weight, n, absmax, intervals, q->codes + start / 2);
    return 1;
}

/* Blocks first to stop; returns whether their weights are finite. If not, what was written is of no use. */
EXPORTED int32_t quantize_blocks(const struct quantization *q, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    int64_t whole = smaller(stop, q->n_weights / q->block_size), at_once = PIECE / q->block_size;
    struct intervals intervals = intervals_of(q);
    int finite = 1;
    for (int64_t block = first; block < whole && finite; block += at_once)
        finite = quantize_piece(q, &intervals, block, smaller(block + at_once, whole));
    if (whole < stop && finite)
        finite = quantize_rest(q, &intervals, whole);
    fesetenv(&callers);
    return finite;
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
        scaled = scaled >= -1.0f ? scaled : -1.0f;
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

/* A NaN without the payload, which rounding to 16 bits could carry over into a number. */
static float plain(float value)
{
    return value == value ? value : NAN;
}

static void find_scales(const struct dequantization *q, int64_t first, int64_t stop, float *scales)
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

static void dequantize_range(const struct dequantization *q, int64_t first, int64_t stop, uint8_t *out, int streamed)
{
    enum dtype dtype = (enum dtype)q->dtype;
    const struct path *path = q->block_size < 32 ? &portable_path : path_of(q->path);
    int64_t whole = q->n_weights / q->block_size;
    float levels[LEVELS], scales[SCALES_AT_ONCE];
    for (int code = 0; code < LEVELS; code++)
        levels[code] = plain(float_at(q->levels, code));
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

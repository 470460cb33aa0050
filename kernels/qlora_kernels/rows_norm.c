/* RMSNorm of rows, alone or of a sum that is made in the same pass, and back: see norm.py. */

#include "rows.h"
#include "torchs_sum.h"

#include <math.h>

/* The widest row, as rows_cpu.py knows; it lies on the stack once or twice. */
enum { WIDEST = 16384, SUM_LANES = 32 };

struct rms_norm {
    const uint8_t *x;
    /* Added to x first, and the sum stored; both NULL without. */
    const uint8_t *delta;
    uint8_t *total;
    const uint8_t *weight;
    uint8_t *y;
    float *roots;
    int64_t width;
    float eps;
    int32_t dtype;
    int32_t path;
    /* Whether the weight is kept as its distance from one. */
    int32_t unit_offset;
};

struct rms_norm_backward {
    const uint8_t *dy;
    const uint8_t *x;
    const uint8_t *weight;
    const float *roots;
    /* A gradient of x from elsewhere that is added, or NULL. */
    const uint8_t *dtotal;
    uint8_t *dx;
    int64_t width;
    int32_t dtype;
    int32_t path;
    int32_t unit_offset;
};

/* Each step rounds as torch's does, and the squares are added in its order. */
ALWAYS_INLINE void norm_rows(enum dtype dtype, const struct rms_norm *task, int64_t first, int64_t stop)
{
    int64_t width = task->width, row_bytes = width * bytes_of(dtype);
    float x[WIDEST], scratch[WIDEST];
    for (int64_t row = first; row < stop; row++) {
        read_floats(dtype, task->x + row * row_bytes, width, x);
        if (task->delta != NULL) {
            read_floats(dtype, task->delta + row * row_bytes, width, scratch);
            for (int64_t i = 0; i < width; i++)
                x[i] = rounded(dtype, x[i] + scratch[i]);
            write_floats(dtype, x, width, task->total + row * row_bytes);
        }
        for (int64_t i = 0; i < width; i++)
            scratch[i] = x[i] * x[i];
        float root = 1.0f / sqrtf(torchs_sum(scratch, width) / (float)width + task->eps);
        task->roots[row] = root;
        if (task->unit_offset)
            for (int64_t i = 0; i < width; i++)
                x[i] = x[i] * root * (1.0f + weight_at(dtype, task->weight, i));
        else
            for (int64_t i = 0; i < width; i++)
                x[i] = rounded(dtype, x[i] * root) * weight_at(dtype, task->weight, i);
        write_floats(dtype, x, width, task->y + row * row_bytes);
    }
}

EXPORT_ON_EVERY_PATH(rms_norm, norm_rows)

/* With g = dy * weight, or dy * (1 + weight), and x' = x * root: dx = root * (g - x' * mean(g * x')). */
ALWAYS_INLINE void norm_rows_backward(enum dtype dtype, const struct rms_norm_backward *task, int64_t first,
                                      int64_t stop)
{
    int64_t width = task->width, row_bytes = width * bytes_of(dtype), in_lanes = width - width % SUM_LANES;
    float x[WIDEST], g[WIDEST];
    for (int64_t row = first; row < stop; row++) {
        float root = task->roots[row], lanes[SUM_LANES] = {0}, sum = 0.0f;
        read_floats(dtype, task->x + row * row_bytes, width, x);
        const uint8_t *dy = task->dy + row * row_bytes;
        read_floats(dtype, task->weight, width, g);
        if (task->unit_offset)
            for (int64_t i = 0; i < width; i++)
                g[i] += 1.0f;
        for (int64_t i = 0; i < width; i++)
            g[i] *= weight_at(dtype, dy, i);
        for (int64_t i = 0; i < in_lanes; i += SUM_LANES)
            for (int lane = 0; lane < SUM_LANES; lane++)
                lanes[lane] += g[i + lane] * x[i + lane];
        for (int64_t i = in_lanes; i < width; i++)
            lanes[i - in_lanes] += g[i] * x[i];
        for (int lane = 0; lane < SUM_LANES; lane++)
            sum += lanes[lane];
        float factor = sum * root * root / (float)width;
        for (int64_t i = 0; i < width; i++)
            g[i] = root * (g[i] - x[i] * factor);
        if (task->dtotal != NULL) {
            read_floats(dtype, task->dtotal + row * row_bytes, width, x);
            for (int64_t i = 0; i < width; i++)
                g[i] += x[i];
        }
        write_floats(dtype, g, width, task->dx + row * row_bytes);
    }
}

EXPORT_ON_EVERY_PATH(rms_norm_backward, norm_rows_backward)

/* Cross-entropy of rows of logits, and its gradient written over them: see frozen_head.py. */

#include "rows.h"

#include <math.h>

/* Running sums of a row. */
enum { HEAD_LANES = 16 };

struct cross_entropy {
    /* Its gradient times `scale` takes the place of the row, if `has_gradient`. */
    uint8_t *logits;
    const int64_t *labels;
    float *losses;
    int64_t vocabulary;
    float scale;
    int32_t has_gradient;
    int32_t dtype;
    int32_t path;
};

/* Integers with the order of the floats that have these bits, and back. */
ALWAYS_INLINE int32_t in_order(int32_t bits)
{
    return bits ^ (bits >> 31 & 0x7fffffff);
}

/* A NaN comes out as the largest or the smallest; the sum finds it in any case. */
ALWAYS_INLINE float largest(enum dtype dtype, const uint8_t *row, int64_t n)
{
    int32_t most = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        int32_t value = in_order((int32_t)bits_of(weight_at(dtype, row, i)));
        most = value > most ? value : most;
    }
    return float_of((uint32_t)in_order(most));
}

ALWAYS_INLINE float sum_of_exponentials(enum dtype dtype, const uint8_t *row, int64_t n, float most)
{
    float lanes[HEAD_LANES] = {0}, powers[STRIP], sum = 0.0f;
    for (int64_t start = 0; start < n; start += STRIP) {
        int64_t here = smaller(STRIP, n - start), whole = here - here % HEAD_LANES;
        read_floats(dtype, row + start * bytes_of(dtype), here, powers);
        for (int64_t i = 0; i < here; i++)
            powers[i] = exponential(powers[i] - most);
        for (int64_t i = 0; i < whole; i += HEAD_LANES)
            for (int lane = 0; lane < HEAD_LANES; lane++)
                lanes[lane] += powers[i + lane];
        for (int64_t i = whole; i < here; i++)
            lanes[i - whole] += powers[i];
    }
    for (int lane = 0; lane < HEAD_LANES; lane++)
        sum += lanes[lane];
    return sum;
}

ALWAYS_INLINE void write_gradient(enum dtype dtype, uint8_t *row, int64_t n, float most, float sum, float scale,
                                  int64_t label)
{
    float gradient[STRIP], factor = scale / sum;
    for (int64_t start = 0; start < n; start += STRIP) {
        int64_t here = smaller(STRIP, n - start);
        read_floats(dtype, row + start * bytes_of(dtype), here, gradient);
        for (int64_t i = 0; i < here; i++)
            gradient[i] = exponential(gradient[i] - most) * factor;
        if (label >= start && label < start + here)
            gradient[label - start] -= scale;
        write_floats(dtype, gradient, here, row + start * bytes_of(dtype));
    }
}

ALWAYS_INLINE void cross_entropy_rows(enum dtype dtype, const struct cross_entropy *task, int64_t first, int64_t stop)
{
    for (int64_t index = first; index < stop; index++) {
        uint8_t *row = task->logits + index * task->vocabulary * bytes_of(dtype);
        float most = largest(dtype, row, task->vocabulary);
        float sum = sum_of_exponentials(dtype, row, task->vocabulary, most);
        task->losses[index] = logf(sum) + (most - weight_at(dtype, row, task->labels[index]));
        if (task->has_gradient)
            write_gradient(dtype, row, task->vocabulary, most, sum, task->scale, task->labels[index]);
    }
}

EXPORT_ON_EVERY_PATH(cross_entropy, cross_entropy_rows)

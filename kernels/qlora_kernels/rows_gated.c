/* activation(gate) * up, and back: see gated.py. */

#include "rows.h"

#include <math.h>

struct gated {
    const uint8_t *gate;
    const uint8_t *up;
    /* The activation by the bits of a bfloat16. */
    const float *values;
    /* May be gate or up. */
    uint8_t *y;
    int32_t dtype;
    int32_t path;
};

enum activation { SILU, GELU_TANH };

struct gated_backward {
    const uint8_t *dy;
    const uint8_t *gate;
    const uint8_t *up;
    /* The activation and its slope by the bits of a bfloat16; NULL for float32, where `activation` says what to do. */
    const float *values;
    const float *slopes;
    /* May be gate and up. */
    uint8_t *dgate;
    uint8_t *dup;
    int32_t activation;
    int32_t dtype;
    int32_t path;
};

ALWAYS_INLINE void look_up(const uint8_t *gate, int64_t n, const float *restrict table, float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = table[half_at(gate, i)];
}

ALWAYS_INLINE void gate_elements(enum dtype dtype, const struct gated *task, int64_t first, int64_t stop)
{
    int64_t size = bytes_of(dtype);
    float value[STRIP], up[STRIP];
    for (int64_t start = first; start < stop; start += STRIP) {
        int64_t n = smaller(STRIP, stop - start);
        look_up(task->gate + start * size, n, task->values, value);
        read_floats(dtype, task->up + start * size, n, up);
        for (int64_t i = 0; i < n; i++)
            value[i] *= up[i];
        write_floats(dtype, value, n, task->y + start * size);
    }
}

EXPORT_ON_EVERY_PATH(gated, gate_elements)

/* No subnormal number on the way, each of which would cost as much as a hundred others. */
ALWAYS_INLINE float sigmoid(float x)
{
    float power = exponential(-fabsf(x));
    return (x < 0.0f ? power : 1.0f) / (1.0f + power);
}

/* gelu's tanh formula is x * sigmoid(u) with u = 2 * sqrt(2 / pi) * (x + 0.044715 x^3); silu's u is x. */
ALWAYS_INLINE void compute(enum activation activation, const float *restrict gate, int64_t n, float *restrict value,
                           float *restrict slope)
{
    const float twice_root = 1.5957691216057308f, cubic = 0.044715f;
    for (int64_t i = 0; i < n; i++) {
        float x = gate[i], square = x * x;
        float u = activation == SILU ? x : twice_root * (x + cubic * square * x);
        float slope_of_u = activation == SILU ? 1.0f : twice_root * (1.0f + 3.0f * cubic * square);
        float s = sigmoid(u);
        value[i] = x * s;
        slope[i] = s + x * s * (1.0f - s) * slope_of_u;
    }
}

ALWAYS_INLINE void gate_elements_backward(enum dtype dtype, const struct gated_backward *task, int64_t first,
                                          int64_t stop)
{
    int64_t size = bytes_of(dtype);
    float dy[STRIP], other[STRIP], value[STRIP], slope[STRIP];
    for (int64_t start = first; start < stop; start += STRIP) {
        int64_t n = smaller(STRIP, stop - start);
        if (dtype == FLOAT32) {
            read_floats(dtype, task->gate + start * size, n, other);
            if (task->activation == SILU)
                compute(SILU, other, n, value, slope);
            else
                compute(GELU_TANH, other, n, value, slope);
        } else {
            look_up(task->gate + start * size, n, task->values, value);
            look_up(task->gate + start * size, n, task->slopes, slope);
        }
        read_floats(dtype, task->dy + start * size, n, dy);
        read_floats(dtype, task->up + start * size, n, other);
        for (int64_t i = 0; i < n; i++) {
            slope[i] *= dy[i] * other[i];
            value[i] *= dy[i];
        }
        write_floats(dtype, slope, n, task->dgate + start * size);
        write_floats(dtype, value, n, task->dup + start * size);
    }
}

EXPORT_ON_EVERY_PATH(gated_backward, gate_elements_backward)

/* Turn pairs of a head's components by their position's angle: see rotary.py. */

#include "rows.h"

/* Strides count elements. Rows are tokens of a batch, batch first. */
struct rotary {
    const uint8_t *x;
    /* May be x, if the strides are the same. */
    uint8_t *out;
    const uint8_t *cosines;
    const uint8_t *sines;
    int64_t tokens, heads, head_dim;
    int64_t x_batch, x_head, x_token;
    int64_t out_batch, out_head, out_token;
    /* From one sequence's table to the next one's; 0 where all share one. */
    int64_t table_batch;
    /* Whether to apply the transpose, the gradient's turn. */
    int32_t back;
    int32_t dtype;
    int32_t path;
};

/* The widest head, as rows_cpu.py knows. */
enum { WIDEST_HEAD = 512 };

/* Products and sums round to the dtype each, as torch's do. Of the gradient, a component's sine is that of the one it
   came from. */
ALWAYS_INLINE void turn(enum dtype dtype, const uint8_t *x, const float *restrict cosines, const float *restrict sines,
                        int64_t half, int back, uint8_t *out)
{
    float in[WIDEST_HEAD], turned[WIDEST_HEAD];
    float *right = in + half, *turned_right = turned + half;
    read_floats(dtype, x, 2 * half, in);
    if (back) {
        for (int64_t i = 0; i < half; i++) {
            turned[i] = rounded(dtype, in[i] * cosines[i]) + rounded(dtype, right[i] * sines[half + i]);
            turned_right[i] = rounded(dtype, right[i] * cosines[half + i]) - rounded(dtype, in[i] * sines[i]);
        }
    } else {
        for (int64_t i = 0; i < half; i++) {
            turned[i] = rounded(dtype, in[i] * cosines[i]) - rounded(dtype, right[i] * sines[i]);
            turned_right[i] = rounded(dtype, right[i] * cosines[half + i]) + rounded(dtype, in[i] * sines[half + i]);
        }
    }
    write_floats(dtype, turned, 2 * half, out);
}

ALWAYS_INLINE void turn_tokens(enum dtype dtype, const struct rotary *task, int64_t first, int64_t stop)
{
    int64_t size = bytes_of(dtype);
    float cosines[WIDEST_HEAD], sines[WIDEST_HEAD];
    for (int64_t row = first; row < stop; row++) {
        int64_t batch = row / task->tokens, token = row % task->tokens;
        int64_t table = (batch * task->table_batch + token * task->head_dim) * size;
        const uint8_t *x = task->x + (batch * task->x_batch + token * task->x_token) * size;
        uint8_t *out = task->out + (batch * task->out_batch + token * task->out_token) * size;
        read_floats(dtype, task->cosines + table, task->head_dim, cosines);
        read_floats(dtype, task->sines + table, task->head_dim, sines);
        for (int64_t head = 0; head < task->heads; head++)
            turn(dtype, x + head * task->x_head * size, cosines, sines, task->head_dim / 2, task->back,
                 out + head * task->out_head * size);
    }
}

EXPORT_ON_EVERY_PATH(rotary, turn_tokens)

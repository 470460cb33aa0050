/* Products of packed weights with a few vectors: no weight is ever stored dense. */

#include "blockwise.h"

/* Bounds the stack: the scales of the rows at once. Rows with more go the portable way. */
enum { MOST_SCALES = 16384 };
/* A row's weights that the portable way makes dense at once. */
enum { AT_ONCE = 16 * CHUNK };

struct multiplication {
    /* Vectors of `length` elements one after another; they need not be aligned. */
    const uint8_t *source;
    /* The same as struct rows says, with zeros up to a multiple of CHUNK. */
    float *vectors;
    int64_t n_vectors;
    int64_t length;
    /* Matrices of rows of `length` weights; `out` of each is [n_vectors][its rows]. */
    const struct dequantization *matrices;
    int64_t n_matrices;
    int32_t dtype;
};

ALWAYS_INLINE void arrange(enum dtype dtype, const struct multiplication *task, int64_t vector)
{
    const uint8_t *source = task->source + vector * task->length * bytes_of(dtype);
    float *out = task->vectors + vector * CHUNK;
    int64_t start = 0;
    for (; start + CHUNK <= task->length; start += CHUNK, out += task->n_vectors * CHUNK)
        for (int lane = 0; lane < LANES; lane++) {
            out[lane] = weight_at(dtype, source, start + 2 * lane);
            out[LANES + lane] = weight_at(dtype, source, start + 2 * lane + 1);
        }
    for (int64_t i = 0; start < task->length && i < CHUNK; i++)
        out[i / 2 + i % 2 * LANES] = start + i < task->length ? weight_at(dtype, source, start + i) : 0.0f;
}

/* Fills in vectors first to stop. */
EXPORTED int32_t arrange_vectors(const struct multiplication *task, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    for (int64_t vector = first; vector < stop; vector++)
        SPECIALISED(arrange, task->dtype, task, vector);
    fesetenv(&callers);
    return 1;
}

/* The n weights from `first` on, dense. */
static void make_dense(const struct dequantization *q, const float *levels, int64_t first, int64_t n, float *out)
{
    for (int64_t at = first; at < first + n;) {
        int64_t block = at / q->block_size, end = smaller((block + 1) * q->block_size, first + n);
        float scale;
        find_scales(q, block, block + 1, &scale);
        if (at % 2) {
            out[at - first] = levels[q->codes[at / 2] & 15] * scale;
            at++;
        }
        portable_decode_rest(FLOAT32, q->codes + at / 2, end - at, scale, levels, (uint8_t *)(out + (at - first)));
        at = end;
    }
}

/* By halves, as everywhere. */
static float total_of(float *lanes)
{
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

/* Products of any row. */
static void multiply_row(const struct multiplication *task, const struct dequantization *q, const float *levels,
                         int64_t row, float *sums)
{
    float lanes[MOST_VECTORS][LANES] = {{0}}, dense[AT_ONCE];
    for (int64_t start = 0; start < task->length; start += AT_ONCE) {
        int64_t n = smaller(AT_ONCE, task->length - start);
        make_dense(q, levels, row * task->length + start, n, dense);
        for (int64_t i = n; i % CHUNK; i++)
            dense[i] = 0.0f;
        for (int64_t i = 0; i < n; i += CHUNK) {
            const float *x = task->vectors + (start + i) * task->n_vectors;
            for (int64_t vector = 0; vector < task->n_vectors; vector++, x += CHUNK)
                for (int lane = 0; lane < LANES; lane++) {
                    lanes[vector][lane] += dense[i + 2 * lane] * x[lane];
                    lanes[vector][lane] += dense[i + 2 * lane + 1] * x[LANES + lane];
                }
        }
    }
    for (int64_t vector = 0; vector < task->n_vectors; vector++)
        sums[vector] = total_of(lanes[vector]);
}

static int64_t common_divisor(int64_t a, int64_t b)
{
    return b == 0 ? a : common_divisor(b, a % b);
}

/* The scales of steps first to stop, of which a block has several if it reaches into another row. */
static void find_step_scales(const struct dequantization *q, int64_t step, int64_t first, int64_t stop, float *scales)
{
    int64_t steps = q->block_size / step;
    if (steps == 1)
        path_of(q->path)->find_scales(q, first, stop, scales);
    else
        for (int64_t i = first; i < stop; i++)
            find_scales(q, i / steps, i / steps + 1, scales + (i - first));
}

/* Rows first to stop of one matrix. */
static void multiply_matrix(const struct multiplication *task, const struct dequantization *q, int64_t first,
                            int64_t stop)
{
    const struct path *path = path_of(q->path);
    int64_t length = task->length, rows = q->n_weights / length;
    int64_t step = common_divisor(length, q->block_size), steps = length / step;
    int together = path->multiply != NULL && step % CHUNK == 0 && steps * ROWS_AT_ONCE <= MOST_SCALES;
    float levels[LEVELS], scales[MOST_SCALES], sums[ROWS_AT_ONCE * MOST_VECTORS];
    find_levels(q, levels);
    for (int64_t row = first; row < stop; row += ROWS_AT_ONCE) {
        int64_t n = smaller(ROWS_AT_ONCE, stop - row);
        if (together) {
            find_step_scales(q, step, row * steps, (row + n) * steps, scales);
            struct rows part = {q->codes + row * length / 2, levels,        scales,         n, length, step,
                                task->vectors,               task->n_vectors};
            path->multiply(&part, sums);
        } else {
            for (int64_t i = 0; i < n; i++)
                multiply_row(task, q, levels, row + i, sums + i * task->n_vectors);
        }
        for (int64_t i = 0; i < n * task->n_vectors; i++)
            portable_store((enum dtype)task->dtype, sums[i], q->out,
                           i % task->n_vectors * rows + row + i / task->n_vectors);
    }
}

/* Rows first to stop, counted through all matrices. */
EXPORTED int32_t multiply_rows(const struct multiplication *task, int64_t first, int64_t stop)
{
    fenv_t callers;
    enter_standard_arithmetic(&callers);
    int64_t before = 0;
    for (int64_t i = 0; i < task->n_matrices; i++) {
        int64_t rows = task->matrices[i].n_weights / task->length;
        int64_t from = first > before ? first - before : 0, to = smaller(stop - before, rows);
        if (from < to)
            multiply_matrix(task, &task->matrices[i], from, to);
        before += rows;
    }
    fesetenv(&callers);
    return 1;
}

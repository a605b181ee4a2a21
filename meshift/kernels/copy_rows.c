/* Many boxes of rows copied in one call: what moving parameters between layouts is, on one machine. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LINE 64
#define AHEAD 8 /* rows: those that lie apart are not fetched ahead by the processor itself */

/* Past the caches, which the numbers would only fill: nobody reads them before all are there. */
static void stream(char *to, const char *from, int64_t size) {
    int64_t i = (int64_t)(-(uintptr_t)to % LINE);
    if (i > size) i = size;
    memcpy(to, from, (size_t)i);
    for (; i + LINE <= size; i += LINE) _mm512_stream_si512((void *)(to + i), _mm512_loadu_si512(from + i));
    memcpy(to + i, from + i, (size_t)(size - i));
}

/* table [count][6]: source, target, rows, bytes of a row, and bytes from one row to the next, there and here. */
void copy_rows(const int64_t *table, long count, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const int64_t *t = table + 6 * i;
        const char *source = (const char *)t[0];
        char *target = (char *)t[1];
        const int64_t rows = t[2], size = t[3], there = t[4], here = t[5];
        if (there == size && here == size) stream(target, source, rows * size);
        else
            for (int64_t r = 0; r < rows; r++) {
                if (r + AHEAD < rows)
                    for (int64_t at = 0; at < size; at += LINE)
                        _mm_prefetch(source + (r + AHEAD) * there + at, _MM_HINT_T0);
                stream(target + r * here, source + r * there, size);
            }
        _mm_sfence();
    }
}

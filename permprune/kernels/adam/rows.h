/* `NAME_step`: the kernel of `struct stepping` in search.h. Expects NAME and step_row, inside BEGIN_TARGET and END_TARGET. */

static void PASTE(NAME, _step)(const void *stepping, int64_t first, int64_t last)
{
    const struct stepping *job = stepping;
    for (int64_t row = first; row < last; row++)
        if (job->number == F32)
            step_row(job, row, F32);
        else
            step_row(job, row, BF16);
}

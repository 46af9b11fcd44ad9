/* Lines of numbers in memory, inside BEGIN_TARGET and END_TARGET: Clang passes wide vectors only between functions that
 * have the registers for them. */
static ALWAYS_INLINE lanes load_line(const float *from)
{
    lanes line;
    memcpy(&line, from, sizeof line);
    return line;
}

static ALWAYS_INLINE void store_line(float *to, lanes line) { memcpy(to, &line, sizeof line); }

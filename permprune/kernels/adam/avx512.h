/* The kernel of adam.h with AVX-512, after product/avx512.h: LINE channels of a row at a time, with the same bits as a result. Channels that the
 * mask does not keep are computed as well, and not written. */

static ALWAYS_INLINE __m256i upper_halves(__m512i numbers)
{
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(numbers, 16));
}

/* The numbers whose lanes are in `there`, which are LINE numbers if `whole`. */
static ALWAYS_INLINE lanes read_lanes(const void *numbers, int64_t offset, __mmask16 there, const int whole,
                                      const int32_t number)
{
    const float *floats = (const float *)numbers + offset;
    const __m256i *halves = (const __m256i *)((const uint16_t *)numbers + offset);
    if (number == F32)
        return (lanes)(whole ? _mm512_loadu_ps(floats) : _mm512_maskz_loadu_ps(there, floats));
    return (lanes)widen_bf16(whole ? _mm256_loadu_si256(halves) : _mm256_maskz_loadu_epi16(there, halves));
}

/* Write the lanes in `keep`: of bf16 the upper halves. The others keep what they have; if LINE numbers are there, that is
 * written again, because masked stores of 16 bits are slow. */
static ALWAYS_INLINE void write_lanes(void *numbers, int64_t offset, __mmask16 keep, const int whole, const int32_t number,
                                      __m512i bits)
{
    __m256i *halves = (__m256i *)((uint16_t *)numbers + offset);
    if (number == F32)
        _mm512_mask_storeu_ps((float *)numbers + offset, keep, (__m512)bits);
    else if (whole)
        _mm256_storeu_si256(halves, _mm256_mask_blend_epi16(keep, _mm256_loadu_si256(halves), upper_halves(bits)));
    else
        _mm256_mask_storeu_epi16(halves, keep, upper_halves(bits));
}

/* The moments from `slot` on, those of the mask `first`, each in the lane of its channel. */
static ALWAYS_INLINE lanes read_moments(const void *numbers, int64_t slot, __mmask16 first, __mmask16 keep, const int whole,
                                        const int32_t number)
{
    return (lanes)_mm512_maskz_expand_ps(keep, (__m512)read_lanes(numbers, slot, first, whole, number));
}

static ALWAYS_INLINE void write_moments(void *numbers, int64_t slot, __mmask16 first, __mmask16 keep, const int whole,
                                        const int32_t number, lanes values)
{
    __m512i bits = (__m512i)_mm512_maskz_compress_ps(keep, (__m512)values);
    if (number == BF16) { /* to the nearest, ties to even */
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    }
    write_lanes(numbers, slot, first, whole, number, bits);
}

/* `noise` of the moments' numbers from `slot` on, each in the lane of its channel. */
static ALWAYS_INLINE __m512i noise_of(uint32_t seed, uint32_t slot, __mmask16 keep)
{
    const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(_mm512_maskz_expand_epi32(keep, counting), _mm512_set1_epi32((int)slot));
    __m512i bits = _mm512_mullo_epi32(index, _mm512_set1_epi32((int)0x9e3779b9u));
    bits = _mm512_add_epi32(bits, _mm512_set1_epi32((int)seed));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
    bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32((int)0x85ebca6bu));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 13));
    bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32((int)0xc2b2ae35u));
    return _mm512_and_si512(_mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16)), _mm512_set1_epi32(0xffff));
}

/* Numbers to be rounded to bf16 by leaving out their lower halves: stochastically, unless they are not finite. */
static ALWAYS_INLINE __m512i randomly_raised(__m512i bits, __m512i noise)
{
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    const __mmask16 finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
    return _mm512_mask_add_epi32(bits, finite, bits, noise);
}

/* A step for the channels in `keep` among LINE; `whole` is whether all of them, and as many moments, are in the row. */
static ALWAYS_INLINE void step_lanes(const struct step *job, int64_t row, int64_t channel, int64_t slot, __mmask16 keep,
                                     const int whole, const int32_t number)
{
    const int64_t offset = row * job->width + channel;
    const float one = job->first;
    const __mmask16 first = (__mmask16)((1u << __builtin_popcount(keep)) - 1);
    const lanes gradient = read_lanes(job->gradient, offset, keep, whole, number);
    lanes weight = read_lanes(job->weight, offset, keep, whole, number);
    lanes mean = read_moments(job->mean, slot, first, keep, whole, number);
    mean = one * mean + (1 - one) * gradient;
    weight -= job->rate * mean / (job->by_row[row] * read_lanes(job->by_channel, channel, keep, whole, F32) + job->least);
    write_moments(job->mean, slot, first, keep, whole, number, mean);
    const __m512i bits = (__m512i)weight;
    const __m512i raised = number == F32 ? bits : randomly_raised(bits, noise_of(job->seed, (uint32_t)slot, keep));
    write_lanes(job->weight, offset, keep, whole, number, raised);
}

/* The kept channels among `LINE` from `channel` on, the first one in the lowest bit; `bits` are those of the row. */
static ALWAYS_INLINE __mmask16 kept_of_lanes(const uint8_t *bits, int64_t channel, int64_t width)
{
    uint32_t both = bits[channel / 8];
    if (channel + 8 < width)
        both |= (uint32_t)bits[channel / 8 + 1] << 8;
    both = (both & 0xf0f0) >> 4 | (both & 0x0f0f) << 4;
    both = (both & 0xcccc) >> 2 | (both & 0x3333) << 2;
    both = (both & 0xaaaa) >> 1 | (both & 0x5555) << 1;
    return (__mmask16)(width - channel < LINE ? both & ((1u << (width - channel)) - 1) : both);
}

static ALWAYS_INLINE void step_row(const struct step *job, int64_t row, const int32_t number)
{
    const uint8_t *bits = job->bits + row * ((job->width + 7) / 8);
    int64_t slot = row * job->kept;
    const int64_t end = slot + job->kept;
    for (int64_t channel = 0; channel < job->width; channel += LINE) {
        __mmask16 keep = kept_of_lanes(bits, channel, job->width);
        if (__builtin_popcount(keep) > end - slot) /* more bits than moments: the rest stays as it is */
            keep = (__mmask16)_pdep_u32((1u << (end - slot)) - 1, keep);
        if (channel + LINE <= job->width && slot + LINE <= end)
            step_lanes(job, row, channel, slot, keep, 1, number);
        else
            step_lanes(job, row, channel, slot, keep, 0, number);
        slot += __builtin_popcount(keep);
    }
}

#define HAS_STEP_ROW

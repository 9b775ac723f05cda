/* EdgeGuard: verdict, window and evidence. See edgeguard.h. */
#include "edgeguard.h"

#include <string.h>

#define SIGN 0x80000000UL
#define INFINITE 0x7F800000L
#define ONE 0x3F800000L
#define FULL 65535U

/* The largest float32 that is not above each edge of the histogram: 0.1 to 1 by 0.1, 1.2, 1.5, 2, 3, 5, 8 ... 64. */
static const int32_t edges[EDGEGUARD_BINS - 1] = {
    0x3DCCCCCCL, 0x3E4CCCCCL, 0x3E999999L, 0x3ECCCCCCL, 0x3F000000L, 0x3F199999L, 0x3F333333L,
    0x3F4CCCCCL, 0x3F666666L, 0x3F800000L, 0x3F999999L, 0x3FC00000L, 0x40000000L, 0x40400000L,
    0x40A00000L, 0x41000000L, 0x41800000L, 0x42000000L, 0x42800000L};

static uint32_t word_at(const void *floats, uint32_t index)
{
    uint32_t bits;
    (void)memcpy(&bits, &((const uint8_t *)floats)[index * sizeof bits], sizeof bits);
    return bits;
}

/* Numbers that stand in the order of the floats; NaN lies beyond the infinities. */
static int32_t rank_at(const void *floats, uint32_t index)
{
    const uint32_t bits = word_at(floats, index);
    const int32_t magnitude = (int32_t)(bits & ~SIGN);
    return ((bits & SIGN) != 0U) ? -magnitude : magnitude;
}

static int32_t magnitude_of(int32_t value)
{
    return (value < 0) ? -value : value;
}

edgeguard_status_t edgeguard_judge(const edgeguard_guard_t *guard, const edgeguard_input_t *input, int32_t *joint)
{
    int32_t largest = -INFINITE;
    const int32_t label = (guard->classes == 0U) ? (input->label + 1) : input->label; /* -1 is the one without classes */
    bool checked = !guard->synthetic && ((uint32_t)label < ((guard->classes == 0U) ? 1U : guard->classes));
    uint32_t i;

    for (i = 0U; i < guard->detectors; i++) {
        const int32_t score = rank_at(input->scores, i);
        if (magnitude_of(score) > INFINITE) {
            checked = false;
        }
        if (score > largest) {
            largest = score;
        }
    }
    for (i = 0U; i < guard->features; i++) {
        if (magnitude_of(rank_at(input->features, i)) > guard->largest) {
            checked = false;
        }
    }
    *joint = largest;
    if (!checked || (largest == -INFINITE)) {
        return EDGEGUARD_NOT_CHECKED;
    }
    return (largest > ONE) ? EDGEGUARD_FLAGGED : EDGEGUARD_CLEAN;
}

static int16_t argmax(const uint8_t *values, uint32_t count, uint32_t sign)
{
    uint32_t best = 0U;
    uint32_t i;
    for (i = 1U; i < count; i++) {
        if ((values[i] ^ sign) > (values[best] ^ sign)) {
            best = i;
        }
    }
    return (int16_t)best;
}

int16_t edgeguard_argmax_int8(const int8_t *values, uint32_t count)
{
    return argmax((const uint8_t *)values, count, 0x80U);
}

int16_t edgeguard_argmax_uint8(const uint8_t *values, uint32_t count)
{
    return argmax(values, count, 0U);
}

int16_t edgeguard_argmax_float32(const void *values, uint32_t count)
{
    uint32_t best = 0U;
    uint32_t i;
    for (i = 1U; i < count; i++) {
        if (rank_at(values, i) > rank_at(values, best)) {
            best = i;
        }
    }
    return (int16_t)best;
}

uint32_t edgeguard_bin(int32_t joint)
{
    uint32_t bin = 0U;
    while ((bin < (EDGEGUARD_BINS - 1U)) && (joint > edges[bin])) {
        bin++;
    }
    return bin;
}

static int32_t steps_of(uint32_t bits, const edgeguard_scale_t *scale)
{
    const int32_t exponent = (int32_t)((bits >> 23) & 0xFFU);
    const int32_t shift = scale->exponent - exponent;
    const uint32_t mantissa = 0x8000U | ((bits >> 8) & 0x7FFFU);
    int32_t steps;

    if ((exponent == 0) || (shift > 31)) {
        steps = 0;
    } else if (shift < 2) {
        steps = 0x3FFFFFFF;
    } else {
        steps = (int32_t)((mantissa * scale->factor) >> shift);
    }
    return ((bits & SIGN) != 0U) ? -steps : steps;
}

int32_t edgeguard_excess(const edgeguard_guard_t *guard, uint32_t channel, uint32_t feature, int32_t label)
{
    int32_t excess = steps_of(feature, &guard->scales[channel]) - guard->scales[channel].mean;
    if ((guard->expected != NULL) && (label >= 0)) {
        excess -= guard->expected[((uint32_t)label * guard->features) + channel];
    }
    if (excess > EDGEGUARD_MAX_EXCESS) {
        excess = EDGEGUARD_MAX_EXCESS;
    } else if (excess < -EDGEGUARD_MAX_EXCESS) {
        excess = -EDGEGUARD_MAX_EXCESS;
    } else {
        /* it fits */
    }
    return excess;
}

void edgeguard_window_clear(edgeguard_window_t *window)
{
    (void)memset(window, 0, sizeof *window);
    window->report.evidence_label = -1;
}

static edgeguard_count_t *count_of(edgeguard_report_t *report, int16_t label)
{
    edgeguard_count_t *count;
    uint32_t i;
    for (i = 0U; i < report->labels_count; i++) {
        if (report->labels[i].label == label) {
            return &report->labels[i];
        }
    }
    if (report->labels_count >= EDGEGUARD_LABELS) {
        return NULL;
    }
    count = &report->labels[report->labels_count];
    report->labels_count++;
    count->label = label;
    return count;
}

/* A channel moved: count it where it is counted; else in a free place, else in that of the fewest inputs. */
static void moved(edgeguard_report_t *report, uint32_t channel, int32_t excess)
{
    edgeguard_channel_t *found = &report->channels[0];
    uint32_t i;
    for (i = 0U; (i < report->channels_count) && (found->channel != channel); i++) {
        edgeguard_channel_t *const other = &report->channels[i];
        if ((other->channel == channel) || (other->inputs < found->inputs)) {
            found = other;
        }
    }
    if ((report->channels_count == 0U) || (found->channel != channel)) {
        if (report->channels_count < EDGEGUARD_CHANNELS) {
            found = &report->channels[report->channels_count];
            report->channels_count++;
        }
        found->channel = (uint16_t)channel;
        found->inputs = 0U;
        found->total = 0;
    }
    found->inputs++;
    found->total += excess;
}

static void gather(edgeguard_report_t *report, const edgeguard_guard_t *guard, const edgeguard_input_t *input)
{
    uint32_t channels[EDGEGUARD_MOVED] = {0U};
    int32_t excesses[EDGEGUARD_MOVED] = {0};
    uint32_t channel;
    uint32_t i;

    for (channel = 0U; channel < guard->features; channel++) {
        uint32_t here = channel;
        int32_t excess = edgeguard_excess(guard, channel, word_at(input->features, channel), input->label);
        for (i = 0U; i < EDGEGUARD_MOVED; i++) { /* keeps the largest, in order */
            if (magnitude_of(excess) > magnitude_of(excesses[i])) {
                const uint32_t channel_before = channels[i];
                const int32_t excess_before = excesses[i];
                channels[i] = here;
                excesses[i] = excess;
                here = channel_before;
                excess = excess_before;
            }
        }
    }
    for (i = 0U; i < EDGEGUARD_MOVED; i++) {
        if (excesses[i] != 0) {
            moved(report, channels[i], excesses[i]);
        }
    }
}

static void flagged(edgeguard_window_t *window, const edgeguard_guard_t *guard, const edgeguard_input_t *input)
{
    edgeguard_report_t *const report = &window->report;
    if (window->lead == 0U) {
        if (report->evidence_label != input->label) {
            report->channels_count = 0U;
            report->evidence_label = input->label;
            report->evidence = 0U;
        }
        window->lead = 1U;
    } else if (report->evidence_label == input->label) {
        window->lead++;
    } else {
        window->lead--;
        return;
    }
    report->evidence++;
    gather(report, guard, input);
}

bool edgeguard_window_add(edgeguard_window_t *window, const edgeguard_guard_t *guard, const edgeguard_input_t *input,
                          edgeguard_status_t status, int32_t joint, bool evidence)
{
    edgeguard_report_t *const report = &window->report;
    edgeguard_count_t *count;

    if (window->inputs >= FULL) {
        return false;
    }
    if (status == EDGEGUARD_NOT_CHECKED) {
        report->unchecked++;
        window->inputs++;
        return true;
    }
    count = count_of(report, input->label);
    if (count == NULL) {
        return false;
    }
    window->inputs++;
    count->inputs++;
    report->histogram[edgeguard_bin(joint)]++;
    if (status == EDGEGUARD_FLAGGED) {
        count->flagged++;
        if (evidence && (guard->scales != NULL)) {
            flagged(window, guard, input);
        }
    }
    return true;
}

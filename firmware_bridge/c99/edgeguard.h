/* EdgeGuard: what the guard of a model says about one input, and what the inputs of a window add up to.
 *
 * Rules enforced here:
 * - a float32 is compared by its bit pattern; no floating-point unit and no soft-float library is needed;
 * - an input is flagged when the largest score exceeds 1; a score or feature that is NaN, or a feature out of all
 *   bounds, makes it "not checked", which is never "clean";
 * - nothing is allocated, nothing recurses, every size is known at compile time.
 */
#ifndef EDGEGUARD_H
#define EDGEGUARD_H

#include "edgeguard_messages.h"

#include <stddef.h>

#define EDGEGUARD_LIBRARY "1.0"

typedef enum {
    EDGEGUARD_CLEAN = 0,
    EDGEGUARD_FLAGGED = 1,
    EDGEGUARD_NOT_CHECKED = 2
} edgeguard_status_t;

/* How a feature becomes a whole number of steps, 1/256 of the deviation that alone would reach a threshold:
 * steps = 16-bit mantissa * factor >> (exponent - its float32 exponent), and what clean inputs have of them. */
typedef struct {
    uint16_t factor;
    int16_t exponent;
    int32_t mean;
} edgeguard_scale_t;

/* What is known of one model file. */
typedef struct {
    uint8_t file_digest[32]; /* SHA-256 */
    uint8_t model_digest[32];
    uint8_t guard_digest[32];
    uint32_t sequence; /* of the release */
    uint32_t size;
} edgeguard_content_t;

/* The guard of one file, as `edgeguard export` wrote it to edgeguard_model.c. */
typedef struct {
    const edgeguard_content_t *content;
    const char *detector_names;  /* between commas */
    const edgeguard_scale_t *scales; /* [features], or NULL: no evidence by channel */
    const int16_t *expected;     /* [classes][features], steps beyond the mean, or NULL */
    int32_t largest;             /* rank of the largest feature that scores can speak about */
    uint16_t features;
    uint16_t classes;            /* 0: a model without */
    uint8_t detectors;
    bool synthetic;              /* calibrated on made-up inputs: nothing is ever checked */
} edgeguard_guard_t;

/* One input: the outputs of the model, as they lie in memory (float32, this machine's byte order). */
typedef struct {
    const void *scores;    /* edgeguard_scores [detectors] */
    const void *features;  /* edgeguard_features [features] */
    int16_t label;         /* predicted class, -1 for a model without classes */
    uint32_t inference_us; /* how long the model took, or EDGEGUARD_UNKNOWN */
} edgeguard_input_t;

/* The verdict. `joint` gets the largest score as a rank: a float's bit pattern, negated where the float is negative. */
edgeguard_status_t edgeguard_judge(const edgeguard_guard_t *guard, const edgeguard_input_t *input, int32_t *joint);

/* Index of the largest of `count` values, the first of equals: the predicted class of an own output. */
int16_t edgeguard_argmax_int8(const int8_t *values, uint32_t count);
int16_t edgeguard_argmax_uint8(const uint8_t *values, uint32_t count);
int16_t edgeguard_argmax_float32(const void *values, uint32_t count);

/* The bin of the score histogram, 0 to EDGEGUARD_BINS - 1, that holds a score, given as its rank. */
uint32_t edgeguard_bin(int32_t joint);

/* How far a feature is from what the guard expects for this label, in steps. */
int32_t edgeguard_excess(const edgeguard_guard_t *guard, uint32_t channel, uint32_t feature, int32_t label);

#define EDGEGUARD_MOVED 4

/* What was counted since the last report. */
typedef struct {
    uint16_t inputs;
    uint16_t lead; /* majority vote of Boyer and Moore, 1981: the label of most flagged inputs */
    edgeguard_report_t report;
} edgeguard_window_t;

void edgeguard_window_clear(edgeguard_window_t *window);

/* Count one input. False, and nothing counted, where the window has no room left for it: end it first.
 * `evidence`: gather the channels of flagged inputs; false for a model that the tables of `guard` do not describe. */
bool edgeguard_window_add(edgeguard_window_t *window, const edgeguard_guard_t *guard, const edgeguard_input_t *input,
                          edgeguard_status_t status, int32_t joint, bool evidence);

#endif

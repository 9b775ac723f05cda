/* EdgeGuard: golden vectors. For a self-test, run the model on each `input` and compare what edgeguard_judge says of
 * its outputs; for a test of the library alone, hand it the recorded outputs. */
#ifndef EDGEGUARD_GOLDEN_H
#define EDGEGUARD_GOLDEN_H

#include "edgeguard.h"

typedef struct {
    const uint8_t *input; /* as the model's input tensor takes it */
    const uint32_t *scores;
    const uint32_t *features;
    uint32_t input_size;
    int16_t label;
    edgeguard_status_t status;
} edgeguard_golden_t;

extern const uint32_t edgeguard_golden_count;
extern const edgeguard_golden_t edgeguard_golden[];

#endif

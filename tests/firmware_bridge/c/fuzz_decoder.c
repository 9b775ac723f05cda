/* What libFuzzer drives: anything at all through the frame decoder, and through every reader of a payload. */
#include "edgeguard_link.h"

#include <stdlib.h>
#include <string.h>

static volatile uint64_t sum;

static void read_all(const uint8_t *payload, uint16_t size)
{
    edgeguard_welcome_t welcome;
    edgeguard_ack_t ack;
    edgeguard_command_t command;
    edgeguard_clock_t clock;
    edgeguard_transfer_begin_t begin;
    edgeguard_transfer_chunk_t chunk;
    edgeguard_transfer_end_t end;

    if (edgeguard_get_welcome(payload, size, &welcome)) {
        sum += welcome.boot;
    }
    if (edgeguard_get_ack(payload, size, &ack)) {
        sum += ack.sequence;
    }
    if (edgeguard_get_command(payload, size, &command)) {
        sum += command.order;
    }
    if (edgeguard_get_clock(payload, size, &clock)) {
        sum += clock.unix_ms;
    }
    if (edgeguard_get_transfer_begin(payload, size, &begin)) {
        sum += begin.file_digest[31] + begin.guard_digest[31];
    }
    if (edgeguard_get_transfer_chunk(payload, size, &chunk) && (chunk.data_size > 0U)) {
        sum += chunk.data[chunk.data_size - 1U];
    }
    if (edgeguard_get_transfer_end(payload, size, &end)) {
        sum += end.file_digest[31];
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    edgeguard_decoder_t *const decoder = calloc(1U, sizeof *decoder); /* so that its ends are watched */
    edgeguard_frame_t frame;
    size_t i;

    if (decoder == NULL) {
        abort();
    }
    read_all(data, (uint16_t)size);
    for (i = 0U; i < size; i++) {
        if (edgeguard_decode(decoder, data[i], &frame) == EDGEGUARD_FRAME) {
            read_all(frame.payload, frame.size);
        }
    }
    free(decoder);
    return 0;
}

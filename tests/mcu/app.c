/* See app.h. */
#include "app.h"

#define PACE_MS 5U

static edgeguard_t link;

int app_run(const char *name, const char *board)
{
    const edgeguard_hal_t *const hal = board_open();
    const uint32_t part = board_starts() - 1U;
    uint32_t next = part * recorded_part;
    uint32_t end = next + recorded_part;
    uint32_t observed_at;
    uint8_t bytes[64];

    if (end > recorded_inputs) {
        end = recorded_inputs;
    }
    if (!edgeguard_init(&link, hal, &edgeguard_guard, name, board, board_boot())) {
        return 1;
    }
    observed_at = hal->clock_ms(hal->context);
    for (;;) {
        const uint32_t now = hal->clock_ms(hal->context);
        const uint16_t size = board_read(bytes, sizeof bytes);
        edgeguard_receive(&link, bytes, size);
        if (edgeguard_on_trial(&link)) {
            edgeguard_confirm(&link, board_self_test());
        }
        if ((next < end) && ((now - observed_at) >= PACE_MS)) {
            const edgeguard_input_t input = {
                .scores = &recorded_scores[next * edgeguard_guard.detectors],
                .features = &recorded_features[next * edgeguard_guard.features],
                .label = recorded_labels[next],
                .inference_us = EDGEGUARD_UNKNOWN,
            };
            (void)edgeguard_observe(&link, &input);
            observed_at = now;
            next++;
        }
        if (edgeguard_poll(&link)) {
            board_restart();
        }
        if (size == 0U) {
            board_wait();
        }
    }
}

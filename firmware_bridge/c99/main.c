/* An example of firmware around the library. What begins with board_ is yours to write: the UART, the clock, the flash,
 * and a few lines of C++ that run the model with TFLite Micro (see edgeguard_operators.h). */
#include "edgeguard_golden.h"
#include "edgeguard_link.h"
#include "edgeguard_model.h"

#include <string.h>

#define SLOT_BYTES (256UL * 1024UL)
#define PAGE_BYTES 4096UL

/* What the model made of one input: its output tensors' data. */
typedef struct {
    const void *classes;
    const void *scores;
    const void *features;
    uint32_t inference_us;
} board_outputs_t;

extern uint32_t board_clock_ms(void *context);
extern bool board_uart_write(void *context, const uint8_t *bytes, uint16_t size);
extern uint16_t board_uart_read(uint8_t *bytes, uint16_t most); /* what the interrupt has gathered */
extern bool board_flash_read(void *context, uint8_t area, uint32_t offset, uint8_t *bytes, uint16_t size);
extern bool board_flash_write(void *context, uint8_t area, uint32_t offset, const uint8_t *bytes, uint16_t size);
extern bool board_flash_erase(void *context, uint8_t area, uint32_t offset);
extern const uint8_t *board_slot(uint8_t slot); /* where a slot is seen in memory */
extern uint64_t board_boot_number(void);
extern bool board_open_model(const uint8_t *model);
extern bool board_run(const uint8_t *input, board_outputs_t *outputs);
extern const uint8_t *board_next_input(void); /* NULL while there is none */
extern void board_restart(void);

static const edgeguard_hal_t hal = {NULL,
                                    board_clock_ms,
                                    board_uart_write,
                                    board_flash_read,
                                    board_flash_write,
                                    board_flash_erase,
                                    SLOT_BYTES,
                                    PAGE_BYTES};
static edgeguard_t guard;

static void input_of(const board_outputs_t *outputs, edgeguard_input_t *input)
{
    input->scores = outputs->scores;
    input->features = outputs->features;
    input->label = (int16_t)EDGEGUARD_LABEL(outputs->classes);
    input->inference_us = outputs->inference_us;
}

/* What is told of an input that the model did not run on: no score is a number, so it is not checked. Nobody looks at
 * the features then; the model's own bytes are as many as are asked for. */
static void nothing_of(edgeguard_input_t *input)
{
    static uint32_t no_numbers[EDGEGUARD_DETECTORS];
    (void)memset(no_numbers, 0xFF, sizeof no_numbers);
    input->scores = no_numbers;
    input->features = edgeguard_model;
    input->label = -1;
    input->inference_us = EDGEGUARD_UNKNOWN;
}

/* The golden inputs belong to the exported model. One that came over the link has to open and to run, and to say
 * something of them: where all that it says is "not checked", its guard is of no use here. */
static bool self_test(void)
{
    uint32_t i;
    for (i = 0U; i < edgeguard_golden_count; i++) {
        board_outputs_t outputs;
        edgeguard_input_t input;
        edgeguard_status_t status;
        int32_t joint;
        if (!board_run(edgeguard_golden[i].input, &outputs)) {
            return false;
        }
        input_of(&outputs, &input);
        status = edgeguard_judge(&edgeguard_guard, &input, &joint);
        if (edgeguard_running(&guard) == EDGEGUARD_BUILT_IN) {
            if ((status != edgeguard_golden[i].status) || (input.label != edgeguard_golden[i].label)) {
                return false;
            }
        } else if ((status == EDGEGUARD_NOT_CHECKED) && (edgeguard_golden[i].status != EDGEGUARD_NOT_CHECKED)) {
            return false;
        } else {
            /* another model may say something else, but it says something */
        }
    }
    return true;
}

int main(void)
{
    const uint8_t *model;
    bool runs;

    if (!edgeguard_init(&guard, &hal, &edgeguard_guard, "mcu-1", "example board", board_boot_number())) {
        return 1;
    }
    model = (edgeguard_running(&guard) == EDGEGUARD_BUILT_IN) ? edgeguard_model : board_slot(edgeguard_running(&guard));
    runs = board_open_model(model) && self_test();
    if (edgeguard_on_trial(&guard)) {
        edgeguard_confirm(&guard, runs);
    }
    for (;;) {
        uint8_t bytes[64];
        const uint16_t size = board_uart_read(bytes, (uint16_t)sizeof bytes);
        const uint8_t *const next = runs ? board_next_input() : NULL;
        board_outputs_t outputs;
        edgeguard_input_t input;

        edgeguard_receive(&guard, bytes, size);
        if (next != NULL) {
            if (board_run(next, &outputs)) {
                input_of(&outputs, &input);
            } else {
                nothing_of(&input);
            }
            if (edgeguard_observe(&guard, &input) != EDGEGUARD_CLEAN) {
                /* do not act on the model's answer */
            }
        }
        if (edgeguard_poll(&guard)) {
            board_restart();
        }
    }
}

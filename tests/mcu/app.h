/* A firmware for tests: it plays back recorded outputs of a model. What differs between boards stands in board_*.c. */
#ifndef APP_H
#define APP_H

#include "edgeguard_link.h"
#include "edgeguard_model.h"

/* What was recorded, in recorded.c. */
extern const uint32_t recorded_inputs;
extern const uint32_t recorded_part; /* so many inputs each start of the board plays */
extern const uint32_t recorded_scores[];   /* bit patterns, [inputs][detectors] */
extern const uint32_t recorded_features[]; /* [inputs][features] */
extern const int16_t recorded_labels[];

/* What a board has. */
const edgeguard_hal_t *board_open(void);
uint32_t board_starts(void); /* 1 at the first start that this board's flash knows of */
uint64_t board_boot(void);
uint16_t board_read(uint8_t *bytes, uint16_t most);
bool board_self_test(void);
void board_wait(void);
void board_restart(void);

int app_run(const char *name, const char *board);

#endif

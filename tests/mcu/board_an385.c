/* The board that `qemu-system-arm -M mps2-an385` is: a Cortex-M3, its first UART, and memory that outlives a reset in
 * the place of flash. See app.h. */
#include "app.h"

#include <string.h>

#define UART ((volatile uint32_t *)0x40004000UL) /* data, state, control, interrupt, divider */
#define UART_FULL 1U
#define UART_WAITS 2U
#define SYSTICK ((volatile uint32_t *)0xE000E010UL) /* control, reload, value */
#define AIRCR (*(volatile uint32_t *)0xE000ED0CUL)
#define KEPT ((uint8_t *)0x21000000UL) /* 16 MiB that no reset clears */
#define SEED (*(volatile uint32_t *)0x21800000UL) /* at random, from whoever starts the emulator */
#define CLOCK_HZ 25000000UL

#define PAGE 1024U
#define SLOT (128U * PAGE)
#define MAGIC 0x45474B31UL

typedef struct {
    uint32_t magic;
    uint32_t starts;
} kept_t;

static kept_t *const kept = (kept_t *)(void *)KEPT;
static volatile uint32_t milliseconds;

extern uint32_t data_from[], data_begin[], data_end[], bss_begin[], bss_end[], stack_top[];
void reset_handler(void);
void tick_handler(void);
void fault_handler(void);

static uint8_t *flash(uint8_t area, uint32_t offset)
{
    return &KEPT[4096U + (uint32_t)area * SLOT + offset];
}

static uint32_t clock_ms(void *context)
{
    (void)context;
    return milliseconds;
}

static bool uart_write(void *context, const uint8_t *bytes, uint16_t size)
{
    uint16_t i;
    (void)context;
    for (i = 0U; i < size; i++) {
        while ((UART[1] & UART_FULL) != 0U) {
        }
        UART[0] = bytes[i];
    }
    return true;
}

static bool flash_read(void *context, uint8_t area, uint32_t offset, uint8_t *bytes, uint16_t size)
{
    (void)context;
    (void)memcpy(bytes, flash(area, offset), size);
    return true;
}

static bool flash_write(void *context, uint8_t area, uint32_t offset, const uint8_t *bytes, uint16_t size)
{
    uint16_t i;
    (void)context;
    for (i = 0U; i < size; i++) {
        if (flash(area, offset)[i] != 0xFFU) { /* written twice without erasing */
            return false;
        }
    }
    (void)memcpy(flash(area, offset), bytes, size);
    return true;
}

static bool flash_erase(void *context, uint8_t area, uint32_t offset)
{
    (void)context;
    (void)memset(flash(area, offset), 0xFF, PAGE);
    return true;
}

const edgeguard_hal_t *board_open(void)
{
    static const edgeguard_hal_t hal = {NULL,        clock_ms,    uart_write, flash_read,
                                        flash_write, flash_erase, SLOT,       PAGE};
    UART[4] = 16U;
    UART[2] = 3U; /* sends and receives */
    SYSTICK[1] = CLOCK_HZ / 1000U - 1U;
    SYSTICK[2] = 0U;
    SYSTICK[0] = 7U;
    if (kept->magic != MAGIC) { /* the power was gone: an empty flash */
        (void)memset(KEPT, 0xFF, 4096U + 4U * SLOT);
        kept->magic = MAGIC;
        kept->starts = 0U;
    }
    kept->starts++;
    return &hal;
}

uint32_t board_starts(void)
{
    return kept->starts;
}

uint64_t board_boot(void)
{
    return ((uint64_t)SEED << 32) | kept->starts;
}

uint16_t board_read(uint8_t *bytes, uint16_t most)
{
    uint16_t size = 0U;
    while ((size < most) && ((UART[1] & UART_WAITS) != 0U)) {
        bytes[size] = (uint8_t)UART[0];
        size++;
    }
    return size;
}

bool board_self_test(void)
{
    return true;
}

void board_wait(void)
{
    __asm volatile("nop");
}

void board_restart(void)
{
    AIRCR = 0x05FA0004UL;
    for (;;) {
    }
}

void tick_handler(void)
{
    milliseconds++;
}

void fault_handler(void)
{
    board_restart();
}

void reset_handler(void)
{
    uint32_t *from = data_from;
    uint32_t *to;
    for (to = data_begin; to < data_end; to++) {
        *to = *from;
        from++;
    }
    for (to = bss_begin; to < bss_end; to++) {
        *to = 0U;
    }
    (void)app_run("pump", "mps2-an385");
    board_restart();
}

typedef void (*handler_t)(void);

__attribute__((section(".vectors"), used)) static const handler_t vectors[16] = {
    (handler_t)(void *)stack_top, reset_handler, fault_handler, fault_handler, fault_handler, fault_handler,
    fault_handler, NULL, NULL, NULL, NULL, fault_handler, fault_handler, NULL, fault_handler, tick_handler,
};

/* The host as a board: a terminal for the line, a folder for the flash. See app.h.
 *
 *     host PORT FOLDER
 *
 * In the folder: a file for each area of flash, and `starts`. EDGEGUARD_POWER=N ends the power in the middle of the N-th
 * write to flash, EDGEGUARD_SELF_TEST=fail lets the self-test of a new model fail. A restart is an exec: what was in
 * memory is gone, as after a reset.
 */
#define _DEFAULT_SOURCE
#include "app.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 256U
#define SLOT (512U * PAGE)

static char **arguments;
static int line = -1;
static int areas[4];
static long power = -1;

static void fail(const char *what)
{
    perror(what);
    exit(2);
}

static int opened(const char *name)
{
    char path[4096];
    int file;
    (void)snprintf(path, sizeof path, "%s/%s", arguments[2], name);
    file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) {
        fail(path);
    }
    return file;
}

static uint32_t clock_ms(void *context)
{
    struct timespec now;
    (void)context;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint32_t)((uint64_t)now.tv_sec * 1000U + (uint64_t)now.tv_nsec / 1000000U);
}

static bool uart_write(void *context, const uint8_t *bytes, uint16_t size)
{
    (void)context;
    return write(line, bytes, size) == (ssize_t)size;
}

/* Half of what is written reaches the flash, and then the power is gone. */
static void use_power(int file, uint32_t offset, const uint8_t *bytes, uint32_t size)
{
    if (power > 0) {
        power--;
        if (power == 0) {
            (void)!pwrite(file, bytes, size / 2U, (off_t)offset);
            _exit(9);
        }
    }
}

static bool flash_read(void *context, uint8_t area, uint32_t offset, uint8_t *bytes, uint16_t size)
{
    ssize_t found;
    (void)context;
    (void)memset(bytes, 0xFF, size);
    found = pread(areas[area], bytes, size, (off_t)offset);
    return found >= 0;
}

static bool flash_write(void *context, uint8_t area, uint32_t offset, const uint8_t *bytes, uint16_t size)
{
    uint8_t there[512];
    uint16_t i;
    (void)flash_read(context, area, offset, there, size);
    for (i = 0U; i < size; i++) {
        if (there[i] != 0xFFU) {
            fail("written twice without erasing");
        }
    }
    use_power(areas[area], offset, bytes, size);
    return pwrite(areas[area], bytes, size, (off_t)offset) == (ssize_t)size;
}

static bool flash_erase(void *context, uint8_t area, uint32_t offset)
{
    uint8_t page[PAGE];
    (void)context;
    (void)memset(page, 0xFF, sizeof page);
    use_power(areas[area], offset, page, PAGE);
    return pwrite(areas[area], page, PAGE, (off_t)offset) == (ssize_t)PAGE;
}

const edgeguard_hal_t *board_open(void)
{
    static const edgeguard_hal_t hal = {NULL,        clock_ms,    uart_write, flash_read,
                                        flash_write, flash_erase, SLOT,       PAGE};
    return &hal;
}

uint32_t board_starts(void)
{
    const int file = opened("starts");
    char text[16] = {0};
    long starts;
    (void)!read(file, text, sizeof text - 1U);
    starts = strtol(text, NULL, 10) + 1;
    (void)snprintf(text, sizeof text, "%ld", starts);
    (void)!pwrite(file, text, strlen(text), 0);
    (void)close(file);
    return (uint32_t)starts;
}

uint64_t board_boot(void)
{
    uint64_t boot = 0U;
    if (getrandom(&boot, sizeof boot, 0) != (ssize_t)sizeof boot) {
        fail("getrandom");
    }
    return boot;
}

uint16_t board_read(uint8_t *bytes, uint16_t most)
{
    const ssize_t found = read(line, bytes, most);
    return (found > 0) ? (uint16_t)found : 0U;
}

bool board_self_test(void)
{
    const char *const told = getenv("EDGEGUARD_SELF_TEST");
    return (told == NULL) || (strcmp(told, "fail") != 0);
}

void board_wait(void)
{
    struct pollfd waiting = {.fd = line, .events = POLLIN, .revents = 0};
    (void)poll(&waiting, 1U, 2);
    if (getppid() == 1) {
        _exit(0); /* the test that started this is gone */
    }
}

void board_restart(void)
{
    (void)unsetenv("EDGEGUARD_POWER");
    (void)execv("/proc/self/exe", arguments);
    fail("exec");
}

int main(int count, char **given)
{
    static const char *const names[4] = {"slot-a", "slot-b", "record-a", "record-b"};
    struct termios raw;
    const char *const told = getenv("EDGEGUARD_POWER");
    arguments = given;
    if (count != 3) {
        (void)fprintf(stderr, "usage: host PORT FOLDER\n");
        return 2;
    }
    line = open(given[1], O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if ((line < 0) || (tcgetattr(line, &raw) != 0)) {
        fail(given[1]);
    }
    cfmakeraw(&raw);
    if (tcsetattr(line, TCSANOW, &raw) != 0) {
        fail(given[1]);
    }
    for (int area = 0; area < 4; area++) {
        areas[area] = opened(names[area]);
    }
    power = (told != NULL) ? strtol(told, NULL, 10) : -1;
    return app_run("pump", "host");
}

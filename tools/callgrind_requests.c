/* What a program asks of callgrind, for Python's ctypes: the requests are macros. */
#include <valgrind/callgrind.h>

void start(void) { CALLGRIND_START_INSTRUMENTATION; }

/* Writes what was counted since the last dump to a file of its own, under this name. */
void stop(const char* name) {
  CALLGRIND_STOP_INSTRUMENTATION;
  CALLGRIND_DUMP_STATS_AT(name);
}

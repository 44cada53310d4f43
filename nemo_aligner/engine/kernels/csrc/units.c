/* See units.h. */
#include "units.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Whether this process may use them: Linux keeps their state for one that has asked for it. */
int has_units(void) {
#if HAS_UNITS
    static int answer = -1;
    if (answer < 0) answer = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tiles' data */);
    return answer;
#else
    return 0;
#endif
}

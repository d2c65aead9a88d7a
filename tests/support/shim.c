/* A PKCS#11 module for tests: passes each call on to SHIM_MODULE, notes it in SHIM_LOG, and does first what SHIM_ORDERS says.
 *
 * SHIM_ORDERS holds lines "FUNCTION WHAT": a return value in hexadecimal instead of the call, or "hang": wait until the
 * line is gone; a third word "once" makes it so after the first call. Every argument of PKCS #11 is an integer or a pointer, and no function has more than eight. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long N;
typedef N (*F)(N, N, N, N, N, N, N, N);
typedef struct { unsigned char version[2]; F f[68]; } List;

static List real, ours;

static int ordered(const char *name, N *rv) {
    char line[128], function[64], what[32], once[8];
    int found = 0, words;
    const char *path = getenv("SHIM_ORDERS");
    FILE *orders = path ? fopen(path, "r") : NULL;
    if (!orders) return 0;
    while (fgets(line, sizeof line, orders))
        if ((words = sscanf(line, "%63s %31s %7s", function, what, once)) >= 2 && !strcmp(function, name)) {
            found = strcmp(what, "hang") ? 1 : 2;
            *rv = strtoul(what, NULL, 16);
            if (words == 3) unlink(path);
        }
    fclose(orders);
    return found;
}

static N call(int index, const char *name, N a, N b, N c, N d, N e, N g, N h, N i) {
    N rv = 0;
    int order;
    const char *path = getenv("SHIM_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (log) { fprintf(log, "%s\n", name); fclose(log); }
    while ((order = ordered(name, &rv)) == 2) usleep(5000);
    return order ? rv : real.f[index](a, b, c, d, e, g, h, i);
}

#define WRAP(index, name) \
    static N wrap_##name(N a, N b, N c, N d, N e, N g, N h, N i) { return call(index, #name, a, b, c, d, e, g, h, i); }
#define ALL(X) X(0, C_Initialize) X(1, C_Finalize) X(4, C_GetSlotList) X(6, C_GetTokenInfo) X(7, C_GetMechanismList) \
    X(12, C_OpenSession) X(13, C_CloseSession) X(18, C_Login) X(22, C_DestroyObject) X(24, C_GetAttributeValue) \
    X(26, C_FindObjectsInit) X(42, C_SignInit) X(43, C_Sign) X(59, C_GenerateKeyPair)
ALL(WRAP)

N C_GetFunctionList(List **list) {
    List *inner;
    void *module = dlopen(getenv("SHIM_MODULE"), RTLD_NOW | RTLD_LOCAL);
    N (*get)(List **) = module ? (N (*)(List **))dlsym(module, "C_GetFunctionList") : NULL;
    if (!get || get(&inner)) return 5; /* CKR_GENERAL_ERROR */
    real = ours = *inner;
#define SET(index, name) ours.f[index] = wrap_##name;
    ALL(SET)
    *list = &ours;
    return 0;
}

#include <stdint.h>

#include "api.cdef.h"

/* Names shared by all files of the library: exports, instruction-set suffixes, element types. */
#ifndef PS_TYPES_H
#define PS_TYPES_H

#include <stddef.h>
#include <stdint.h>

#define PS_EXPORT __attribute__((visibility("default")))
#define PS_INLINE static inline __attribute__((always_inline))

/* PS_FN(norm) is ps_norm_avx2 where the file is compiled with -DPS_ISA=avx2. */
#define PS_JOIN(name, isa) ps_##name##_##isa
#define PS_JOINED(name, isa) PS_JOIN(name, isa)
#define PS_FN(name) PS_JOINED(name, PS_ISA)

enum { PS_F32 = 0, PS_BF16 = 1 };

/* Results of exported functions. */
enum { PS_OK = 0, PS_BAD_INDEX = 1, PS_UNSUPPORTED = 2, PS_NO_MEMORY = 3 };

#endif

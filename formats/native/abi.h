/* Shared part of both C ABIs: status codes, dtypes, instruction sets. formats/native/abi.py has the same numbers for
 * Python; tests/formats/test_formats_native_header.py compares them.
 */
#ifndef MOE_ABI_H
#define MOE_ABI_H

#if defined(_WIN32)
#define MOE_API __declspec(dllexport)
#else
#define MOE_API __attribute__((visibility("default")))
#endif

enum moe_status {
  MOE_OK = 0,
  MOE_E_PACKING = 1,    /* unknown packing */
  MOE_E_SIZE = 2,       /* a size is negative or too large */
  MOE_E_ISA = 3,        /* the processor or the build lacks the instruction set */
  MOE_E_INDEX = 4,      /* a token or expert index is out of range, or an expert has no bytes */
  MOE_E_MEMORY = 5,     /* no memory for scratch */
  MOE_MISSING = 6,      /* not an error: the token needs experts that are not in memory */
  MOE_E_ARGUMENT = 7,   /* contradictory arguments */
  MOE_E_NON_FINITE = 8, /* a weight is infinite or NaN; its tile is not written */
  MOE_E_OVERFLOW = 9    /* a super-scale exceeds fp16; its tile is not written */
};

enum moe_dtype { MOE_F32 = 0, MOE_BF16 = 1, MOE_F16 = 2 };

/* All instruction sets give the same bits. MOE_ISA_AUTO: the best one of this processor. */
enum moe_isa_id { MOE_ISA_AUTO = -1, MOE_ISA_PORTABLE = 0, MOE_ISA_AVX2 = 1, MOE_ISA_AVX512 = 2 };

#endif

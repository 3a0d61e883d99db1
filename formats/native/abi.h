/* What the C ABIs of both native libraries share: status codes, dtypes, instruction sets. formats/native/abi.py states
 * the same numbers for Python (tests/formats/test_formats_native_header.py compares them).
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
  MOE_E_SIZE = 2,       /* a negative or too large size */
  MOE_E_ISA = 3,        /* this processor or this build lacks the instruction set */
  MOE_E_INDEX = 4,      /* a token or expert index out of range, or an expert without bytes */
  MOE_E_MEMORY = 5,     /* no memory for scratch */
  MOE_MISSING = 6,      /* not an error: a token needs experts that are not in memory */
  MOE_E_ARGUMENT = 7,   /* arguments that contradict each other */
  MOE_E_NON_FINITE = 8, /* infinities or NaN among the weights; tiles that hold one are not written */
  MOE_E_OVERFLOW = 9    /* a super-scale does not fit in fp16; its tile is not written */
};

enum moe_dtype { MOE_F32 = 0, MOE_BF16 = 1, MOE_F16 = 2 };

/* Which code runs. All give the same bits. */
enum moe_isa_id { MOE_ISA_AUTO = -1, MOE_ISA_PORTABLE = 0, MOE_ISA_AVX2 = 1, MOE_ISA_AVX512 = 2 };

#endif

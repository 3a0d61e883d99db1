/* Numbers that the C ABIs of both native libraries share: status codes, dtypes, instruction sets. formats/native/abi.py
 * has them for Python (tests/formats/test_formats_native_header.py compares both).
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
  MOE_E_ISA = 3,        /* this processor or this build lacks the instruction set */
  MOE_E_INDEX = 4,      /* a token or expert index is out of range, or an expert has no bytes */
  MOE_E_MEMORY = 5,     /* no memory for scratch */
  MOE_MISSING = 6,      /* not an error: a token needs experts that are not in memory */
  MOE_E_ARGUMENT = 7,   /* arguments contradict each other */
  MOE_E_NON_FINITE = 8, /* infinities or NaN among the weights; their tiles are not written */
  MOE_E_OVERFLOW = 9    /* a super-scale does not fit in fp16; its tile is not written */
};

enum moe_dtype { MOE_F32 = 0, MOE_BF16 = 1, MOE_F16 = 2 };

/* Instruction sets. All give the same bits. */
enum moe_isa_id { MOE_ISA_AUTO = -1, MOE_ISA_PORTABLE = 0, MOE_ISA_AVX2 = 1, MOE_ISA_AVX512 = 2 };

#endif

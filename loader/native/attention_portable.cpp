#include "attention.h"
#include "unrolled.h"

namespace moe {
namespace {
#include "attention.inc.h"
}  // namespace

extern const AttentionKernels kPortableAttention = {attend<float>, attend<uint16_t>};

}  // namespace moe

/* The instruction sets of this build, and the sizes of what callers hand over. */
#include <stdlib.h>

#include "internal.h"

static const maqd_isa *const ISAS[] = {
    &maqd_isa_portable,
#if defined(__x86_64__)
    &maqd_isa_avx2,
    &maqd_isa_vnni,
#if defined(MAQD_AMX)
    &maqd_isa_amx,
#endif
#elif defined(__aarch64__)
    &maqd_isa_neon,
#endif
};

const maqd_isa *maqd_get_isa(int32_t isa) { return ISAS[isa]; }

int32_t maqd_isas(void) { return (int32_t)(sizeof ISAS / sizeof ISAS[0]); }
const char *maqd_isa_name(int32_t isa) { return ISAS[isa]->name; }
int32_t maqd_supported(int32_t isa) { return ISAS[isa]->supported(); }
/* Python's `os.environ` takes ten times as long to say it, a twentieth of a token that goes through
 * a model's own modules. */
const char *maqd_asked_isa(void) { return getenv("MAQD_KERNEL"); }

int64_t maqd_struct_size(int32_t index) {
    static const int64_t sizes[] = {
        sizeof(maqd_weight),     sizeof(maqd_table),   sizeof(maqd_norm), sizeof(maqd_linear_plan),
        sizeof(maqd_block_plan), sizeof(maqd_decoder), sizeof(maqd_call),
    };
    return index >= 0 && index < (int32_t)(sizeof sizes / sizeof *sizes) ? sizes[index] : 0;
}

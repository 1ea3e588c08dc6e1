// Which sources the module was built from: fusedlr/sources.py makes the digest, setup.py passes it.
#define FUSEDLR_TEXT_(digits) #digits
#define FUSEDLR_TEXT(digits) FUSEDLR_TEXT_(digits)

namespace fusedlr {
extern const char* const sources;
const char* const sources = FUSEDLR_TEXT(FUSEDLR_SOURCES);
}  // namespace fusedlr

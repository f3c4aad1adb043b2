// The library whose ops a build of the emulated kernels implements.
extern const char* const vitkern_emulated_library;
const char* const vitkern_emulated_library = VITKERN_LIBRARY;

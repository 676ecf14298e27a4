// Opens and closes a region whose functions may use instructions that not every CPU has. Each compiler has a pragma of
// its own for that. Under RF_NO_TARGET_REGIONS it is the baseline's: a test compiles an ISA against a portable stand-in
// for its intrinsics that way.
#pragma once

#define RF_PRAGMA(text) _Pragma(#text)
#if defined(RF_NO_TARGET_REGIONS)
#define RF_BEGIN_TARGET(features)
#define RF_END_TARGET
#elif defined(__clang__)
#define RF_BEGIN_TARGET(features) \
  RF_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RF_END_TARGET RF_PRAGMA(clang attribute pop)
#else
#define RF_BEGIN_TARGET(features) RF_PRAGMA(GCC push_options) RF_PRAGMA(GCC target(features))
#define RF_END_TARGET RF_PRAGMA(GCC pop_options)
#endif
